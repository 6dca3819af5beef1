"""Folders of numbered pictures, each folder an episode, as LAPA's released code has Something-Something v2.

    lapa data frames frames/ --captions captions.json --fps 12 --out data/frames
    lapa latent train --data frames:frames,caption=play --out LAM

`frames/78687/img_0001.jpg` is the first picture of clip `78687`; the last number in a name counts, whatever stands
before it (https://github.com/LatentActionPretraining/LAPA, laq/laq_model/data.py).
Axes: T time, H W image, C channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from typing import Annotated, Literal

import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image

from lapa.console import say, warn
from lapa.data import convert
from lapa.data.convert import ConvertOptions
from lapa.data.source import Clip, Item, Source
from lapa.errors import UserError
from lapa.files import reading as reading_file
from lapa.sources.folder_scan import judge, natural, require_folder, require_rate, walk
from lapa.sources.video_files import CAMERA
from lapa.sources.videos import find_captions

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
NUMBER = re.compile(r"([0-9]+)[^0-9]*$")


@dataclass(frozen=True)
class FramesReading:
    """Folders of numbered pictures, each an episode."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder with a folder for each clip, which holds its pictures."""
    captions: str | None = None
    """JSON {clip: text}, JSONL or CSV with the columns file and text (or caption, or instruction)."""
    caption: str | None = None
    """One text for every clip; with --captions, for those that have none there."""
    fps: float = 12.0
    """Pictures a second; the files do not say. 12 is that of Something-Something v2."""
    gaps: Literal["cut", "close", "leave-out"] = "cut"
    """Where numbers are missing: begin a new episode, go on as if nothing were missing, or leave the clip out."""
    skip_bad: bool = False
    """Leave out, and count, clips whose numbers are no order, clips without caption and captions without clip."""

    def open(self) -> Source:
        """Lists all folders. UserError naming the file that is wrong and the mend."""
        return _open(self)


@dataclass(frozen=True)
class FramesConfig(ConvertOptions, FramesReading):
    """Turn folders of numbered pictures into a dataset without actions."""


class FramesSource(Source):
    """Folders of numbered pictures. An item is a stretch of one: place = (folder, first picture, number of them)."""

    kind = "frames"

    def file_of(self, item: Item) -> str:
        return str(self.root / item.place[0])

    def read(self, item: Item) -> Clip:
        """The pictures; one that is damaged is passed over, and counted as lost."""
        clip = Clip({}, item.instruction)

        def frames() -> Iterator[tuple[float, np.ndarray]]:
            for number, path in enumerate(self._paths(item)):
                try:
                    frame_HWC = read_picture(path)
                except ValueError as error:
                    clip.lost += 1
                    clip.damage = clip.damage or str(error)
                    continue
                yield number / self.fps, frame_HWC

        clip.frames = {CAMERA: frames()}
        return clip

    def pictures(self, item: Item, frame_indices: Sequence[int], camera: str) -> UInt8[np.ndarray, "T H W 3"]:
        paths = self._paths(item)
        frames = [read_picture(paths[index]) for index in frame_indices]
        for index, frame_HWC in zip(frame_indices, frames, strict=True):
            if frame_HWC.shape != frames[0].shape:
                raise UserError(
                    f"{paths[index]}: is of another size than {paths[frame_indices[0]].name}; "
                    "`lapa data frames` scales them to one"
                )
        return np.stack(frames)

    def _paths(self, item: Item) -> list[Path]:
        name, first, length = item.place
        folder = self.root / name
        with reading_file(folder):
            pictures = sorted((path.name for path in folder.iterdir() if _is_picture(path.name)), key=_order)
        if len(pictures) < first + length:
            raise UserError(f"{folder}: holds {len(pictures)} pictures, {first + length} when the command began")
        return [folder / picture for picture in pictures[first : first + length]]


def run(config: FramesConfig) -> None:
    """`lapa data frames`."""
    convert.run(config, config)


