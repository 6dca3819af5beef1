"""Folders of numbered images, each folder an episode, as LAPA's released code stores Something-Something v2.

    lapa data frames frames/ --captions captions.json --fps 12 --out data/frames
    lapa latent train --data frames:frames,caption=play --out LAM

`frames/78687/img_0001.jpg` is the first image of clip `78687`: images are in the order of the last number in their
names (https://github.com/LatentActionPretraining/LAPA, laq/laq_model/data.py).
Axes: T time, H W image, C channel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_low

import numpy as np
from jaxtyping import UInt8

from lapa.console import say, warn
from lapa.data.config import ConvertOptions
from lapa.data.source import Clip, Item, Source
from lapa.data.transforms import has_16_bits, read_image
from lapa.errors import UserError
from lapa.files import find_files
from lapa.sources.captions import CaptionedReading
from lapa.sources.folder_scan import natural_order, require_folder, require_rate, stop_or_skip, walk
from lapa.sources.videos import CAMERA

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
NUMBER = re.compile(r"([0-9]+)[^0-9]*$")


@dataclass(frozen=True)
class FramesReading(CaptionedReading):
    """Folders of numbered images, each an episode."""

    fps: float = 12.0
    """Images a second, which the files do not contain. 12 is the rate of Something-Something v2."""

    def open(self) -> Source:
        return FramesSource(self)


@dataclass(frozen=True)
class FramesConfig(ConvertOptions, FramesReading):
    """Turn folders of numbered images into a dataset without actions."""


@dataclass(frozen=True, slots=True)
class _Folder:
    """A clip's folder. parts: (first image, number of images, "first-last number") of each stretch without gap."""

    parts: tuple[tuple[int, int, str], ...] = ()
    missing: int = 0
    problem: str = ""


class FramesSource(Source):
    """Folders of numbered images. An item is a stretch of one: place = (folder, first image, number of images)."""

    kind = "frames"

    def __init__(self, reading: FramesReading):
        require_rate(reading.fps)
        self.root, self.fps = require_folder(reading.folder, "folders of images"), reading.fps
        self.name, self.inputs = self.root.resolve().name, reading.inputs
        # Where numbers are missing, a new episode begins.
        self.settings = reading.settings(self.name, gaps="cut")
        folders = _list_folders(self.root, reading.inputs)
        self.notes = notes = Counter[str]()
        instructions, skipped = reading.find_captions(list(folders), "clip", notes)
        self.items = items = []
        problems, with_gaps, missing = [], 0, 0
        for folder, clip in folders.items():
            if folder not in instructions:
                continue
            if clip.problem:
                problems.append(f"{self.root / folder}: {clip.problem}")
                continue
            with_gaps, missing = with_gaps + bool(clip.missing), missing + clip.missing
            for first, length, numbers in clip.parts:
                key = f"{folder}#{numbers}" if len(clip.parts) > 1 else folder
                items.append(Item(key, (folder, first, length), instructions[folder], length))
        bad = stop_or_skip(problems, "--skip-bad leaves such clips out", reading.skip_bad)
        notes.update({"clips whose numbers come twice, left out": bad})
        notes.update({"clips with gaps in their numbers, cut there": with_gaps, "images missing in these": missing})
        skipped += bad
        if skipped:
            warn(f"entries skipped in all (--skip-bad): {skipped}")
        if with_gaps:
            warn(f"clips with gaps in their numbers, cut there: {with_gaps}; missing images: {missing}")
        if not items:
            raise UserError(f"{self.root}: no clip of it can be used")
        self.cameras = {CAMERA: self._first_size()}

    def file_of(self, item: Item) -> str:
        return str(self.root / item.place[0])

    def read(self, item: Item) -> Clip:
        """Reads the images; a damaged one is left out, and counted as lost."""
        clip = Clip({}, item.instruction)

        def frames() -> Iterator[tuple[float, np.ndarray]]:
            for number, path in enumerate(self._paths(item)):
                try:
                    frame_HWC = read_image(path)
                except UserError as error:
                    clip.lost += 1
                    clip.damage = clip.damage or str(error)
                    continue
                yield number / self.fps, frame_HWC

        clip.frames = {CAMERA: frames()}
        return clip

    def frames(self, item: Item, frame_indices: Sequence[int], camera: str) -> UInt8[np.ndarray, "T H W 3"]:
        paths = self._paths(item)
        frames = [read_image(paths[index]) for index in frame_indices]
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
        images = sorted(
            (path.name for path in find_files(folder, "*") if _is_image(path.name)),
            key=lambda name: (_number(name), natural_order(name)),
        )
        if len(images) < first + length:
            raise UserError(f"{folder}: holds {len(images)} images, {first + length} when the command began")
        return [folder / image for image in images[first : first + length]]

    def _first_size(self) -> tuple[int, int]:
        """Returns height and width of the first image that can be read."""
        for item in self.items:
            for path in self._paths(item):
                try:
                    size = read_image(path).shape[:2]
                except UserError:
                    continue
                if has_16_bits(path):
                    warn(f"{path}: is grey of 16 bits, such as depth: each is scaled by the bits that its values use")
                return size
        raise UserError(f"{self.root}: none of its images can be decoded")


def _list_folders(root: Path, others: Sequence[Path]) -> dict[str, _Folder]:
    """Returns the folders that hold numbered images, by the names of these alone: there may be millions.

    others: files that are used, too, and not counted as ignored.
    """
    folders, num_ignored = {}, -sum(path.resolve().is_relative_to(root.resolve()) for path in others)
    for folder, names in walk(root):
        images = [name for name in names if _is_image(name)]
        num_ignored += len(names) - len(images)
        if images:
            folders[folder or "."] = _without_gaps(sorted(map(_number, images)))
    if not folders:
        raise UserError(f"{root}: no folder of it holds numbered images ({', '.join(SUFFIXES)})")
    if num_ignored > 0:
        say(f"ignored: {num_ignored} files that are no images with a number in their names")
    return folders


def _without_gaps(numbers: list[int]) -> _Folder:
    """Returns a clip by the numbers of its images. Where only each second or fifth image was kept, that is no gap."""
    steps = [other - one for one, other in pairwise(numbers)]
    if 0 in steps:
        twice = numbers[steps.index(0)]
        return _Folder(problem=f"has two images of number {twice}; give each clip a folder of its own")
    usual = median_low(steps) if steps else 1
    starts = [0, *(place + 1 for place, step in enumerate(steps) if step > 1.5 * usual)]
    ends = [*starts[1:], len(numbers)]
    parts = tuple(
        (start, end - start, f"{numbers[start]}-{numbers[end - 1]}") for start, end in zip(starts, ends, strict=True)
    )
    return _Folder(parts, sum(round(step / usual) - 1 for step in steps if step > 1.5 * usual))


def _is_image(name: str) -> bool:
    stem, _, suffix = name.rpartition(".")
    return f".{suffix.lower()}" in SUFFIXES and not name.startswith(".") and NUMBER.search(stem) is not None


def _number(name: str) -> int:
    found = NUMBER.search(name.rpartition(".")[0])
    assert found
    return int(found[1])
