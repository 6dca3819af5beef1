"""What one arm of a study gave under one seed: a small JSON file, the only thing that `lapa study report` reads.

    STUDY/results/in-domain-2-lapa-0.json      split, labelled episodes a task, arm, seed
    STUDY/results/in-domain-2-lapa-0.png       a strip of its rollouts
    STUDY/results/in-domain-2-lapa-0-codes.png what the codes of its latent action model do (arm lapa)

So results of several machines are merged by giving `report` all their folders, or by copying files together.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lapa import config as configs
from lapa.errors import UserError
from lapa.files import read_json, write_json

Arm = Literal["scratch", "vpt", "unipi", "lapa", "actionvla"]
Split = Literal["in-domain", "cross-task", "cross-environment"]
ARMS: tuple[Arm, ...] = typing.get_args(Arm)
SPLITS: tuple[Split, ...] = typing.get_args(Split)
FOLDER = "results"
# Beside them: what the study was begun with, and how long its steps took, by which code.
SETTINGS, SECONDS = "study.json", "seconds.jsonl"


@dataclass(frozen=True)
class Rollout:
    """How one evaluation episode ended.

    heard: whether the labelled episodes hold its instruction word for word, or only another phrasing of it; None where
    a task has one phrasing. Videos with captions teach more phrasings than a few labelled episodes hold.
    """

    task: str
    episode: int
    success: bool
    steps: int
    heard: bool | None = None


@dataclass(frozen=True)
class Curve:
    """Figures of a training run: `name` of the stage (pretraining, finetuning, ...), rows as its metrics.jsonl has

    them: {"step": 20, "seconds": 3.1, "loss": 2.0, ...}; rows of evaluations also hold "eval/..." figures.
    """

    name: str
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class ArmResult:
    """One arm under one seed.

    preset, sizes: what the study was run at; results of one study have the same. demonstrations: labelled episodes a
    task. figures: what explains the success rate, by name (docs/metrics.md), such as token_accuracy, action_error,
    lam_linear_r2. seconds: of each stage that ran. provenance: the command, versions and hardware.
    """

    arm: Arm
    split: Split
    demonstrations: int
    seed: int
    preset: str
    sizes: dict[str, Any]
    rollouts: tuple[Rollout, ...]
    figures: dict[str, float] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()
    """Where it was read from; not saved."""

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.split}-{self.demonstrations}-{self.arm}-{self.seed}"

    @property
    def strip(self) -> Path | None:
        """The picture of its rollouts, where there is one."""
        return _existing(self.folder / f"{self.name}.png")

    @property
    def codes(self) -> Path | None:
        """The picture of its latent action model's codes, where there is one."""
        return _existing(self.folder / f"{self.name}-codes.png")

    def save(self, study: Path) -> Path:
        """Writes STUDY/results/NAME.json and returns its path."""
        path = study / FOLDER / f"{self.name}.json"
        values = configs.to_dict(self)
        del values["folder"]
        write_json(path, values)
        return path


def load_result(path: Path) -> ArmResult:
    """Reads what `save` wrote. UserError naming the file."""
    values = read_json(path)
    return configs.from_dict(ArmResult, {**values, "folder": str(path.parent)}, source=str(path))


def load_results(studies: Sequence[Path]) -> list[ArmResult]:
    """The results of one study in several folders, ordered by split, labelled episodes, arm and seed.

    UserError where there is none, where they are of different presets or sizes, or where two folders disagree on one.
    """
    found: dict[str, ArmResult] = {}
    for study in studies:
        paths = sorted((study / FOLDER).glob("*.json"))
        if not paths:
            raise UserError(f"{study}: holds no results; make some with `lapa study run --out {study} --arm ARM`")
        for path in paths:
            result = load_result(path)
            _require_one_study(next(iter(found.values()), result), result)
            twin = found.setdefault(result.name, result)
            if twin.rollouts != result.rollouts:
                raise UserError(f"{path}: differs from {twin.folder / path.name}; leave one of them out")
    return sorted(found.values(), key=lambda r: (SPLITS.index(r.split), r.demonstrations, ARMS.index(r.arm), r.seed))


def _require_one_study(first: ArmResult, other: ArmResult) -> None:
    then, now = ({"preset": result.preset, "sizes": result.sizes} for result in (first, other))
    if changed := configs.differences(then, now):
        raise UserError(
            f"{other.folder / other.name}.json: not of the study in {first.folder} ({'; '.join(changed)}); "
            "report them one by one"
        )


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
