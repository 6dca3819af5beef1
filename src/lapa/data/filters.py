"""What happens to a source's pictures and numbers on their way into a dataset: rates, shots, sizes.

Pictures pass by one at a time, so that a film of any length needs the memory of a few.
Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from lapa.data.action_space import ActionSpace
from lapa.data.motion import shot_numbers, thumbnail
from lapa.data.transforms import resize_and_crop
from lapa.errors import UserError

# Seconds; a tick this close to the middle between two frames takes the later one, however the sum is rounded.
TIE = 1e-6
# Seconds between two frames that are still believed: a damaged timestamp would fill the disk with one picture.
LONGEST_GAP = 60.0


def in_time(timed_frames: Iterable[tuple[float, np.ndarray]], where: str) -> Iterator[tuple[float, np.ndarray]]:
    """The frames (seconds, picture) as they are. UserError naming `where` for times that run backwards or leap."""
    before = None
    for number, (seconds, frame) in enumerate(timed_frames):
        # A comparison that NaN fails, too.
        if before is not None and not before - TIE <= seconds <= before + LONGEST_GAP:
            wrong = "go backwards" if seconds < before else "leap"
            raise UserError(f"{where}: its timestamps {wrong} at frame {number} (from {before:.3f} to {seconds:.3f} s)")
        before = seconds
        yield seconds, frame


def resample(timed_frames: Iterable[tuple[float, np.ndarray]], fps: float) -> Iterator[np.ndarray]:
    """The frame nearest to each tick of 1 / fps seconds, as far as the frames (seconds, picture) reach."""
    tick, before = 0, None
    duration = 0.0
    for seconds, frame in timed_frames:
        if before is not None:
            while tick / fps < (before[0] + seconds) / 2 - TIE:
                yield before[1]
                tick += 1
            duration = seconds - before[0]
        before = seconds, frame
    # Half a frame past the last one, a next frame would be the nearest.
    while before is not None and (tick == 0 or tick / fps < before[0] + duration / 2 - TIE):
        yield before[1]
        tick += 1


def resample_rows(rows_TD: np.ndarray, fps: float, rate: float, space: ActionSpace | None = None) -> np.ndarray:
    """The rows at each tick of 1 / rate seconds, of rows at `fps`.

    space: of actions, which say what to do until the next tick: deltas are added up, of targets and switches the last
    one holds. Without it, rows are what was measured at the tick.
    """
    ticks = resample(((number / fps, np.array([number])) for number in range(len(rows_TD))), rate)
    starts = np.array([int(row[0]) for row in ticks])
    if space is None:
        return rows_TD[starts]
    last = rows_TD[np.append(starts[1:], len(rows_TD)) - 1]
    if space.control != "delta":
        return last
    added = np.add.reduceat(rows_TD, starts, axis=0)
    return np.where(np.array(space.binary), last, added).astype(rows_TD.dtype)


def by_shot(
    frames: Iterable[np.ndarray], size: int, cut: bool, watch: bool
) -> Iterator[tuple[int, np.ndarray | None, np.ndarray]]:
    """The number of the shot, the thumbnail and the picture, `size` pixels a side, of each frame.

    cut: look for shots, otherwise all is number 0. watch: make thumbnails, otherwise None.
    """
    if not cut:
        for frame_HWC in frames:
            yield 0, thumbnail(frame_HWC) if watch else None, resize_and_crop(frame_HWC[None], size)[0]
        return
    waiting: deque[tuple[np.ndarray, np.ndarray]] = deque()

    def seen() -> Iterator[np.ndarray]:
        for frame_HWC in frames:
            waiting.append((thumbnail(frame_HWC), resize_and_crop(frame_HWC[None], size)[0]))
            yield waiting[-1][0]

    for shot in shot_numbers(seen()):
        yield shot, *waiting.popleft()
