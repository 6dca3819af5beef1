"""Content of a dataset, as a table and as a contact sheet of its images: `lapa data info DATASET`."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from lapa.console import finish, print_results, say
from lapa.data.config import InfoConfig
from lapa.data.convert import SAMPLED_FRAMES, report_repeated, sample
from lapa.data.dataset import ACTION_SPACE, STATE, Dataset, dimension_names
from lapa.data.spec import open_dataset
from lapa.data.transforms import resize_and_crop
from lapa.drawing import CELL, Row, grid
from lapa.errors import printable
from lapa.files import atomic_path, find_files, is_remote

SHEET_EPISODES, SHEET_TIMES = 8, 6
SHOWN_TASKS, SHOWN_LETTERS = 10, 200


def run(config: InfoConfig) -> None:
    """`lapa data info`."""
    dataset = open_dataset(config.data)
    dataset.require_files([dataset.camera_name()])
    print_results(facts(dataset), summary(dataset), as_json=config.json)
    _report_repeated(dataset)
    if dataset.coded:
        say("no contact sheet: the dataset holds codes of images, not images")
        return
    ours = not (dataset.in_place or is_remote(dataset.root))
    sheet = config.sheet or (dataset.root / "contact_sheet.png" if ours else Path(f"{dataset.name}_contact_sheet.png"))
    with atomic_path(sheet) as temporary:
        contact_sheet(dataset).save(temporary)
    finish("contact sheet", sheet, [f"lapa latent train --data {shlex.quote(str(config.data))} --out LAM"])


def _report_repeated(dataset: Dataset) -> None:
    if not dataset.coded:
        lengths = {episode: min(SAMPLED_FRAMES, length) for episode, length in enumerate(dataset.lengths.tolist())}
        films = (dataset.frames(episode, range(lengths[episode])) for episode in sample(list(lengths)))
        report_repeated(films, dataset.fps, dataset.fps)


def facts(dataset: Dataset) -> dict[str, Any]:
    """What a dataset holds, for programs."""
    return {
        "dataset": str(dataset.root),
        "episodes": len(dataset),
        "frames": dataset.num_frames,
        "fps": dataset.fps,
        "cameras": {camera: list(dataset.image_shape(camera)) for camera in dataset.cameras},
        "action": None if dataset.action_space is None else list(dataset.action_space.names),
        "state_dim": dataset.state_dim,
        "tasks": dict(Counter(episode.instruction for episode in dataset)),
        "fingerprint": dataset.fingerprint,
        "extra": dataset.extra,
    }


def summary(dataset: Dataset) -> Table:
    """Returns a table of episodes, frames, rate, tasks, features and sizes on disk."""
    lengths, seconds = dataset.lengths, dataset.num_frames / dataset.fps
    table = Table(title=printable(dataset.root), show_header=False, title_justify="left")

    def row(name: str, text: str) -> None:
        table.add_row(printable(name), printable(text))

    spread = f"{lengths.min()} to {lengths.max()} frames (median {np.median(lengths):g})"
    row("episodes", f"{len(dataset)}, of {spread}")
    row("frames", f"{dataset.num_frames} at {dataset.fps:g} fps ({seconds:.1f} s in all)")
    for camera in dataset.cameras:
        height, width = dataset.image_shape(camera)
        feature = dataset.camera_feature(camera)
        # LeRobot has used both names for the details of a video.
        codec = (feature.get("info") or feature.get("video_info") or {}).get("video.codec")
        row(f"camera {camera}", f"{width}x{height}{f', {codec}' if codec else ''}")
    row("action", _actions(dataset))
    row("state", _states(dataset))
    counts = Counter(episode.instruction for episode in dataset)
    if bare := counts.pop("", 0):
        row("no instruction", f"{bare} episodes")
    for number, (task, count) in enumerate(counts.most_common(SHOWN_TASKS)):
        row(f"{len(counts)} task{'s' * (len(counts) > 1)}" if number == 0 else "", f"{task[:SHOWN_LETTERS]} ({count})")
    if len(counts) > SHOWN_TASKS:
        row("", f"and {len(counts) - SHOWN_TASKS} more")
    sizes = {
        name: sum(path.stat().st_size for path in find_files(dataset.root / name, "**/*") if path.is_file()) / 1e6
        for name in ("videos", "data", "meta", "labels")
    }
    if any(sizes.values()):
        row("on disk", ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items() if size))
    row("fingerprint", dataset.fingerprint)
    if extra := dataset.extra:
        # The option `actions` is that of the command; what the dataset holds is in the rows above.
        settings = ", ".join(
            f"{name} {value}" for name, value in extra.items() if name not in ("made_by", "actions", ACTION_SPACE)
        )
        row("made by", f"{extra.get('made_by', 'unknown')}: {settings}")
    return table


def contact_sheet(dataset: Dataset, camera: str | None = None) -> Image.Image:
    """Draws one row per episode (spread over the dataset), with images from its first frame to its last."""
    rows = np.linspace(0, len(dataset) - 1, min(SHEET_EPISODES, len(dataset))).round().astype(int)
    drawn = []
    for episode in map(int, rows):
        times = np.linspace(0, dataset.lengths[episode] - 1, SHEET_TIMES).round().astype(int).tolist()
        thumbnails = list(resize_and_crop(dataset.frames(episode, times, camera), CELL))
        captions = [f"{time / dataset.fps:.1f} s" for time in times]
        drawn.append(
            Row(f"episode {episode}: {dataset.episodes[episode].instruction or 'no instruction'}", thumbnails, captions)
        )
    return grid(drawn, f"{dataset.name}: {len(dataset)} episodes")


def _actions(dataset: Dataset) -> str:
    space = dataset.action_space
    if space is None:
        return "none (video only)"
    names = [f"{name} (binary)" if binary else name for name, binary in zip(space.names, space.binary, strict=True)]
    control = f"{space.control} control" if space.control else "control not declared"
    return f"{space.action_dim} numbers: {', '.join(names)}; {control}"


def _states(dataset: Dataset) -> str:
    if dataset.state_dim is None:
        return "none"
    return f"{dataset.state_dim} numbers: {', '.join(dimension_names(dataset.features[STATE], 'state'))}"
