"""Trackers: where a training or an evaluation also reports, with `--tracker`.

    lapa latent train --tracker tensorboard --data DATASET --out LAM    # tensorboard --logdir LAM/training
    lapa policy finetune --tracker wandb ...                            # WANDB_PROJECT, WANDB_MODE=offline, ...
    lapa evaluate POLICY --tracker trackio ...                          # trackio show

A backend may raise: `Tracker` then warns once, and the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lapa.console import warn
from lapa.engine.config import TrackerName
from lapa.errors import UserError
from lapa.files import read_object, write_json

PROJECT = "lapa"
ID = "tracker.json"


class Backend(ABC):
    """What each tracker does. `step` is the number of finished steps, or of finished episodes."""

    @abstractmethod
    def __init__(self, folder: Path, run_id: str, title: str, config: Mapping[str, Any], first_step: int) -> None:
        """Opens the run of this id, or goes on with it from `first_step`."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def image(self, step: int, name: str, image: Image.Image) -> None: ...

    @abstractmethod
    def video(self, step: int, name: str, path: Path) -> None:
        """path: an MP4 file."""

    @abstractmethod
    def close(self) -> None: ...


class TensorBoard(Backend):
    """Event files in the run's folder, which are its id; what a resumed run does again replaces what it did."""

    def __init__(self, folder: Path, run_id: str, title: str, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._writer.add_image(name, np.array(image.convert("RGB")), step, dataformats="HWC")

    def video(self, step: int, name: str, path: Path) -> None:
        # TensorBoard shows a GIF as a moving image, and no MP4. SummaryWriter.add_video needs moviepy for the same.
        from tensorboard.compat.proto.summary_pb2 import Summary

        gif, (width, height) = _gif(path)
        shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=shown)]), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Backend):
    """A run at wandb.ai, or with WANDB_MODE=offline a folder for `wandb sync`."""

    def __init__(self, folder: Path, run_id: str, title: str, config: Mapping[str, Any], first_step: int) -> None:
        import wandb

        self._wandb = wandb
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(
            project=project, id=run_id, name=title, dir=str(folder), config=dict(config), resume="allow"
        )
        # wandb's own steps cannot go back, as those of a run that is resumed from its last checkpoint do.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({"step": step, name: self._wandb.Image(image)})

    def video(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, name: self._wandb.Video(str(path), format="mp4")})

    def close(self) -> None:
        self._run.finish()


class Trackio(Backend):
    """A run in trackio's database on this machine, or where TRACKIO_SPACE_ID names one, in a space of the hub."""

    def __init__(self, folder: Path, run_id: str, title: str, config: Mapping[str, Any], first_step: int) -> None:
        import trackio

        self._trackio = trackio
        # trackio knows a run by its name.
        self._run = trackio.init(
            project=PROJECT, name=f"{title}-{run_id}", config=dict(config), resume="allow", embed=False
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._trackio.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        # Unlike the run's own method, this is not repeated when the process ends.
        self._trackio.finish()


BACKENDS: dict[TrackerName, type[Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
INSTALL: dict[TrackerName, str] = {
    "tensorboard": "pip install 'lapa-vla[tensorboard]'",
    "wandb": "pip install 'lapa-vla[wandb]'",
    "trackio": "pip install trackio",
}


def require_tracker(name: TrackerName | None) -> None:
    """Raises UserError where the package of a tracker is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(f"--tracker {name}: is not installed; {INSTALL[name]}")


class Tracker:
    """Reports one run. Does nothing without a name, and from the first failure on, of which it warns.

    folder: of the run, where its id is kept, so that a resumed run goes on under it. title: the name that people see.
    config: the resolved config, as plain values. first_step: that of a resume, 0 for a new run.
    """

    def __init__(
        self, name: TrackerName | None, folder: Path, title: str, config: Mapping[str, Any], first_step: int = 0
    ) -> None:
        self.name = name
        self._backend: Backend | None = None
        if name is None:
            return
        try:
            run_id = _run_id(folder, resuming=first_step > 0)
            self._backend = BACKENDS[name](folder, run_id, title, config, first_step)
        except Exception as error:
            self._fail(error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            self._report("scalars", step, values)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._report("image", step, name, image)

    def video(self, step: int, name: str, path: Path) -> None:
        """path: an MP4 file."""
        self._report("video", step, name, path)

    def close(self) -> None:
        self._report("close")

    def _report(self, method: str, *arguments: Any) -> None:
        if self._backend is None:
            return
        try:
            getattr(self._backend, method)(*arguments)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._backend = None
        warn(f"--tracker {self.name} failed ({type(error).__name__}: {error}); the run goes on without it")


def _run_id(folder: Path, *, resuming: bool) -> str:
    """The id in the run's folder; a new one for a new run, and where a run began without a tracker."""
    path = folder / ID
    if resuming and path.exists():
        return read_object(path, "delete it to begin a new run there", id=str)["id"]
    run_id = secrets.token_hex(4)
    write_json(path, {"id": run_id})
    return run_id


def _gif(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A video as a GIF, and its width and height."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        images = [frame.to_image() for frame in container.decode(stream)]
        milliseconds = round(1000 / float(stream.average_rate or 1))
    gif = io.BytesIO()
    images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return gif.getvalue(), images[0].size
