"""Episodes of a dataset, and labels on it, as a recording of Rerun (https://rerun.io).

    lapa view DATASET --rerun FILE.rrd --limit 20

Each episode is an entity, `episode_17`, with its instruction as a text, its cameras as images, and actions, states and
codes as curves; all begin at second 0 of the time line `time` and at frame 0 of `frame`. Needs `lapa-vla[rerun]`.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from PIL import Image

from lapa.console import finish, progress, say
from lapa.data.dataset import ACTION, STATE
from lapa.errors import UserError
from lapa.files import atomic_path, writing
from lapa.view.config import ViewConfig
from lapa.view.dataset import DatasetPages, smaller
from lapa.view.opening import open_pages

QUALITY = 85


def record(config: ViewConfig) -> None:
    """Writes the episodes of an export to `config.rerun`. Raises UserError where there is a file, or no Rerun."""
    try:
        import rerun as rr
        import rerun.blueprint as layout
    except ModuleNotFoundError as error:
        raise UserError(f"--rerun needs {error.name}; install it: pip install 'lapa-vla[rerun]'") from None
    out = config.rerun
    assert out is not None
    if out.exists() and not config.overwrite:
        raise UserError(f"{out}: exists; give another name, or --overwrite")
    with contextlib.closing(open_pages(config)) as pages, progress() as bar:
        assert isinstance(pages, DatasetPages)
        episodes, views = pages.episodes.tolist(), []
        task = bar.add_task("recording", total=len(episodes), note="")
        with writing(out), atomic_path(out) as temporary:
            recording = rr.RecordingStream("lapa_view")
            recording.save(temporary)
            recording.send_recording_name(pages.dataset.name)
            for episode in episodes:
                views.append(_log_episode(recording, rr, layout, pages, episode))
                bar.advance(task)
            recording.send_blueprint(layout.Blueprint(layout.Tabs(*views)))
            recording.disconnect()
    if pages.left_out:
        say(pages.left_out)
    finish("recording", out, [f"rerun {out}"])


def _log_episode(recording: Any, rr: Any, layout: Any, pages: DatasetPages, episode: int) -> Any:
    """Logs an episode, and returns the part of the layout that shows it."""
    dataset, name = pages.dataset, f"episode_{episode}"
    text = f"{dataset.instruction(episode) or '(no instruction)'}\n\n{dataset[episode].source}"
    recording.log(f"{name}/instruction", rr.TextDocument(text), static=True)

    def send(entity: str, frames_T: np.ndarray, columns: Any) -> None:
        times = [rr.TimeColumn("frame", sequence=frames_T), rr.TimeColumn("time", duration=frames_T / dataset.fps)]
        recording.send_columns(f"{name}/{entity}", indexes=times, columns=columns)

    def send_curves(entity: str, names: list[str], frames_T: np.ndarray, rows_TD: np.ndarray) -> None:
        for dimension, values_T in zip(names, rows_TD.T, strict=True):
            send(f"{entity}/{dimension}", frames_T, rr.Scalars.columns(scalars=values_T.astype(float)))

    frames_T = np.arange(int(dataset.lengths[episode]))
    for camera in pages.cameras:
        images = [_as_jpeg(smaller(frame_HWC)) for frame_HWC in dataset.frames(episode, camera=camera)]
        kinds = ["image/jpeg"] * len(images)
        send(f"cameras/{camera}", frames_T, rr.EncodedImage.columns(blob=images, media_type=kinds))
    curves = []
    if dataset.action_dim is not None:
        curves.append("actions")
        send_curves("actions", pages.dimensions(ACTION), frames_T, dataset.actions(episode))
    if (states_TS := dataset.states(episode)) is not None:
        curves.append("states")
        send_curves("states", pages.dimensions(STATE), frames_T, states_TS)
    if pages.labels is not None:
        code_frames_T, codes_TL = pages.labels.codes(episode)
        positions = [f"position_{number}" for number in range(1, codes_TL.shape[1] + 1)]
        curves.append("codes")
        send_curves("codes", positions, code_frames_T, codes_TL)
    images = [layout.Spatial2DView(origin=f"{name}/cameras/{camera}", name=camera) for camera in pages.cameras]
    charts = [layout.TimeSeriesView(origin=f"{name}/{each}", name=each) for each in curves]
    parts = [layout.TextDocumentView(origin=f"{name}/instruction", name="instruction")]
    parts += [layout.Horizontal(*some) for some in (images, charts) if some]
    return layout.Vertical(*parts, name=name, row_shares=[1, *[4] * (len(parts) - 1)])


def _as_jpeg(image_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
