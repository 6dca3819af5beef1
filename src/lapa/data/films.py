"""Which frames of a video file are an episode's, where several episodes share the file.

LeRobot notes when each episode begins and ends in the file (from_timestamp, to_timestamp), in the file's own seconds.
Sums of durations drift from the frames, so these times are checked against the frames and the episodes' lengths:

- Where the episodes' frames are as many as the file's, order and lengths decide. Their times must merely keep step, to
  a frame for each episode; where the file starts does not matter.
- Elsewhere an episode must begin on a frame, last as long as its frames do, and share none with another. Where one of
  them does not, though the file has frames enough, the others must begin where those before them end.

Axes: N frames of a file, E episodes of it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

# Part of a frame by which a time may be off through rounding.
NEAR = 0.1
# Relative difference up to which the rate of a file is that of its episodes.
SAME_RATE = 0.01


def episode_frames(
    times_N: Float[np.ndarray, "N"],
    starts_E: Float[np.ndarray, "E"],
    ends_E: Float[np.ndarray, "E"],
    lengths_E: Int[np.ndarray, "E"],
    fps: float,
) -> tuple[Int[np.ndarray, "E"], list[str]]:
    """Returns the first frame of each episode, and what is wrong with its times, "" where nothing is.

    times_N: when the file's frames are shown, in order; starts_E, ends_E: when the episodes begin and end, by the
    metadata; an end may be NaN, not known. Seconds; episodes are in the order of their numbers.
    """
    counted_E = np.cumsum(lengths_E) - lengths_E
    if _fill(times_N, starts_E, lengths_E, fps):
        return counted_E, [""] * len(lengths_E)
    after_E = np.searchsorted(times_N, starts_E).clip(max=len(times_N) - 1)
    before_E = (after_E - 1).clip(min=0)
    is_before_E = np.abs(times_N[before_E] - starts_E) < np.abs(times_N[after_E] - starts_E)
    firsts_E = np.where(is_before_E, before_E, after_E)
    lasts_E = firsts_E + lengths_E - 1
    off_E = np.abs(times_N[firsts_E] - starts_E) * fps > NEAR
    flaws = []
    for episode, (start, end, length) in enumerate(zip(starts_E, ends_E, lengths_E, strict=True)):
        begins, last = f"begins at {start:.3f} s by the metadata", int(lasts_E[episode])
        nearest = times_N[firsts_E[episode]]
        flaw = ""
        if off_E[episode] and start < times_N[0]:
            flaw = f"{begins}, but the video starts late, at {times_N[0]:.3f} s"
        elif off_E[episode]:
            flaw = f"{begins}, where the video has no frame (the nearest is at {nearest:.3f} s)"
        elif last >= len(times_N):
            flaw = f"{begins} and needs {length} frames, but the video ends {last + 1 - len(times_N)} frames too early"
        elif abs((times_N[last] - nearest) * fps - (length - 1)) > 0.5:
            flaw = f"{begins}, and its {length} frames take {times_N[last] - nearest:.3f} s, not those of {fps:g} fps"
        elif abs((end - start) * fps - length) > NEAR:
            flaw = f"takes {end - start:.3f} s by the metadata, but its {length} frames take {length / fps:.3f} s"
        elif (off_E & (starts_E < start)).any():
            flaw = f"{begins}, after an episode that begins where the video has no frame"
        flaws.append(flaw)
    sound = [episode for episode in np.argsort(firsts_E, kind="stable") if not flaws[episode]]
    for one, next_one in pairwise(sound):
        if firsts_E[next_one] <= lasts_E[one]:
            for episode in (one, next_one):
                flaws[episode] = (
                    f"begins at {starts_E[episode]:.3f} s by the metadata, in the frames of another episode"
                )
    num_spare = len(times_N) - int(lengths_E.sum())
    if (num_spare == 0 and any(flaws)) or (num_spare > 0 and (~off_E & (lasts_E >= len(times_N))).any()):
        for episode in np.flatnonzero(firsts_E != counted_E).tolist():
            begins = f"begins at {starts_E[episode]:.3f} s by the metadata"
            by_count = f"at {times_N[counted_E[episode]]:.3f} s by the lengths of those before it"
            flaws[episode] = flaws[episode] or f"{begins}, {by_count}"
    return firsts_E, flaws


def _fill(times_N: np.ndarray, starts_E: np.ndarray, lengths_E: np.ndarray, fps: float) -> bool:
    """Whether the episodes, one after another, are the whole file, and the metadata has them in this order."""
    num = len(times_N)
    if num != lengths_E.sum():
        return False
    steps_E = np.diff(starts_E) * fps
    in_step = bool((np.abs(steps_E - lengths_E[:-1]) <= 1 + NEAR).all())
    return in_step and abs((times_N[-1] - times_N[0]) * fps - (num - 1)) <= max(1, SAME_RATE * num)
