"""What all episodes of a dataset show: motion, cuts, cameras that stand still, and duplicates.

    survey = Survey(readers, episodes, cameras)
    survey.start()            # measures in a thread of low priority
    survey.since(0)           # what is measured so far
    survey.duplicates()

Episodes are measured one by one, and kept in `$XDG_CACHE_HOME/lapa/view` (or `~/.cache/lapa/view`), a folder for each
dataset that may be deleted at any time: a later survey goes on from there.

Axes: T time, H W thumbnail, N episodes, B bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lapa.checksums import Journal
from lapa.console import warn
from lapa.data.dataset import Dataset
from lapa.data.duplicates import DIFFERENT_BITS, looks_of
from lapa.data.motion import motion_energy, shot_numbers, thumbnails
from lapa.errors import UserError
from lapa.locks import locked

# Part of the name of what is kept: a new number where what is measured changes.
VERSION = 1
# Images of an episode that are looked at. Cuts are looked for where these are all. Bytes of images in memory at once.
MEASURED, MOST_BYTES = 600, 128 * 2**20
# RMS of brightness. A camera stands still where no image differs from the first by more: a camera's noise
# (lapa.data.motion). It is frozen where its images are the same for a fifth of the episode and at least FROZEN_SECONDS
# while another camera's change.
STILL, SAME, MOVES = 0.008, 0.0005, 0.002
FROZEN, FROZEN_SECONDS = 0.2, 0.5
# Almost the same frames are looked for among so many episodes of one instruction and length.
COMPARED = 1000
# Rows that are sent at once.
ROWS = 2000
NOT_KEPT = "what episodes show is not kept, and will be measured again the next time"


class Readers:
    """Copies of a dataset, each read by one thread at a time; more are made where several threads read."""

    def __init__(self, dataset: Dataset, most: int = 6) -> None:
        self._dataset, self._free = dataset, [dataset]
        self._slots = threading.BoundedSemaphore(most)

    @contextlib.contextmanager
    def one(self) -> Iterator[Dataset]:
        """Lends a copy; waits while `most` are lent."""
        with self._slots:
            try:
                dataset = self._free.pop()
            except IndexError:
                dataset = pickle.loads(pickle.dumps(self._dataset))
            try:
                yield dataset
            finally:
                self._free.append(dataset)


class Survey:
    """Measures episodes of a dataset in the background; every method may be called from any thread."""

    def __init__(self, readers: Readers, episodes: Sequence[int], cameras: Sequence[str]) -> None:
        self._readers, self._episodes, self._cameras = readers, list(episodes), list(cameras)
        self._rows: list[dict[str, Any]] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._stopped, self._starting = threading.Event(), threading.Lock()

    def start(self) -> None:
        """Begins, unless it has begun."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="survey", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Begins, and waits for the end. Raises the error that ended it before."""
        self.start()
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends after the episode that is being measured."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def since(self, first: int) -> dict[str, Any]:
        """Returns the rows from number `first` on, in the order in which they were measured.

        error: what ended the survey before its end, or None.
        """
        rows = self._rows[first : first + ROWS]
        names = ("episode", "motion", "cuts", "still", "frozen", "flaw")
        shown = [[row.get(name) for name in names] for row in rows]
        error = None if self._error is None else f"{type(self._error).__name__}: {self._error}"
        return {"rows": shown, "measured": len(self._rows), "of": len(self._episodes), "error": error}

    def duplicates(self) -> tuple[list[dict[str, Any]], int]:
        """Returns what `find_duplicates` finds among the episodes that are measured."""
        rows = list(self._rows)
        with self._readers.one() as dataset:
            kinds = {
                episode: (dataset.instruction(episode), int(dataset.lengths[episode]))
                for episode in (row["episode"] for row in rows)
            }
        return find_duplicates(rows, kinds)

    def _run(self) -> None:
        # Requests go first. On Linux, a thread has a priority of its own.
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        try:
            self._measure_all()
        except Exception as error:
            self._error = error
            warn(f"the episodes are not looked through any further: {type(error).__name__}: {error}")

    def _measure_all(self) -> None:
        with contextlib.ExitStack() as locks:
            note = self._kept(locks)
            known = {row["episode"] for row in self._rows}
            for episode in self._episodes:
                if self._stopped.is_set():
                    return
                if episode in known:
                    continue
                with self._readers.one() as dataset:
                    row = self._measured(dataset, episode)
                if "flaw" not in row:
                    note(row)
                self._rows.append(row)

    def _measured(self, dataset: Dataset, episode: int) -> dict[str, Any]:
        try:
            return measure(dataset, episode, self._cameras)
        except UserError as error:
            return {"episode": episode, "flaw": str(error)}

    def _kept(self, locks: contextlib.ExitStack) -> Callable[[dict[str, Any]], None]:
        """Reads the rows that are kept, and returns a function that keeps one more (none without a folder)."""
        try:
            folder = _folder(self._readers, self._cameras)
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(locked(folder))
            journal, shown = Journal(folder / "episodes.jsonl"), set(self._episodes)
            try:
                rows = list(journal)
            except UserError:
                journal.begin([])
                rows = []
        except (OSError, UserError) as error:
            warn(f"{NOT_KEPT}: {error}")
            return lambda row: None
        self._rows += [row for row in rows if row["episode"] in shown]
        failed = False

        def keep(row: dict[str, Any]) -> None:
            nonlocal failed
            if failed:
                return
            try:
                journal.append(row)
            except OSError as error:
                failed = True
                warn(f"{NOT_KEPT}: {error}")

        return keep


