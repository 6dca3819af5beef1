"""What a dataset holds, as a table and as a picture: `lapa data info DATASET`."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image, ImageDraw
from rich.markup import escape
from rich.table import Table

from lapa.console import console, finish, say
from lapa.data.dataset import ACTION_SPACE, Dataset
from lapa.data.spec import open_dataset
from lapa.data.transforms import resize_and_crop
from lapa.files import atomic_path, is_remote

THUMBNAIL = 128
SHEET_EPISODES, SHEET_TIMES = 8, 6
SHOWN_TASKS = 10
CAPTION_HEIGHT = 14


@dataclass(frozen=True)
class InfoConfig:
    """Show what a dataset holds, and draw a contact sheet of it."""

    data: Annotated[str, tyro.conf.Positional]
    """The dataset. docs/1-data.md has the form: [NAME=][SOURCE:]PATH[,ACTION_SPACE=VALUE...][:WEIGHT]."""
    sheet: Path | None = None
    """PNG to draw the contact sheet to; by default contact_sheet.png in the dataset's folder, or, of a source in place
    and of a dataset elsewhere, NAME_contact_sheet.png here."""


def run(config: InfoConfig) -> None:
    """`lapa data info`."""
    dataset = open_dataset(config.data)
    console.print(summary(dataset))
    if dataset.coded:
        say("no contact sheet: it has codes of pictures, and no pictures")
        return
    ours = not (dataset.in_place or is_remote(dataset.root))
    sheet = config.sheet or (dataset.root / "contact_sheet.png" if ours else Path(f"{dataset.name}_contact_sheet.png"))
    with atomic_path(sheet) as temporary:
        contact_sheet(dataset).save(temporary)
    finish("contact sheet", sheet, [f"lapa latent train --data {shlex.quote(str(config.data))} --out LAM"])


def summary(dataset: Dataset) -> Table:
    """Episodes, frames, rate, tasks, features and sizes on disk."""
    seconds = dataset.num_frames / dataset.fps
    lengths = dataset.lengths
    table = Table(title=str(dataset.root), show_header=False, title_justify="left")
    table.add_row(
        "episodes", f"{len(lengths)}, of {lengths.min()} to {lengths.max()} frames (median {np.median(lengths):g})"
    )
    table.add_row("frames", f"{dataset.num_frames} at {dataset.fps:g} fps ({seconds:.1f} s in all)")
    for camera in dataset.cameras:
        height, width = dataset.image_shape(camera)
        table.add_row(f"camera {camera}", f"{width}x{height}{_codec(dataset, camera)}")
    table.add_row("action", _actions(dataset))
    table.add_row("state", _feature(dataset, "observation.state", "none"))
    counts = Counter(episode.instruction for episode in dataset.episodes)
    for number, (task, count) in enumerate(counts.most_common(SHOWN_TASKS)):
        table.add_row(f"{len(counts)} tasks" if number == 0 else "", escape(f"{task} ({count})"))
    if len(counts) > SHOWN_TASKS:
        table.add_row("", f"and {len(counts) - SHOWN_TASKS} more")
    sizes = {name: _megabytes(dataset.root / name) for name in ("videos", "data", "meta", "labels")}
    if any(sizes.values()):
        table.add_row("on disk", ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items() if size))
    table.add_row("fingerprint", dataset.fingerprint)
    if dataset.extra:
        table.add_row("made by", escape(_making(dataset.extra)))
    return table


def contact_sheet(dataset: Dataset, camera: str | None = None) -> Image.Image:
    """A row per episode (spread over the dataset), in it pictures from its first frame to its last."""
    rows = np.linspace(0, len(dataset.lengths) - 1, min(SHEET_EPISODES, len(dataset.lengths))).round().astype(int)
    height = THUMBNAIL + CAPTION_HEIGHT
    sheet = Image.new("RGB", (THUMBNAIL * SHEET_TIMES, height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, episode in enumerate(rows):
        times = np.linspace(0, dataset.lengths[episode] - 1, SHEET_TIMES).round().astype(int).tolist()
        thumbnails = resize_and_crop(dataset.frames(int(episode), times, camera), THUMBNAIL)
        for column, picture_HWC in enumerate(thumbnails):
            sheet.paste(Image.fromarray(picture_HWC), (column * THUMBNAIL, row * height + CAPTION_HEIGHT))
        # Pillow's built-in font lacks most scripts; what it lacks becomes a question mark.
        text = f"{episode}: {dataset.episodes[episode].instruction}".encode("latin-1", "replace").decode("latin-1")
        pen.text((2, row * height + 1), text, fill="black")
    return sheet


def _codec(dataset: Dataset, camera: str) -> str:
    """How a camera's pictures are encoded, where that is known."""
    feature = dataset.camera_feature(camera)
    # LeRobot has used both names for the details of a video.
    codec = (feature.get("info") or feature.get("video_info") or {}).get("video.codec")
    return f", {codec}" if codec else ""


def _actions(dataset: Dataset) -> str:
    space = dataset.action_space
    if space is None:
        return "none (video only)"
    names = [f"{name} (binary)" if binary else name for name, binary in zip(space.names, space.binary, strict=True)]
    control = f"{space.control} control" if space.control else "control not declared"
    return f"{space.action_dim} numbers: {', '.join(names)}; {control}"


def _feature(dataset: Dataset, name: str, absent: str) -> str:
    if name not in dataset.features:
        return absent
    feature = dataset.features[name]
    names = feature.get("names")
    told = f": {', '.join(map(str, names))}" if isinstance(names, list) else ""
    return f"{int(np.prod(feature['shape']))} numbers{told}"


def _making(extra: dict[str, Any]) -> str:
    """The command that wrote a dataset, and its settings."""
    settings = ", ".join(f"{name} {value}" for name, value in extra.items() if name not in ("made_by", ACTION_SPACE))
    return f"{extra.get('made_by', 'unknown')}: {settings}"


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
