"""How much moves between frames, and where a film is cut, read off small grey pictures.

    thumbnails_THW = thumbnails(frames_THWC)
    motion_energy(thumbnails_THW, horizon)       # [T - horizon], 0 where nothing moves
    shots(thumbnails_THW)                        # [range(0, 96), range(96, 240)]

Axes: T time, H W image, C channel, P pairs of frames one horizon apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SIDE = 32
# A cut is a change, of the picture as a whole or of its quieter half (which no moving arm or hand reaches), of at
# least this much of the brightness' range, and of several times what else changes within AROUND frames. The greatest
# of those changes may be a cut itself; the second is what the film is like, pictures that come twice included.
CUT, QUIET_CUT = 0.08, 0.055
TIMES_AROUND, AROUND = 2.2, 10
# A flash: some frame within FLASH after is nearer to one before than this part of the change. No cut.
FLASH, UNDONE = 5, 0.5


def thumbnail(frame_HWC: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "SIDE SIDE"]:
    """A grey picture of 32 pixels a side, each pixel the mean of what it stands for; one kilobyte."""
    return np.asarray(Image.fromarray(frame_HWC).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def thumbnails(frames: Iterable[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "T SIDE SIDE"]:
    """The thumbnail of each frame."""
    small = [thumbnail(frame_HWC) for frame_HWC in frames]
    return np.stack(small) if small else np.zeros((0, SIDE, SIDE), np.uint8)


def motion_energy(thumbnails_THW: UInt8[np.ndarray, "T H W"], horizon: int) -> Float[np.ndarray, "P"]:
    """The root mean square change of brightness, in [0, 1], between frames t and t + horizon.

    A camera's noise is mostly below 0.005; an object of a fiftieth of the picture that moves gives about 0.05.
    """
    pictures = thumbnails_THW.astype(np.float32) / 255
    if len(pictures) <= horizon:
        return np.zeros(0, np.float32)
    return np.sqrt(np.square(pictures[horizon:] - pictures[:-horizon]).mean(axis=(1, 2)))


class MotionMeter:
    """The greatest motion energy between frames one horizon apart, of frames that pass by.

    greatest: so far; where fewer frames came, that between the first and the last.
    """

    def __init__(self, horizon: int):
        self._recent: deque[np.ndarray] = deque(maxlen=horizon + 1)
        self._greatest: float | None = None

    def add(self, small_HW: UInt8[np.ndarray, "H W"]) -> None:
        """Takes in a frame's thumbnail."""
        self._recent.append(small_HW)
        if len(self._recent) == self._recent.maxlen:
            self._greatest = max(self._greatest or 0.0, _change(self._recent[0], small_HW))

    @property
    def greatest(self) -> float:
        """In [0, 1]; 0 where nothing moved or a single frame came."""
        if self._greatest is None:
            return _change(self._recent[0], self._recent[-1]) if self._recent else 0.0
        return self._greatest


def shots(thumbnails_THW: UInt8[np.ndarray, "T H W"]) -> list[range]:
    """The stretches of a film between its hard cuts; all of it where there is none.

    Flashes, pans and shots shorter than five frames are not taken for cuts; dissolves are not found. Measured: of the
    132 ways to join two of twelve real clips (RT-1, CALVIN), which the thresholds were chosen on, all joins are found
    with no false cut; of 200 random joins of 75 BridgeData films, which they were not, the same.
    """
    numbers = np.array(list(shot_numbers(thumbnails_THW)), np.int64)
    starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True)]


def shot_numbers(small_pictures: Iterable[UInt8[np.ndarray, "H W"]]) -> Iterator[int]:
    """The number of the shot that each frame is of, told a few frames after the frame was taken in."""
    recent: deque[np.ndarray] = deque()  # The frames from AROUND before the next one to be told.
    first = told = shot = 0
    for small_HW in small_pictures:
        recent.append(small_HW)
        if first + len(recent) > told + AROUND:
            shot += told > 0 and _is_cut(recent, told - first)
            yield shot
            told += 1
            while told - first > AROUND + 1:
                recent.popleft()
                first += 1
    while told < first + len(recent):
        shot += told > 0 and _is_cut(recent, told - first)
        yield shot
        told += 1


def _is_cut(frames: Sequence[np.ndarray], position: int) -> bool:
    """Whether a shot begins with the frame at `position`."""
    before = [frames[place] for place in range(max(0, position - AROUND - 1), position)]
    after = [frames[place] for place in range(position, min(len(frames), position + AROUND + 1))]
    change, quiet = _change(before[-1], after[0]), _quiet_change(before[-1], after[0])
    if change < CUT and quiet < QUIET_CUT:
        return False
    around = [*pairwise(before), *pairwise(after)]
    whole_cut = change >= max(CUT, TIMES_AROUND * _second([_change(*pair) for pair in around]))
    quiet_cut = quiet >= max(QUIET_CUT, TIMES_AROUND * _second([_quiet_change(*pair) for pair in around]))
    return (whole_cut or quiet_cut) and not any(
        _change(one, other) < UNDONE * change for one in before[-FLASH:] for other in after[:FLASH]
    )


def _second(values: list[float]) -> float:
    """The greatest but one."""
    return sorted(values)[-2] if len(values) > 1 else 0.0


def _change(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    difference = (one_HW.astype(np.float32) - other_HW) / 255
    return float(np.sqrt(np.square(difference).mean()))


def _quiet_change(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    return float(np.median(np.abs(one_HW.astype(np.float32) - other_HW))) / 255