def _folder(readers: Readers, cameras: Sequence[str]) -> Path:
    with readers.one() as dataset:
        key = f"{VERSION} {dataset.fingerprint} {dataset.root} {' '.join(cameras)}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lapa" / "view" / hashlib.sha256(key.encode()).hexdigest()[:32]


def spread(length: int, most: int) -> np.ndarray:
    """Returns at most `most` of the numbers below `length`, from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)) if length else np.zeros(0, int)


def looked_at(dataset: Dataset, episode: int, cameras: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Returns at most MEASURED frames of an episode, their thumbnails [T, H, W] by camera, and where shots begin."""
    length = int(dataset.lengths[episode])
    frames_T, small, cuts = spread(length, MEASURED), [], set()
    for name in cameras:
        num = max(1, MOST_BYTES // (3 * math.prod(dataset.image_shape(name))))
        batches = (frames_T[first : first + num].tolist() for first in range(0, len(frames_T), num))
        small.append(thumbnails(chain.from_iterable(dataset.frames(episode, batch, name) for batch in batches)))
        if len(frames_T) == length:
            shots_T = np.array(list(shot_numbers(small[-1])))
            cuts |= set((np.flatnonzero(np.diff(shots_T)) + 1).tolist())
    return frames_T, small, sorted(cuts)


def measure(dataset: Dataset, episode: int, cameras: Sequence[str]) -> dict[str, Any]:
    """Measures one episode. Raises UserError where it cannot be read.

    motion: the mean change from image to image, RMS of brightness, of the camera that shows most. cuts: how many.
    still, frozen: numbers of cameras. frames, actions: hashes; looks: bits as hexadecimal digits; mean: of each action.
    """
    frames_T, small, cuts = looked_at(dataset, episode, cameras)
    energies = [motion_energy(small_THW, 1) for small_THW in small]
    still, frozen = without_motion(small, frames_T, dataset.fps)
    row: dict[str, Any] = {
        "episode": episode,
        "motion": round(max((float(energy.mean()) for energy in energies if len(energy)), default=0.0), 5),
        "cuts": len(cuts),
        "still": still,
        "frozen": frozen,
    }
    if small:
        row |= {"frames": _hash(*small), "looks": looks_of(list(small[0]))}
    if dataset.action_dim is not None:
        actions_TA = dataset.actions(episode)
        row["mean"] = [float(f"{value:.3g}") for value in np.abs(actions_TA).mean(axis=0)]
        # Actions that never change are the same in many episodes.
        if np.ptp(actions_TA, axis=0).any():
            row["actions"] = _hash(actions_TA)
    return row


def without_motion(small: Sequence[np.ndarray], frames_T: np.ndarray, fps: float) -> tuple[list[int], list[int]]:
    """Returns the numbers of the cameras in which nothing moves, and of those that are frozen for a while.

    small: the thumbnails [T, H, W] of each camera at `frames_T`.
    """
    seconds = float(frames_T[-1] - frames_T[0]) / max(1, len(frames_T) - 1) / fps if len(frames_T) else 0.0
    energies = [motion_energy(small_THW, 1) for small_THW in small]
    still = [camera for camera, small_THW in enumerate(small) if _stands_still(small_THW)]
    return still, [camera for camera in range(len(small)) if _is_frozen(energies, camera, seconds)]


def _stands_still(small_THW: np.ndarray) -> bool:
    """Whether no image differs from the first by more than a camera's noise."""
    pairs = (motion_energy(np.stack([small_THW[0], small_HW]), 1)[0] for small_HW in small_THW[1:])
    return all(change < STILL for change in pairs)


def _is_frozen(energies: Sequence[np.ndarray], camera: int, seconds: float) -> bool:
    """Whether a camera's images are the same for long while another camera's change; seconds: between images."""
    own_T, others = energies[camera], [energy for other, energy in enumerate(energies) if other != camera]
    if not others or not len(own_T):
        return False
    moving_T = np.max(others, axis=0) >= MOVES
    least = max(FROZEN * len(own_T), FROZEN_SECONDS / max(seconds, 1e-9))
    edges = np.flatnonzero(np.diff(own_T < SAME, prepend=False, append=False))
    return any(
        end - start >= least and moving_T[start:end].mean() > 0.5
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    )


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def find_duplicates(
    rows: Sequence[Mapping[str, Any]], kinds: Mapping[int, tuple[str, int]]
) -> tuple[list[dict[str, Any]], int]:
    """Returns groups of measured episodes that are the same, with the reason; each episode is in one at most.

    Also returns how many episodes are not compared for almost the same frames, past COMPARED of a kind.
    kinds: the instruction and the length of each episode, which those of a group share.
    """
    left, found, not_compared = list(rows), [], 0
    for why, key in (
        ("the same actions", "actions"),
        ("the same frames", "frames"),
        ("almost the same frames", "looks"),
    ):
        groups: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        for row in left:
            if key in row:
                groups[kinds[row["episode"]], "" if key == "looks" else row[key]].append(row)
        if key == "looks":
            not_compared = sum(max(0, len(group) - COMPARED) for group in groups.values())
        alike = [some for group in groups.values() for some in (_alike(group) if key == "looks" else [group])]
        numbers = [sorted(row["episode"] for row in group) for group in alike if len(group) > 1]
        found += [{"why": why, "episodes": group} for group in sorted(numbers)]
        taken = {episode for group in numbers for episode in group}
        left = [row for row in left if row["episode"] not in taken]
    return found, not_compared


def _alike(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Returns rows in groups whose images, and actions on average, are almost the same."""
    rows = rows[:COMPARED]
    if len(rows) < 2:
        return []
    # It takes a while to import.
    from scipy.sparse.csgraph import connected_components

    bits_NB = np.unpackbits(np.array([list(bytes.fromhex(row["looks"])) for row in rows], np.uint8), axis=1).astype(int)
    apart_NN = bits_NB @ (1 - bits_NB).T
    alike_NN = apart_NN + apart_NN.T <= DIFFERENT_BITS
    means_NA = np.array([row.get("mean", []) for row in rows])
    for mean_N in means_NA.T:
        alike_NN &= np.isclose(mean_N[:, None], mean_N, rtol=0.02, atol=1e-3 * np.abs(mean_N).max())
    _, groups_N = connected_components(alike_NN)
    groups: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for group, row in zip(groups_N.tolist(), rows, strict=True):
        groups[group].append(row)
    return list(groups.values())
