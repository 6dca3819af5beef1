"""The page of results: success by task with intervals, and rollouts of several arms side by side.

    about               what is shown, and the names of the groups
    group-G             the arms that are compared with each other: success rates, differences, and every rollout
    V.mp4               the video with number V

An arm is one evaluation; those of one environment and seed play the same episodes and are one group. `lapa view STUDY`
is the same page with the arms of a study (lapa.view.study).
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lapa.checksums import SUMS
from lapa.errors import UserError
from lapa.evaluation.rollout import CONFIG, RESULTS, ROW, VIDEOS, played, read_results, results_folders, wilson_interval
from lapa.files import distinct_names, find_files
from lapa.hub.artifacts import KINDS, without_paths
from lapa.hub.download import hub_folder
from lapa.study.results import Rollout
from lapa.study.statistics import Estimate, estimate, shared
from lapa.view.config import ViewConfig
from lapa.view.pages import Pages, UnknownNameError

# Episodes with videos in an export.
EXPORTED = 50
# What is shown, and so what is fetched from the hub.
FILES = (RESULTS, CONFIG, SUMS, f"{VIDEOS}/*")
FILE = re.compile(r"([0-9]{1,9})\.(mp4|png)")
# Of the report: what an arm is described by.
FACTS = {
    "policy": "policy",
    "policy_fingerprint": "fingerprint of the policy",
    "config.max_steps": "most steps of an episode",
    "config.steps_per_call": "steps for a call of the policy",
    "config.ensemble": "ensemble",
    "config.size": "image size",
    "seconds": "seconds",
    **dict.fromkeys(("lapa", "torch", "python"), ""),
    "gpu": "GPU",
    "machine": "machine",
}
# What a report has as text; any other is the version of a package of the environment.
TEXTS = {*FACTS, "env", "command"}
# Begins a note of an environment whose figures are not the benchmark's own (EnvironmentKind).
STAND_IN = "stand-in"


@dataclass(frozen=True)
class Run:
    """Rollouts of one arm. seed: rollouts of two arms with the same seed, task and episode are paired.

    videos: by their names in the folder of videos. recorded: rollouts of a task that a file of its own holds side by
    side, in results of earlier versions.
    """

    arm: str
    seed: int
    rollouts: Sequence[Rollout]
    videos: Mapping[str, Path] = field(default_factory=dict)
    recorded: int = 1

    def video(self, rollout: Rollout) -> tuple[Path, int, int, int] | None:
        """The file of a rollout, how many columns and rows of rollouts it has, and the place of this one."""
        if own := self.videos.get(f"{rollout.task}-{rollout.episode}.mp4"):
            return own, 1, 1, 0
        several = self.videos.get(f"{rollout.task}.mp4")
        if several is None or not 0 <= rollout.episode < self.recorded:
            return None
        columns = math.ceil(math.sqrt(self.recorded))
        return several, columns, -(-self.recorded // columns), rollout.episode


@dataclass(frozen=True)
class Group:
    """Runs that are compared with each other, several of an arm where it has several seeds."""

    name: str
    runs: Sequence[Run]

    @cached_property
    def arms(self) -> dict[str, list[Run]]:
        arms: dict[str, list[Run]] = {}
        for run in self.runs:
            arms.setdefault(run.arm, []).append(run)
        return arms


class RolloutPages(Pages):
    """The data of a page of rollouts. limit: most episodes with videos, of an export; None: all."""

    body = "results.html"
    numbers = {"about": 0, "group": 1}  # noqa: RUF012

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self._limit = limit
        self._files: dict[Path, int] = {}
        self._without_video: dict[int, int] = {}

    @property
    @abstractmethod
    def groups(self) -> Sequence[Group]:
        """What is compared."""

    @abstractmethod
    def interval(self, runs: Sequence[Run]) -> tuple[float, float | None, float | None]:
        """The success rate of an arm over the rollouts of these runs, and the ends of its interval."""

    @abstractmethod
    def notes(self, group: Group) -> list[str]:
        """The differences of arms, a sentence each."""

    @property
    def left_out(self) -> str:
        num = sum(self._without_video.values())
        return f"{num} episodes without their videos; --limit takes more" if num else ""

    def names(self) -> Iterator[str]:
        yield "about"
        yield from (f"group-{number}" for number in range(len(self.groups)))

    def files(self) -> Iterator[str]:
        # Files have their numbers from the data that name them.
        for name in self.names():
            self.json(name)
        yield from (f"{number}{path.suffix}" for path, number in self._files.items())

    def file(self, name: str) -> Path:
        match = FILE.fullmatch(name)
        with self.lock:
            files = list(self._files)
            if match is None or int(match[1]) >= len(files) or files[int(match[1])].suffix != f".{match[2]}":
                raise UnknownNameError(name)
            return files[int(match[1])]

    def number(self, path: Path) -> int:
        """The number by which the page asks for a file."""
        return self._files.setdefault(path, len(self._files))

    def _group(self, number: int) -> dict[str, Any]:
        if number >= len(self.groups):
            raise UnknownNameError(number)
        group = self.groups[number]
        tasks = list(dict.fromkeys(rollout.task for run in group.runs for rollout in run.rollouts))
        rows = [(task, [self._rate(runs, task) for runs in group.arms.values()]) for task in (None, *tasks)]
        return {
            "name": group.name,
            "arms": list(group.arms),
            "tasks": [{"name": task, "arms": arms} for task, arms in rows],
            "notes": self.notes(group),
            **self._rollouts(number),
        }

    def _rate(self, runs: Sequence[Run], task: str | None) -> dict[str, Any] | None:
        """The success rate on a task, or on all; None without rollouts."""
        runs = [replace(run, rollouts=[each for each in run.rollouts if task in (None, each.task)]) for run in runs]
        outcomes = [rollout.success for run in runs for rollout in run.rollouts]
        if not outcomes:
            return None
        rate, low, high = self.interval(runs)
        return {"rate": rate, "low": low, "high": high, "successes": sum(outcomes), "episodes": len(outcomes)}

    def _rollouts(self, number: int) -> dict[str, Any]:
        """Columns of the rollouts: task, episode and seed of each, and by arm its success, steps and video or null."""
        group = self.groups[number]
        found = {
            arm: {(run.seed, each.task, each.episode): (run, each) for run in runs for each in run.rollouts}
            for arm, runs in group.arms.items()
        }
        keys = list(dict.fromkeys(key for each in found.values() for key in each))
        videos = {key: [video if (video := _video(each.get(key))) else None for each in found.values()] for key in keys}
        with_video = [key for key in keys if any(videos[key])]
        shown = set(with_video)
        if self._limit is not None and len(with_video) > self._limit:
            shown = {with_video[place * len(with_video) // self._limit] for place in range(self._limit)}
        self._without_video[number] = len(with_video) - len(shown)
        return {
            "seed": [seed for seed, _, _ in keys],
            "task": [task for _, task, _ in keys],
            "episode": [episode for _, _, episode in keys],
            "success": [[each[key][1].success if key in each else None for key in keys] for each in found.values()],
            "steps": [[each[key][1].steps if key in each else None for key in keys] for each in found.values()],
            "video": [
                [
                    [self.number(video[0]), *video[1:]] if key in shown and (video := videos[key][place]) else None
                    for key in keys
                ]
                for place in range(len(found))
            ],
        }


class ResultsPages(RolloutPages):
    """The data of the page of results. folders: of `lapa evaluate`, by the name of the arm."""

    def __init__(self, folders: Mapping[str, Path], limit: int | None) -> None:
        super().__init__(limit)
        self.folders = folders
        self._read()

    @property
    def summary(self) -> str:
        rollouts = sum(len(run.rollouts) for group in self.groups for run in group.runs)
        return f"{len(self.folders)} evaluation{'s' if len(self.folders) > 1 else ''}, {rollouts} rollouts"

    @property
    def inputs(self) -> list[str | Path]:
        return list(self.folders.values())

    @property
    def groups(self) -> Sequence[Group]:
        return self._groups

    def _read(self) -> None:
        """Reads the results as they are now; more rollouts come while an evaluation runs."""
        self._reports = {arm: read_results(folder) for arm, folder in self.folders.items()}
        groups: dict[str, list[Run]] = {}
        for arm, report in self._reports.items():
            rollouts = [Rollout(**{name: row[name] for name in ROW}) for row in played(report["episodes"])]
            asked = [report["config"].get(name) for name in ("videos", "episodes")]
            recorded = min([number for number in asked if type(number) is int and number > 0], default=1)
            run = Run(arm, report["seed"], rollouts, videos_of(self.folders[arm]), recorded)
            groups.setdefault(f"{report['env']}, seed {report['seed']}", []).append(run)
        self._groups = [Group(name, runs) for name, runs in groups.items()]

    def _about(self) -> dict[str, Any]:
        self._read()
        reports = self._reports.values()
        packages = {name for each in reports for name, value in each.items() if isinstance(value, str)} - TEXTS
        facts = [
            *([title or name, [_text(_at(each, name)) for each in reports]] for name, title in FACTS.items()),
            *([name, [_text(each.get(name)) for each in reports]] for name in sorted(packages)),
            *([name, [_text(_notes(each).get(name)) for each in reports]] for name in _names(map(_notes, reports))),
        ]
        state = [self._state(arm) for arm in self._reports]
        return {
            "name": ", ".join(self.folders) if len(self.folders) < 4 else f"{len(self.folders)} evaluations",
            "facts": [self.summary],
            "cautions": [*self._cautions()],
            "groups": [group.name for group in self._groups],
            "arms": list(self._reports),
            "settings": [
                ["state", state],
                ["environment, seed", [f"{report['env']}, {report['seed']}" for report in self._reports.values()]],
                *(row for row in facts if any(row[1])),
            ],
        }

    def _cautions(self) -> Iterator[str]:
        """What a reader needs to know before any number: stand-ins, errors, and arms that are not alike."""
        for arm, report in self._reports.items():
            for name, text in _notes(report).items():
                if str(text).startswith(STAND_IN):
                    yield f"{arm}: {name}: {_text(text)}"
            if errors := len(report["episodes"]) - len(played(report["episodes"])):
                yield f"{arm}: {errors} episodes ended in an error, and count neither as successes nor as failures"
        for group in self._groups:
            reports = [self._reports[run.arm] for run in group.runs]
            differing = _differing(map(_notes, reports))
            if _differing(map(_max_steps, reports)):
                differing.append(FACTS["config.max_steps"])
            if differing:
                yield f"{group.name}: the evaluations differ in {', '.join(differing)}"

    def _state(self, arm: str) -> str:
        if (self.folders[arm] / RESULTS).exists():
            return "finished"
        num = len(played(self._reports[arm]["episodes"]))
        return f"not finished, {num} episodes so far; lapa evaluate --resume goes on"

    def interval(self, runs: Sequence[Run]) -> tuple[float, float | None, float | None]:
        outcomes = [rollout.success for run in runs for rollout in run.rollouts]
        return (sum(outcomes) / len(outcomes), *wilson_interval(sum(outcomes), len(outcomes)))

    def notes(self, group: Group) -> list[str]:
        """Each arm against the first one."""
        (first, *others) = group.arms
        return [_difference(group, arm, first) for arm in others]


def open_results_pages(config: ViewConfig) -> ResultsPages:
    """Opens the pages of results: of one folder, of those in it, or of several with `config.compare`."""
    folders = [folder for path in (config.path, *config.compare) for folder in _folders(path)]
    names = distinct_names(folders)
    if len(set(names)) < len(names):
        raise UserError(f"{config.path}: the same results twice; leave them out of --compare")
    limit = None if config.export is None else config.limit or EXPORTED
    return ResultsPages(dict(zip(names, folders, strict=True)), limit)


def _folders(path: str) -> list[Path]:
    folder = hub_folder(path, FILES, "give a folder of `lapa evaluate`", KINDS["results"].repo_type)
    if folders := results_folders(folder):
        return folders
    raise UserError(f"{path}: holds no results; give a folder of `lapa evaluate`")


def videos_of(folder: Path) -> dict[str, Path]:
    """The videos in a folder of results, by their names below its folder `videos`."""
    return {path.relative_to(folder / VIDEOS).as_posix(): path for path in find_files(folder / VIDEOS, "**/*.mp4")}


def _video(played: tuple[Run, Rollout] | None) -> tuple[Path, int, int, int] | None:
    return None if played is None else played[0].video(played[1])


def _difference(group: Group, arm: str, other: str) -> str:
    """The difference of two arms over the episodes that both played, as a sentence."""
    both = shared(group.arms[arm], group.arms[other])
    if both is None:
        return f"{arm} and {other} have no episode in common"
    difference, goals = estimate(both, (1, -1)), int(both.present_SKE.sum())
    return f"{arm} minus {other}: {_points(difference)}, paired over {goals} episodes that both played"


def _points(difference: Estimate) -> str:
    value = f"{100 * difference.value:+.1f} points"
    if difference.low is None or difference.high is None:
        return f"{value} (too few episodes of a task for an interval)"
    return f"{value} (95% interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def _notes(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the environment noted about itself."""
    notes = report.get("notes")
    return notes if isinstance(notes, dict) else {}


def _max_steps(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The most steps of an episode of each task; none of an evaluation that has not ended and was given no number."""
    steps = report["config"].get("max_steps")
    return steps if isinstance(steps, dict) else dict.fromkeys((row["task"] for row in report["episodes"]), steps)


def _names(values: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in values for name in each))


def _differing(values: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of which several have different values."""
    values = list(values)
    found = {name: [each[name] for each in values if each.get(name) is not None] for name in _names(values)}
    return [name for name, given in found.items() if any(value != given[0] for value in given)]


def _at(report: Mapping[str, Any], name: str) -> Any:
    value: Any = report
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, dict | list) else str(without_paths(value))
