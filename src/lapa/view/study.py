"""The page of a study: the page of results with its arms, its report, and how far its runs are.

about, group-G      as of results; a group is one setting
report              the blocks of `lapa study report`
V.mp4, F.png        videos of rollouts, and figures of the report
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lapa.files import distinct_names, find_files
from lapa.study.plan import Plan
from lapa.study.progress import progress, sizes_in
from lapa.study.report import Block, Figure, cautions, comparison, content, draw, findings
from lapa.study.results import FOLDER, ArmResult, load_results
from lapa.study.statistics import compare, estimate, shared
from lapa.view.config import ViewConfig
from lapa.view.pages import UnknownNameError
from lapa.view.results import EXPORTED, Group, RolloutPages, Run, videos_of


class StudyPages(RolloutPages):
    """The data of the page of a study, in the folders of several machines where there are several."""

    numbers = {**RolloutPages.numbers, "report": 0}  # noqa: RUF012

    def __init__(self, studies: Sequence[Path], limit: int | None) -> None:
        super().__init__(limit)
        self.studies = studies
        self.results: list[ArmResult] = []
        self._compared = compare(self.results)
        self._groups: list[Group] = []
        self._read()

    def _read(self) -> None:
        """Reads the results as they are now; more come while a study runs."""
        studies = [study for study in self.studies if find_files(study / FOLDER, "*.json")]
        results = load_results(studies) if studies else []
        if results == self.results:
            return
        self.results = results
        self._compared = compare(results)
        self._groups = [
            Group(group.name, [self._run(result) for result in results if _is_of(result, group)])
            for group in self._compared
        ]

    @property
    def summary(self) -> str:
        return f"{len(self.results)} runs done"

    @property
    def inputs(self) -> Sequence[Path]:
        return self.studies

    @property
    def groups(self) -> Sequence[Group]:
        return self._groups

    def names(self) -> Iterator[str]:
        yield from super().names()
        if self._groups:
            yield "report"

    def _run(self, result: ArmResult) -> Run:
        """The run of a result, with its videos where the study has them on this machine."""
        study = result.folder.parent
        sizes = sizes_in(study)
        if sizes is None:
            return Run(result.arm, result.seed, result.rollouts)
        plan = Plan(sizes, result.setting, result.seed)
        return Run(result.arm, result.seed, result.rollouts, videos_of(plan.rollouts(result.arm).folder(study)))

    def _about(self) -> dict[str, Any]:
        self._read()
        runs = progress(self.studies)
        done = sum(state.kind == "done" for state in runs.values())
        preset = [f"preset {self.results[0].preset}"] if self.results else []
        return {
            "name": ", ".join(distinct_names(self.studies)),
            "kind": "study",
            "facts": [*preset, f"{done} of {len(runs)} runs done"],
            "cautions": cautions(self.results) if self.results else ["no run is done yet"],
            "groups": [group.name for group in self._groups],
            "settings": [],
            "runs": [
                {**dataclasses.asdict(run), "kind": state.kind, "text": state.text}
                for run, state in sorted(runs.items(), key=lambda item: item[0].place)
            ],
            "report": bool(self._groups),
        }

    def interval(self, runs: Sequence[Run]) -> tuple[float, float | None, float | None]:
        rollouts = shared(runs)
        assert rollouts is not None, "there are rollouts"
        found = estimate(rollouts, (1,))
        return found.value, found.low, found.high

    def notes(self, group: Group) -> list[str]:
        cells = self._compared[self._groups.index(group)].cells
        return [
            comparison(arm, other, difference)
            for arm, cell in cells.items()
            for other, difference in cell.versus.items()
        ]

    def _report(self) -> dict[str, Any]:
        if not self._groups:
            raise UnknownNameError("report")
        found = findings(self.results)
        drawn = draw(found, self.folder) if importlib.util.find_spec("matplotlib") else {}
        return {"blocks": [self._block(block) for block in content(found, drawn)]}

    def _block(self, block: Block) -> dict[str, Any]:
        kind = type(block).__name__.lower()
        if isinstance(block, Figure):
            return {"kind": kind, "file": self.number(block.path), "caption": block.caption}
        return {"kind": kind, **dataclasses.asdict(block)}


def open_study_pages(config: ViewConfig) -> StudyPages:
    """Opens the pages of a study; `config.compare`: its folders of other machines."""
    studies = [Path(path) for path in (config.path, *config.compare)]
    return StudyPages(studies, None if config.export is None else config.limit or EXPORTED)


def _is_of(result: ArmResult, group: Any) -> bool:
    return result.setting == group.setting and bool(result.rollouts)
