"""The page of a dataset, and of labels on it: JSON by name, and I-C.mp4 of each episode I and camera C.

    about                        the dataset, and the labels where there are some
    episodes-N                   rows of the list of episodes, PAGE to a page
    episode-I                    an episode: its videos, actions, states and codes
    motion-I                     how much its images change from frame to frame, and its cuts
    statistics                   of a sample: actions and states
    survey-N                     what the images of all episodes show, from the N-th that was measured on
    duplicates                   groups of episodes that are the same, of those that are measured
    code-P-C                     where code C occurs at position P, and what the robot does then

Axes: T time, L latent action length, P positions (L and, where that is more than one, the whole latent action), N rows.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from threading import RLock, local
from typing import Any

import numpy as np
from PIL import Image

from lapa.data.dataset import ACTION, STATE, Dataset, dimension_names
from lapa.data.labels import LABEL_ANEW, Labels
from lapa.data.lerobot import LeRobotDataset
from lapa.data.metadata import INFO
from lapa.data.motion import motion_energy
from lapa.data.spec import open_dataset
from lapa.data.video import encode_clip, probe
from lapa.errors import UserError
from lapa.files import as_path, is_remote
from lapa.view.config import ViewConfig
from lapa.view.pages import Pages, UnknownNameError
from lapa.view.survey import ROWS as SURVEYED
from lapa.view.survey import Readers, Survey, looked_at, spread, without_motion

# Rows of the list that are sent at once.
PAGE = 5_000
# Points of a curve, and episodes that stand for the dataset in the statistics of actions and states.
POINTS, SAMPLE = 400, 200
# Episodes of an export.
EXPORTED = 50
# Clips of a code, and rows whose actions are averaged; whole latent actions that are listed.
CLIPS, ROWS, WHOLE = 24, 2000, 64
# Values of all positions of a latent action together.
MOST_CODES = 1 << 20
# The longer side of videos that are encoded for the page, and codecs and pixels that browsers play as they are.
SIDE = 480
VIDEO = re.compile(r"([0-9]{1,9})-([0-9]{1,9})\.mp4")
PLAYED, PLAYED_PIXELS = ("h264", "av1", "vp9"), ("yuv420p", "yuvj420p")


def open_dataset_pages(config: ViewConfig) -> DatasetPages:
    """Opens a dataset's pages; an export has some of its episodes, spread over it, and videos of its own."""
    return _pages(open_dataset(config.path), None, config)


def open_labels_pages(config: ViewConfig) -> DatasetPages:
    """Opens labels on the dataset in `config.data`, or else on the one in whose folder they are.

    Raises UserError where there is no dataset, and where the labels are of another one.
    """
    above = as_path(config.path).absolute().parent.parent
    if config.data is None and not (above / INFO).exists():
        raise UserError(f"{config.path}: is not inside its dataset; give it: --data DATASET")
    dataset = open_dataset(config.data or str(above))
    labels = Labels.open(config.path, dataset_fingerprint=dataset.fingerprint)
    sizes = labels.manifest.latent_length, labels.manifest.codebook_size
    if math.prod(sizes) > MOST_CODES:
        raise UserError(
            f"{config.path}: has {sizes[0]} codes of {sizes[1]} values, more than the {MOST_CODES:,} that a page shows"
        )
    return _pages(dataset, labels, config)


def _pages(dataset: Dataset, labels: Labels | None, config: ViewConfig) -> DatasetPages:
    if config.export is None and config.rerun is None:
        return DatasetPages(dataset, labels)
    episodes = spread(len(dataset), config.limit or EXPORTED).tolist()
    return DatasetPages(dataset, labels, episodes=episodes, encoded=True)


