"""The result of one arm of a study under one seed: a small JSON file. `lapa study report` reads nothing else.

    STUDY/results/in-domain-30-2-lapa-0.json      split, videos and labelled episodes a task, arm, seed
    STUDY/results/in-domain-30-2-lapa-0.png       images of its rollouts
    STUDY/results/in-domain-30-2-lapa-0-codes.png what the codes of its latent action model do (arm lapa)

Results of several machines are merged by giving `report` all their folders, or by copying the files into one.
"""

from __future__ import annotations

import dataclasses
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lapa import config as configs
from lapa.console import warn
from lapa.errors import UserError
from lapa.files import find_files, read_json, write_json

Arm = Literal["scratch", "captions", "vpt", "unipi", "lapa", "actionvla"]
Split = Literal["in-domain", "cross-task", "cross-environment", "cross-embodiment"]
ARMS: tuple[Arm, ...] = typing.get_args(Arm)
SPLITS: tuple[Split, ...] = typing.get_args(Split)
FOLDER = "results"
# The settings of the study, and the seconds and the code version of each step.
SETTINGS, SECONDS = "study.json", "seconds.jsonl"
# The largest share of rollouts that may end in an error.
MOST_ERRORS = 0.2


@dataclass(frozen=True)
class Rollout:
    """How one evaluation episode ended.

    heard: whether the labelled episodes contain its instruction word for word, or only another phrasing of it; None
    where a task has one phrasing. Videos with captions teach more phrasings than a few labelled episodes contain.
    """

    task: str
    episode: int
    success: bool
    steps: int
    heard: bool | None = None


@dataclass(frozen=True)
class Curve:
    """Metrics of one training run. name: the stage; rows: those of its metrics.jsonl.

    A row is {"step": 20, "seconds": 3.1, "loss": 2.0, ...}; rows of a validation have "eval/..." entries.
    """

    name: str
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Setting:
    """What arms are compared on. videos, demonstrations: of each task, but all videos of --clips."""

    split: Split
    videos: int
    demonstrations: int

    @property
    def name(self) -> str:
        labelled = f"{self.demonstrations} labelled episode{'s' if self.demonstrations > 1 else ''}"
        return f"{self.split}, {self.videos} videos and {labelled} a task"

    @property
    def numbers(self) -> tuple[int, int]:
        return self.videos, self.demonstrations

    @property
    def short(self) -> str:
        """The name in a table that says what the numbers are."""
        return f"{self.split}, {self.videos}, {self.demonstrations}"

    @property
    def place(self) -> tuple[int, int, int]:
        """Orders settings by split, videos and labelled episodes."""
        return SPLITS.index(self.split), self.videos, self.demonstrations


@dataclass(frozen=True)
class RunKey:
    """Names one arm in one setting under one seed."""

    arm: Arm
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """The stem of its files' names."""
        split, videos, demonstrations = dataclasses.astuple(self.setting)
        return f"{split}-{videos}-{demonstrations}-{self.arm}-{self.seed}"

    @property
    def place(self) -> tuple[tuple[int, int, int], int, int]:
        """Orders runs by setting, arm and seed."""
        return self.setting.place, ARMS.index(self.arm), self.seed


@dataclass(frozen=True)
class ArmResult(RunKey):
    """The result of a run.

    preset, sizes: the same in all results of one study. errors: evaluation episodes that ended in an error, which are
    no rollouts. figures: measures that may explain the success rate, by name (docs/metrics.md), such as token_accuracy,
    action_error, lam_linear_r2. seconds, cpu_seconds: of each stage, all its attempts together. provenance: the
    command, versions and hardware.
    """

    preset: str
    sizes: dict[str, Any]
    rollouts: tuple[Rollout, ...]
    errors: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()
    """The folder that it was read from; not saved."""

    @property
    def key(self) -> RunKey:
        return RunKey(self.arm, self.setting, self.seed)

    @property
    def strip(self) -> Path | None:
        """The image of its rollouts, or None."""
        path = self.folder / f"{self.name}.png"
        return path if path.is_file() else None

    @property
    def codes(self) -> Path | None:
        """The image of its latent action model's codes, or None."""
        path = self.folder / f"{self.name}-codes.png"
        return path if path.is_file() else None

    def stage_of(self, title: str) -> str:
        """Returns a stage's name without the arm's: `pretraining` for `pretraining lapa`."""
        return title.removesuffix(f" {self.arm}")

    def success_rate(self) -> float | None:
        """Returns the mean over tasks of the success rate; None without rollouts."""
        by_task: dict[str, list[bool]] = {}
        for rollout in self.rollouts:
            by_task.setdefault(rollout.task, []).append(rollout.success)
        return float(np.mean([np.mean(successes) for successes in by_task.values()])) if by_task else None

    def save(self, study: Path) -> Path:
        """Writes STUDY/results/NAME.json and returns its path."""
        path = study / FOLDER / f"{self.name}.json"
        values = configs.to_dict(self)
        del values["folder"]
        write_json(path, values)
        return path


def settings_of(results: Sequence[ArmResult]) -> list[Setting]:
    """Returns the settings of the results, each once, in order."""
    return sorted({result.setting for result in results}, key=lambda setting: setting.place)


def require_played(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Warns of rollouts that ended in an error. Raises UserError where they are too many of those in the folder."""
    errors = [str(row["error"]) for row in rows if row.get("error")]
    if not errors:
        return
    ((most, _),) = Counter(errors).most_common(1)
    note = f"{folder}: {len(errors)} of {len(rows)} rollouts ended in an error, most often {most!r}"
    if len(errors) > MOST_ERRORS * len(rows):
        raise UserError(f"{note}; fix the cause, delete this folder and run the same command again")
    warn(f"{note}; they are left out")


def load_result(path: Path) -> ArmResult:
    """Reads the file that `save` wrote. Raises UserError naming it where it is damaged."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object; run its arm again with `lapa study run`")
    result = configs.from_dict(ArmResult, {**values, "folder": str(path.parent)}, source=str(path))
    for curve in result.curves:
        if not all(type(row.get("step")) is int for row in curve.rows):
            raise UserError(f"{path}: a row of the curve {curve.name!r} has no step; run its arm again")
    return result


def load_results(studies: Sequence[Path]) -> list[ArmResult]:
    """The results of one study in several folders, ordered by setting, arm and seed.

    Raises UserError where there is none, where presets or sizes differ, and where two folders disagree on a result.
    """
    found: dict[str, ArmResult] = {}
    for study in studies:
        paths = find_files(study / FOLDER, "*.json")
        if not paths:
            raise UserError(f"{study}: no results; make some with `lapa study run --out {study}`")
        for path in paths:
            result = load_result(path)
            first = next(iter(found.values()), result)
            then, now = ({"preset": each.preset, "sizes": each.sizes} for each in (first, result))
            if changed := configs.differences(then, now):
                raise UserError(
                    f"{path}: of another study than {first.folder} ({'; '.join(changed)}); report them apart"
                )
            same = found.setdefault(result.name, result)
            if same.rollouts != result.rollouts:
                raise UserError(f"{path}: differs from {same.folder / path.name}; leave one of them out")
    return sorted(found.values(), key=lambda result: result.place)