def read_picture(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """A picture file as RGB. UserError naming it where it cannot be decoded."""
    try:
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            return np.asarray(image.convert("RGB"))
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        told = "empty, zero bytes" if path.exists() and not path.stat().st_size else f"no picture ({error})"
        raise UserError(f"{path}: {told}; replace it or take it out") from None


def _open(reading: FramesReading) -> FramesSource:
    require_rate(reading.fps)
    source = FramesSource()
    source.root = require_folder(reading.folder, "folders of pictures")
    source.name, source.fps = source.root.resolve().name, reading.fps
    folders = _list_folders(source.root)
    instructions, skipped = find_captions(reading, list(folders), "clip")
    items: list[Item] = []
    wrong, with_gaps, missing = [], 0, 0
    for folder, clip in folders.items():
        if folder not in instructions:
            continue
        if clip.wrong:
            wrong.append(f"{source.root / folder}: {clip.wrong}")
            continue
        with_gaps, missing = with_gaps + bool(clip.missing), missing + clip.missing
        if clip.missing and reading.gaps == "leave-out":
            continue
        parts = clip.parts if reading.gaps == "cut" else ((0, clip.parts[-1][0] + clip.parts[-1][1], ""),)
        for first, length, numbers in parts:
            key = f"{folder}#{numbers}" if len(parts) > 1 else folder
            items.append(Item(key, (folder, first, length), instructions[folder], length))
    skipped += judge(wrong, "--skip-bad leaves such clips out", reading.skip_bad)
    if skipped:
        warn(f"entries skipped in all (--skip-bad): {skipped}")
    if with_gaps:
        done = {"cut": "cut there", "close": "joined as if nothing were missing", "leave-out": "left out"}
        warn(f"clips with gaps in their numbers, {done[reading.gaps]}: {with_gaps}; missing pictures: {missing}")
    if not items:
        raise UserError(f"{source.root}: no clip of it can be used")
    source.items = items
    source.cameras = {CAMERA: _first_size(source)}
    source.inputs = () if reading.captions is None else (Path(reading.captions),)
    settings = {
        "folder": source.name,
        "captions": reading.captions and Path(reading.captions).name,
        "caption": reading.caption,
        "gaps": reading.gaps,
    }
    source.settings = {name: value for name, value in settings.items() if value}
    return source


@dataclass(frozen=True, slots=True)
class _Folder:
    """A clip's folder. parts: (first picture, number of pictures, "first-last number") of each stretch without gap."""

    parts: tuple[tuple[int, int, str], ...] = ()
    missing: int = 0
    wrong: str = ""


def _list_folders(root: Path) -> dict[str, _Folder]:
    """The folders that hold numbered pictures. There may be millions of pictures: only their numbers are looked at."""
    folders, aside = {}, 0
    for folder, names in walk(root):
        pictures = [name for name in names if _is_picture(name)]
        aside += len(names) - len(pictures)
        if pictures:
            folders[folder or "."] = _look_at(sorted(map(_number, pictures)))
    if not folders:
        raise UserError(f"{root}: no folder of it holds numbered pictures ({', '.join(FORMATS)})")
    if aside:
        say(f"left aside: {aside} files that are no pictures with a number in their names")
    return folders


def _look_at(numbers: list[int]) -> _Folder:
    """A clip by the numbers of its pictures. Where only each second or fifth picture was kept, that is no gap."""
    steps = [other - one for one, other in pairwise(numbers)]
    if 0 in steps:
        twice = numbers[steps.index(0)]
        return _Folder(wrong=f"has two pictures of number {twice}; give each clip a folder of its own")
    usual = median_low(steps) if steps else 1
    starts = [0, *(place + 1 for place, step in enumerate(steps) if step > 1.5 * usual)]
    ends = [*starts[1:], len(numbers)]
    parts = tuple(
        (start, end - start, f"{numbers[start]}-{numbers[end - 1]}") for start, end in zip(starts, ends, strict=True)
    )
    return _Folder(parts, sum(round(step / usual) - 1 for step in steps if step > 1.5 * usual))


def _first_size(source: FramesSource) -> tuple[int, int]:
    """Height and width of the first picture that can be read."""
    for item in source.items:
        for path in source._paths(item):
            try:
                return read_picture(path).shape[:2]
            except ValueError:
                continue
    raise UserError(f"{source.root}: none of its pictures can be decoded")


def _is_picture(name: str) -> bool:
    stem, _, suffix = name.rsplit("/", 1)[-1].rpartition(".")
    return f".{suffix.lower()}" in FORMATS and not stem.startswith(".") and NUMBER.search(stem) is not None


def _number(name: str) -> int:
    found = NUMBER.search(name.rpartition(".")[0])
    assert found
    return int(found[1])


def _order(name: str) -> tuple[int, tuple[str, str]]:
    return _number(name), natural(name)