class DatasetPages(Pages):
    """The data of the page of a dataset.

    episodes: the indices of those that are shown, in order; None: all. encoded: whether each video is encoded into a
    small file of its own, also where the dataset has one that a browser plays.
    """

    body = "dataset.html"
    numbers = {  # noqa: RUF012
        **dict.fromkeys(["about", "statistics", "duplicates"], 0),
        **dict.fromkeys(["episodes", "episode", "motion", "survey"], 1),
        "code": 2,
    }

    def __init__(
        self,
        dataset: Dataset,
        labels: Labels | None = None,
        *,
        episodes: Sequence[int] | None = None,
        encoded: bool = False,
    ) -> None:
        super().__init__()
        self.opened, self.labels, self._encoded = dataset, labels, encoded
        self.episodes = np.arange(len(dataset)) if episodes is None else np.asarray(episodes)
        self._shown = None if episodes is None else set(self.episodes.tolist())
        self._as_it_is = cache(self._is_played)
        # A slow episode holds up requests for itself alone: each name has a lock, and each request a copy to read.
        self._locks: defaultdict[str, RLock] = defaultdict(RLock)
        self._readers, self._lent = Readers(dataset), local()
        self.survey = Survey(self._readers, self.episodes.tolist(), self.cameras)

    @property
    def dataset(self) -> Dataset:
        """What this thread reads: its copy while it answers a request."""
        return getattr(self._lent, "dataset", self.opened)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        with self._locks[name], self._readers.one() as dataset:
            self._lent.dataset = dataset
            try:
                yield
            finally:
                del self._lent.dataset

    def close(self) -> None:
        self.survey.close()
        super().close()

    @property
    def summary(self) -> str:
        return f"{len(self.opened)} episodes"

    @property
    def inputs(self) -> list[str | Path]:
        return [self.dataset.root, *([] if self.labels is None else [self.labels.folder])]

    @property
    def left_out(self) -> str:
        num, of = len(self.episodes), len(self.dataset)
        return "" if num == of else f"{num} of {of} episodes, spread over the dataset; --limit takes more"

    def names(self) -> Iterator[str]:
        # An export has the whole survey.
        self.survey.wait()
        yield from ("about", "statistics", "duplicates")
        yield from (f"survey-{first}" for first in range(0, len(self.episodes), SURVEYED))
        yield from (f"episodes-{page}" for page in range(self.num_pages))
        for episode in self.episodes.tolist():
            yield from (f"episode-{episode}", f"motion-{episode}")
        for position, codes in enumerate(self._codebooks):
            yield from (f"code-{position}-{code}" for code in range(len(codes)))

    @property
    def num_pages(self) -> int:
        return -(-len(self.episodes) // PAGE)

    def files(self) -> Iterator[str]:
        for episode in self.episodes.tolist():
            yield from (f"{episode}-{camera}.mp4" for camera in range(len(self.cameras)))

    def file(self, name: str) -> Path:
        match = VIDEO.fullmatch(name)
        if match is None:
            raise UnknownNameError(name)
        episode, camera = int(match[1]), int(match[2])
        self._require(episode)
        if camera >= len(self.cameras):
            raise UnknownNameError(camera)
        with self.reading(name):
            camera_name = self.cameras[camera]
            if own := self._own_video(episode, camera_name):
                return own[0]
            file = self.folder / name
            if not file.exists():
                encode_clip(file, map(smaller, self.dataset.frames(episode, camera=camera_name)), self.dataset.fps)
            return file

    @property
    def cameras(self) -> tuple[str, ...]:
        return () if self.dataset.coded else self.dataset.cameras

    def _require(self, episode: int) -> None:
        shown = 0 <= episode < len(self.dataset) and (self._shown is None or episode in self._shown)
        if not shown:
            raise UnknownNameError(episode)

    def _own_video(self, episode: int, camera: str) -> tuple[Path, float, float] | None:
        """Returns the dataset's own video of an episode with its span, where a browser plays it."""
        dataset = self.dataset
        if self._encoded or not isinstance(dataset, LeRobotDataset) or is_remote(dataset.root):
            return None
        if dataset.camera_feature(camera)["dtype"] != "video":
            return None
        span, file = dataset.span_in_video(episode, camera), dataset.video_path(episode, camera)
        return (file, *span) if self._as_it_is(file) else None

    def _is_played(self, file: Path) -> bool:
        info = probe(file)
        return info.codec in PLAYED and info.pix_fmt in PLAYED_PIXELS and info.constant

    def _about(self) -> dict[str, Any]:
        dataset = self.dataset
        names = {ACTION: self.dimensions(ACTION), STATE: self.dimensions(STATE)}
        about: dict[str, Any] = {
            "name": dataset.name,
            "episodes": len(self.episodes),
            "of_episodes": len(dataset),
            "frames": int(dataset.lengths[self.episodes].sum()),
            "fps": dataset.fps,
            "cameras": [{"name": name, "size": list(dataset.image_shape(name)[::-1])} for name in dataset.cameras],
            "images": not dataset.coded,
            # To look through a dataset that is elsewhere is to download it.
            "elsewhere": is_remote(dataset.root),
            "actions": names[ACTION],
            "states": names[STATE],
            "pages": self.num_pages,
        }
        if dataset.action_space is not None:
            about |= {"control": dataset.action_space.control, "binary": dataset.action_space.binary_names}
        if self.labels is not None:
            manifest = self.labels.manifest
            about["labels"] = {
                "length": manifest.latent_length,
                "codebook": manifest.codebook_size,
                "horizon": manifest.horizon_frames,
                "seconds": manifest.horizon_seconds,
                "camera": manifest.camera,
                "rows": len(self._rows[0]),
                "codes": self._codebooks,
                "usage": self._usage,
                "transitions": self._transitions,
            }
        return about

    def dimensions(self, feature: str) -> list[str]:
        features = self.dataset.features
        return dimension_names(features[feature], feature.rpartition(".")[2]) if feature in features else []

    def _episodes(self, page: int) -> dict[str, Any]:
        """Columns of a page of the list; texts are numbers of `texts`, since many episodes share one."""
        chosen = self.episodes[page * PAGE : (page + 1) * PAGE]
        if page and not len(chosen):
            raise UnknownNameError(page)
        texts: dict[str, int] = {}
        columns: dict[str, list[int]] = {"instruction": [], "source": []}
        for index in chosen.tolist():
            episode = self.dataset[index]
            for name, numbers in columns.items():
                numbers.append(texts.setdefault(getattr(episode, name), len(texts)))
        rows = {"index": chosen.tolist(), "length": self.dataset.lengths[chosen].tolist()}
        return {"texts": list(texts), **rows, **columns}

    def _episode(self, index: int) -> dict[str, Any]:
        self._require(index)
        dataset, length = self.dataset, int(self.dataset.lengths[index])
        episode = dataset[index]
        videos = []
        for camera, name in enumerate(self.cameras):
            own = self._own_video(index, name)
            start, end = own[1:] if own else (0.0, length / dataset.fps)
            videos.append({"camera": camera, "start": start, "end": end})
        frames_T = spread(length, POINTS)
        found: dict[str, Any] = {
            "index": index,
            "number": int(dataset.numbers[index]),
            "instruction": episode.instruction,
            "source": episode.source,
            "length": length,
            "videos": videos,
            "frames": frames_T.tolist(),
        }
        if dataset.action_dim is not None:
            found["actions"] = _rounded(dataset.actions(index)[frames_T])
        if (states := dataset.states(index)) is not None:
            found["states"] = _rounded(states[frames_T])
        if self.labels is not None:
            rows = slice(*np.searchsorted(self._rows[0], [index, index + 1]))
            found["code_frames"] = self._rows[1][rows].tolist()
            found["codes"] = self._codes_NP[rows].tolist()
        return found

    def _motion(self, index: int) -> dict[str, Any]:
        """The change of each camera's images, RMS of brightness in [0, 1], and the frames with which shots begin."""
        self._require(index)
        frames_T, small, cuts = looked_at(self.dataset, index, self.cameras)
        energies = [motion_energy(small_THW, 1) for small_THW in small]
        cameras = [[round(float(energy), 4) for energy in energy_T] for energy_T in energies]
        still, frozen = without_motion(small, frames_T, self.dataset.fps)
        return {"frames": frames_T[1:].tolist(), "cameras": cameras, "cuts": cuts, "still": still, "frozen": frozen}

    def _survey(self, first: int) -> dict[str, Any]:
        self.survey.start()
        return self.survey.since(first)

    def _duplicates(self) -> dict[str, Any]:
        groups, not_compared = self.survey.duplicates()
        return {"groups": groups, "not_compared": not_compared}

    def _statistics(self) -> dict[str, Any]:
        """Statistics of the actions and states of a sample of the episodes."""
        dataset = self.dataset
        sample = self.episodes[spread(len(self.episodes), SAMPLE)].tolist()
        found: dict[str, Any] = {"sample": len(sample)}
        for name, there, read in (
            ("actions", dataset.action_dim, dataset.actions),
            ("states", dataset.state_dim, dataset.states),
        ):
            if there is not None:
                found[name] = _summary(np.concatenate([read(episode) for episode in sample]))
        return found

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The episode, the frame and the codes [N, L] of each labelled row of the episodes that are shown."""
        assert self.labels is not None
        parts = [self.labels.codes(episode) for episode in self.episodes.tolist()]
        owners_N = np.repeat(self.episodes, [len(frames) for frames, _ in parts])
        frames_N = np.concatenate([frames for frames, _ in parts])
        if (frames_N >= self.dataset.lengths[owners_N]).any():
            raise UserError(f"{self.labels.folder}: has labels past the end of an episode; {LABEL_ANEW}")
        return owners_N, frames_N, np.concatenate([codes for _, codes in parts])

    @cached_property
    def _whole(self) -> tuple[np.ndarray, list[str]]:
        """Each row's whole latent action, by its rank in frequency, -1 past the first WHOLE; and the names of these."""
        codes_NL = self._rows[2]
        numbers_N = np.zeros(len(codes_NL), np.int64)
        for codes_N in codes_NL.T:
            # By one position after the other: much faster than comparing rows.
            _, firsts, numbers_N = np.unique(
                numbers_N * (int(codes_N.max(initial=0)) + 1) + codes_N, return_index=True, return_inverse=True
            )
        kinds = codes_NL[firsts]
        counts = np.bincount(numbers_N, minlength=len(kinds))
        order = np.argsort(-counts, kind="stable")
        rank = np.empty(len(kinds), np.int64)
        rank[order] = np.arange(len(kinds))
        names = ["-".join(map(str, kinds[kind])) for kind in order[:WHOLE]]
        return np.where(rank[numbers_N] < WHOLE, rank[numbers_N], -1), names

    @cached_property
    def _codes_NP(self) -> np.ndarray:
        codes_NL = self._rows[2]
        return np.column_stack([codes_NL, self._whole[0]]) if codes_NL.shape[1] > 1 else codes_NL

    @cached_property
    def _codebooks(self) -> list[list[str]]:
        """The names of the codes of each position."""
        if self.labels is None:
            return []
        manifest = self.labels.manifest
        books = [[str(code) for code in range(manifest.codebook_size)] for _ in range(manifest.latent_length)]
        return [*books, *([self._whole[1]] if len(books) > 1 else [])]

    @cached_property
    def _usage(self) -> list[list[float]]:
        """The share of the rows with each code, by position."""
        num = max(1, len(self._codes_NP))
        return [
            (np.bincount(codes_N[codes_N >= 0], minlength=len(book)) / num).round(5).tolist()
            for codes_N, book in zip(self._codes_NP.T, self._codebooks, strict=True)
        ]

    @cached_property
    def _transitions(self) -> list[list[list[int]]]:
        """How often a code is followed one horizon later by each other one, by position; of the first WHOLE codes."""
        assert self.labels is not None
        owners_N, frames_N, _ = self._rows
        # Rows are in order: the row of (episode, frame + horizon) is found by bisection, where there is one.
        span = int(frames_N.max(initial=0)) + self.labels.manifest.horizon_frames + 1
        keys_N = owners_N * span + frames_N
        wanted_N = keys_N + self.labels.manifest.horizon_frames
        later_N = np.minimum(np.searchsorted(keys_N, wanted_N), max(0, len(keys_N) - 1))
        pairs = np.flatnonzero(keys_N[later_N] == wanted_N)
        tables = []
        for codes_N, book in zip(self._codes_NP.T, self._codebooks, strict=True):
            num = min(len(book), WHOLE)
            first, second = codes_N[pairs], codes_N[later_N[pairs]]
            kept = (np.minimum(first, second) >= 0) & (np.maximum(first, second) < num)
            counts = np.bincount(first[kept] * num + second[kept], minlength=num * num)
            tables.append(counts.reshape(num, num).tolist())
        return tables

    def _code(self, position: int, code: int) -> dict[str, Any]:
        """Clips with a code, each of another episode as far as there are, and the mean action at its rows."""
        if position >= len(self._codebooks) or code >= len(self._codebooks[position]):
            raise UnknownNameError(code)
        owners_N, frames_N, _ = self._rows
        rows = np.flatnonzero(self._codes_NP[:, position] == code)
        # The middle of the longest run of an episode shows the code best.
        begins = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(owners_N[rows], prepend=-1) != 0))
        lengths = np.diff(begins, append=len(rows))
        firsts = rows[begins]
        order = np.argsort(-lengths, kind="stable")
        _, best = np.unique(owners_N[firsts[order]], return_index=True)
        chosen = order[np.sort(best)]
        clips = [
            [int(owners_N[row]), int(frames_N[row])]
            for row in (firsts[chosen] + (lengths[chosen] - 1) // 2)[spread(len(chosen), CLIPS)]
        ]
        found = {"rows": len(rows), "episodes": len(chosen), "clips": [self._clip(*clip) for clip in clips]}
        if self.dataset.action_dim is not None and len(rows):
            found |= self._true_actions(rows)
        return found

    def _clip(self, episode: int, frame: int) -> dict[str, Any]:
        """A clip from a frame to one horizon later."""
        assert self.labels is not None
        camera = self.dataset.cameras.index(self.dataset.camera_name(self.labels.manifest.camera))
        clip = {"episode": episode, "frame": frame, "camera": camera, "instruction": self.dataset[episode].instruction}
        own = self._own_video(episode, self.cameras[camera]) if self.cameras else None
        start = (own[1] if own else 0.0) + (frame + 0.25) / self.dataset.fps
        return {**clip, "start": start, "end": start + self.labels.manifest.horizon_frames / self.dataset.fps}

    def _true_actions(self, rows: np.ndarray) -> dict[str, Any]:
        """The mean action at rows, and the one that is nearest to all of them, with its clip.

        By dimension, also as the distance from the mean of all rows in standard deviations.
        """
        rows = rows[spread(len(rows), ROWS)]
        owners_N, frames_N, _ = self._rows
        actions_NA = np.concatenate(
            [
                self.dataset.actions(episode)[frames_N[rows[owners_N[rows] == episode]]]
                for episode in _unique(owners_N[rows])
            ]
        )
        mean_A, std_A = self._action_moments
        scores_NA = (actions_NA - mean_A) / np.maximum(std_A, 1e-9)
        nearest = _nearest_to_all(scores_NA)

        def listed(action_A: np.ndarray, score_A: np.ndarray) -> list[dict[str, Any]]:
            found = zip(self.dimensions(ACTION), action_A.tolist(), score_A.tolist(), strict=True)
            return [{"name": name, "value": _number(value), "z": _number(score)} for name, value, score in found]

        clip = self._clip(int(owners_N[rows[nearest]]), int(frames_N[rows[nearest]]))
        return {
            "actions": listed(actions_NA.mean(axis=0), scores_NA.mean(axis=0)),
            "nearest": {**clip, "actions": listed(actions_NA[nearest], scores_NA[nearest])},
        }

    @cached_property
    def _action_moments(self) -> tuple[np.ndarray, np.ndarray]:
        sample = self.episodes[spread(len(self.episodes), SAMPLE)].tolist()
        actions_NA = np.concatenate([self.dataset.actions(episode) for episode in sample])
        return actions_NA.mean(axis=0), actions_NA.std(axis=0)


def _nearest_to_all(points_ND: np.ndarray) -> int:
    """Returns the number of the point whose distances to all others are the least together."""
    squares_N = np.square(points_ND).sum(axis=1)
    squared_NN = squares_N[:, None] + squares_N - 2 * points_ND @ points_ND.T
    return int(np.sqrt(np.maximum(squared_NN, 0)).sum(axis=1).argmin())


def _unique(values: np.ndarray) -> list[int]:
    return np.unique(values).tolist()


def _number(value: float) -> float:
    return float(f"{value:.4g}")


def _rounded(rows_TD: np.ndarray) -> list[list[float]]:
    return [[_number(value) for value in row] for row in rows_TD.tolist()]


def _summary(rows_ND: np.ndarray) -> list[dict[str, float]]:
    """Returns the mean, the standard deviation, and quantiles of each dimension."""
    low_D, middle_D, high_D = np.quantile(rows_ND, [0.01, 0.5, 0.99], axis=0)
    columns = {
        "mean": rows_ND.mean(axis=0),
        "std": rows_ND.std(axis=0),
        "min": rows_ND.min(axis=0),
        "q01": low_D,
        "median": middle_D,
        "q99": high_D,
        "max": rows_ND.max(axis=0),
    }
    return [{name: _number(values[dim]) for name, values in columns.items()} for dim in range(rows_ND.shape[1])]


def smaller(frame_HWC: np.ndarray) -> np.ndarray:
    """Returns an image with even sides of at most SIDE."""
    height, width = frame_HWC.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = [max(2, 2 * round(side * scale / 2)) for side in (width, height)]
    return np.asarray(Image.fromarray(frame_HWC).resize((size[0], size[1]), Image.Resampling.BICUBIC))
