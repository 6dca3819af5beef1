"""How much moves between frames, and where a film is cut, read off small grey pictures.

    thumbnails_THW = thumbnails(frames_THWC)
    motion_energy(thumbnails_THW, horizon)       # [T - horizon], 0 where nothing moves
    shots(thumbnails_THW)                        # [range(0, 96), range(96, 240)]

Axes: T time, H W image, C channel, P pairs of frames one horizon apart.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SIDE = 32
# A cut changes the picture by at least this much of its range, and by several times what changes around it.
CUT, TIMES_AROUND, AROUND = 0.12, 4.0, 5


def thumbnails(frames: Iterable[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "T SIDE SIDE"]:
    """Grey pictures of 32 pixels a side, each pixel the mean of what it stands for; one kilobyte a frame."""
    small = [
        np.asarray(Image.fromarray(frame_HWC).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
        for frame_HWC in frames
    ]
    return np.stack(small) if small else np.zeros((0, SIDE, SIDE), np.uint8)


def motion_energy(thumbnails_THW: UInt8[np.ndarray, "T H W"], horizon: int) -> Float[np.ndarray, "P"]:
    """The root mean square change of brightness, in [0, 1], between frames t and t + horizon.

    A camera's noise is mostly below 0.005; an object of a fiftieth of the picture that moves gives about 0.05.
    """
    pictures = thumbnails_THW.astype(np.float32) / 255
    if len(pictures) <= horizon:
        return np.zeros(0, np.float32)
    return np.sqrt(np.square(pictures[horizon:] - pictures[:-horizon]).mean(axis=(1, 2)))


def shots(thumbnails_THW: UInt8[np.ndarray, "T H W"]) -> list[range]:
    """The stretches of a film between its hard cuts; all of it where there is none. Dissolves are not found."""
    changes = motion_energy(thumbnails_THW, 1)
    starts = [0]
    for position in np.flatnonzero(changes >= CUT):
        around = np.concatenate([changes[max(0, position - AROUND) : position], changes[position + 1 :][:AROUND]])
        if not len(around) or changes[position] >= TIMES_AROUND * np.median(around):
            starts.append(int(position) + 1)
    ends = [*starts[1:], len(thumbnails_THW)]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]
