"""Something-Something v2: short webm films of hands that do something with something, and a sentence for each.

    lapa data sthv2 20bn-something-something-v2/ --labels labels/train.json --out data/sthv2
    lapa latent train --data sthv2:20bn-something-something-v2,split=validation --out LAM

A label is {id, label, template, placeholders}; those of the test split have an id only. Goyal et al., ICCV 2017,
arXiv 1706.04261; https://www.qualcomm.com/developer/software/something-something-v-2-dataset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lapa.console import warn
from lapa.data import convert
from lapa.data.convert import ConvertOptions
from lapa.data.source import Item, Source
from lapa.data.video import probe
from lapa.errors import UserError
from lapa.files import read_json
from lapa.sources.folder_scan import find_films, natural, require_rate, unambiguous
from lapa.sources.video_files import CAMERA, FilmSource

# Names that the labels have been published under, in the folder of the videos, beside it, or in `labels`.
LABELS = ("{split}.json", "something-something-v2-{split}.json")


@dataclass(frozen=True)
class Sthv2Reading:
    """Something-Something v2, each film an episode."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder with the webm films; folders inside it are searched too."""
    labels: str | None = None
    """JSON with the labels; by default that of the split, in the folder, beside it, or in a folder `labels` there."""
    split: Literal["train", "validation", "test"] = "train"
    """Which labels to take where --labels does not say; those of test have no text."""
    text: Literal["label", "template"] = "label"
    """What becomes the instruction: the label ("holding cup next to book"), or its template without brackets."""
    caption: str | None = None
    """One text for films without label."""
    fps: float = 12.0
    """Frames a second at which the films are read; all are stored at 12."""
    skip_bad: bool = False
    """Leave out, and count, films that cannot be read; otherwise the first stops the command."""

    def open(self) -> Source:
        """Reads the labels and the names of the films. UserError naming the file that is wrong and the mend."""
        return _open(self)


@dataclass(frozen=True)
class Sthv2Config(ConvertOptions, Sthv2Reading):
    """Turn Something-Something v2 into a dataset without actions."""


class Sthv2Source(FilmSource):
    """Something-Something v2."""

    kind = "sthv2"


def run(config: Sthv2Config) -> None:
    """`lapa data sthv2`."""
    convert.run(config, config)


def _open(reading: Sthv2Reading) -> Sthv2Source:
    require_rate(reading.fps)
    root, names = find_films(reading.folder)
    labels = Path(reading.labels) if reading.labels is not None else _find_labels(root, reading.split)
    texts = read_labels(labels, reading.text)
    films, _ = unambiguous(names)
    items = [
        Item(films[film], (), text or reading.caption or "")
        for film, text in sorted(texts.items(), key=lambda entry: natural(entry[0]))
        if film in films
    ]
    if not items:
        raise UserError(f"{root}: holds none of the {len(texts)} films that {labels} names; give their folder")
    if len(items) < len(texts):
        warn(f"films missing: {len(texts) - len(items)} of the {len(texts)} that {labels} names")
    untold = sum(not item.instruction for item in items)
    if untold:
        warn(f"films without label: {untold} of {len(items)}; --caption TEXT gives them one")
    source = Sthv2Source()
    source.root, source.name, source.fps = root, "sthv2", reading.fps
    source.skip_bad = reading.skip_bad
    source.cameras = {CAMERA: _first_size(root, items, reading.skip_bad)}
    source.items, source.inputs = items, (labels,)
    source.settings = {"folder": root.resolve().name, "labels": labels.name, "text": reading.text}
    return source


def _first_size(root: Path, items: Sequence[Item], skip_bad: bool) -> tuple[int, int]:
    """Height and width of the first film; of the first that can be read with `skip_bad`."""
    for item in items:
        try:
            header = probe(root / item.key)
        except ValueError:
            if not skip_bad:
                raise
        else:
            return header.height, header.width
    raise UserError(f"{root}: none of its films can be read")


def read_labels(path: Path, text: Literal["label", "template"] = "label") -> dict[str, str]:
    """The text of each film by its id; "" where it has none. UserError naming the file and the entry."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: is no list of labels ({{id, label, template, placeholders}})")
    texts: dict[str, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
            raise UserError(f"{path}: entry {number} has no id")
        name = str(entry["id"])
        if name in texts:
            raise UserError(f"{path}: entry {number}: {name} comes twice; take one out")
        texts[name] = _text(entry, text, f"{path}: entry {number}")
    return texts


def _text(entry: dict[str, Any], text: str, where: str) -> str:
    label, template, placeholders = entry.get("label", ""), entry.get("template", ""), entry.get("placeholders", [])
    strings = isinstance(label, str) and isinstance(template, str) and isinstance(placeholders, list)
    if not strings or not all(isinstance(name, str) for name in placeholders):
        raise UserError(f"{where}: label, template and placeholders are not texts")
    if text == "label" and label:
        return label.strip()
    if text == "label":
        # [something] or [number of] stand for the placeholders, one after another.
        parts = template.split("[")
        filled = [parts[0]]
        for number, part in enumerate(parts[1:]):
            slot, _, rest = part.partition("]")
            filled.append((placeholders[number] if number < len(placeholders) else slot) + rest)
        return "".join(filled).strip()
    return template.replace("[", "").replace("]", "").strip()


def _find_labels(root: Path, split: str) -> Path:
    folders = (root, root / "labels", root.resolve().parent, root.resolve().parent / "labels")
    found = [folder / name.format(split=split) for folder in folders for name in LABELS]
    for path in found:
        if path.is_file():
            return path
    told = " or ".join(name.format(split=split) for name in LABELS)
    raise UserError(f"{root}: found no labels ({told}) in it, beside it or in `labels`; give --labels FILE")
