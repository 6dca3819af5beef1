"""Images between the page and the models, and the frames of a dataset that the page offers.

Axes: H W image, C channel.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from lapa.data.dataset import Dataset
from lapa.data.lerobot import LeRobotDataset
from lapa.data.metadata import INFO
from lapa.data.spec import SOURCES, DataSpec
from lapa.data.transforms import decode_image
from lapa.errors import UserError

DATA_URL = re.compile(r"data:image/[a-z+.-]{1,20};base64,")
# Pixels of the longer side of the small images among which one is chosen, and of those of an export.
SMALL, SIDE = 128, 384


def from_page(given: Any, name: str = "image") -> np.ndarray:
    """Returns the image of a data URL, RGB [H, W, 3]. Raises UserError, which begins with `name`, where it is none."""
    if not isinstance(given, str) or not (match := DATA_URL.match(given)):
        raise UserError(f"{name}: not an image file; give a JPEG, PNG, BMP or WebP image")
    try:
        content = base64.b64decode(given[match.end() :], validate=True)
    # Also what is not ASCII.
    except ValueError:
        raise UserError(f"{name}: damaged on its way; choose it again") from None
    return decode_image(content, f"{name}: cannot be read")


def dataset_here(paths: Any, fingerprints: Any) -> Dataset | None:
    """Returns the first dataset folder with images that an artifact's config names and that is here as it was, or None.

    A config may be a stranger's: other sources, which may read the network or all of a disk, are not opened.
    paths, fingerprints: lists or the like, as the config has them.
    """
    known = fingerprints if isinstance(fingerprints, list | dict) else ()
    for path in paths if isinstance(paths, list) else []:
        try:
            spec = DataSpec.parse(str(path), SOURCES)
            # Path.is_file raises OSError for a name that is too long.
            if spec.source is not None or not os.path.isfile(Path(spec.path) / INFO):  # noqa: PTH113
                continue
            dataset = LeRobotDataset(Path(spec.path), spec.name)
        except UserError:
            continue
        if dataset.fingerprint in known and not dataset.coded:
            return dataset
    return None


def places_of(dataset: Dataset, num: int, room: int) -> list[tuple[int, int]]:
    """Returns at most `num` places (episode, frame), each of another episode, spread over the dataset.

    room: frames that should follow; a place lies a third into its episode, or earlier where fewer would follow.
    Raises UserError for a dataset without images.
    """
    if dataset.coded:
        raise UserError(f"{dataset.root}: has codes of images, and no images to show; give another --data")
    episodes = np.unique(np.linspace(0, len(dataset) - 1, min(num, len(dataset))).round().astype(int))
    return [
        (episode, max(0, min(length // 3, length - 1 - room)))
        for episode, length in zip(episodes.tolist(), dataset.lengths[episodes].tolist(), strict=True)
    ]
