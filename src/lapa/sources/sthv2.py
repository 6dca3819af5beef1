"""Something-Something v2: short webm videos of hands that do something with something, and a sentence for each.

    lapa data sthv2 20bn-something-something-v2/ --labels labels/train.json --out data/sthv2
    lapa latent train --data sthv2:20bn-something-something-v2,split=validation --out LAM

A label is {id, label, template, placeholders}; those of the test split have an id only. Goyal et al., ICCV 2017,
arXiv 1706.04261; https://www.qualcomm.com/developer/software/something-something-v-2-dataset
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lapa.console import warn
from lapa.data.config import ConvertOptions
from lapa.data.source import Item, Reading, Source
from lapa.data.video import probe
from lapa.errors import UserError
from lapa.files import read_json, whole_characters
from lapa.sources.folder_scan import find_videos, natural_order, require_rate, short_names
from lapa.sources.videos import CAMERA, VideoFilesSource

# Names that the labels have been published under, in the folder of the videos, next to it, or in `labels`.
LABELS = ("{split}.json", "something-something-v2-{split}.json")


@dataclass(frozen=True)
class Sthv2Reading(Reading):
    """Something-Something v2, each video an episode."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder with the webm videos; folders inside it are searched too."""
    labels: str | None = None
    """JSON with the labels; by default those of the split, in the folder, next to it, or in a folder `labels` there."""
    split: Literal["train", "validation", "test"] = "train"
    """Which labels to take where --labels is not given; those of test have no text."""
    caption: str | None = None
    """One text for videos without label."""
    fps: float = 12.0
    """Frames a second at which the videos are read; all are stored at 12."""
    skip_bad: bool = False
    """Leave out, and count, videos that cannot be read; otherwise the first stops the command."""

    def open(self) -> Source:
        return Sthv2Source(self)


@dataclass(frozen=True)
class Sthv2Config(ConvertOptions, Sthv2Reading):
    """Turn Something-Something v2 into a dataset without actions."""


class Sthv2Source(VideoFilesSource):
    """Something-Something v2."""

    kind = "sthv2"

    def __init__(self, reading: Sthv2Reading):
        require_rate(reading.fps)
        self.root, names = find_videos(reading.folder)
        labels = Path(reading.labels) if reading.labels is not None else _find_labels(self.root, reading.split)
        texts = _read_labels(labels)
        videos, _ = short_names(names, without_suffix=True)
        self.items = [
            Item(videos[name], (), text or whole_characters(reading.caption or ""))
            for name, text in sorted(texts.items(), key=lambda entry: natural_order(entry[0]))
            if name in videos
        ]
        if not self.items:
            raise UserError(
                f"{self.root}: holds none of the {len(texts)} videos that {labels} names; give their folder"
            )
        if num_missing := len(texts) - len(self.items):
            warn(f"videos missing: {num_missing} of the {len(texts)} that {labels} names")
        num_bare = sum(not item.instruction for item in self.items)
        self.notes = {"videos missing that the labels name": num_missing, "videos without label": num_bare}
        if num_bare:
            warn(f"videos without label: {num_bare} of {len(self.items)}; --caption TEXT gives them one")
        self.name, self.fps, self.skip_bad, self.inputs = "sthv2", reading.fps, reading.skip_bad, (labels,)
        self.cameras = {CAMERA: self._first_size()}
        self.settings = {"folder": self.root.resolve().name, "labels": labels.name, "text": "label"}

    def _first_size(self) -> tuple[int, int]:
        """Returns height and width of the first video; with `skip_bad`, of the first that can be read."""
        for item in self.items:
            try:
                header = probe(self.path_of(item))
            except UserError:
                if not self.skip_bad:
                    raise
            else:
                return header.height, header.width
        raise UserError(f"{self.root}: none of its videos can be read")


def _read_labels(path: Path) -> dict[str, str]:
    """Reads the label of each video by its id, "" without. Raises UserError naming the file and the entry."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: is no list of labels ({{id, label, template, placeholders}})")
    texts: dict[str, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
            raise UserError(f"{path}: entry {number} has no id")
        name = str(entry["id"])
        if name in texts:
            raise UserError(f"{path}: entry {number}: {name} comes twice; remove one")
        texts[name] = _text(entry, f"{path}: entry {number}")
    return texts


def _text(entry: dict[str, Any], where: str) -> str:
    """Returns the label, such as "holding cup next to book", or else the template with its placeholders filled in."""
    label, template, placeholders = entry.get("label", ""), entry.get("template", ""), entry.get("placeholders", [])
    strings = isinstance(label, str) and isinstance(template, str) and isinstance(placeholders, list)
    if not strings or not all(isinstance(name, str) for name in placeholders):
        raise UserError(f"{where}: label, template and placeholders are not texts")
    if label:
        return label.strip()
    # [something] or [number of] stand for the placeholders, one after another.
    first, *parts = template.split("[")
    filled = [first]
    for number, part in enumerate(parts):
        slot, _, rest = part.partition("]")
        filled.append((placeholders[number] if number < len(placeholders) else slot) + rest)
    return "".join(filled).strip()


def _find_labels(root: Path, split: str) -> Path:
    folders = (root, root / "labels", root.resolve().parent, root.resolve().parent / "labels")
    names = [name.format(split=split) for name in LABELS]
    for path in (folder / name for folder in folders for name in names):
        if path.is_file():
            return path
    raise UserError(
        f"{root}: found no labels ({' or '.join(names)}) in it, next to it or in `labels`; give --labels FILE"
    )
