"""`lapa study report`: from the results of a study to a page, tables and figures.

    lapa study report runs/study
    lapa study report slice1 slice2 slice3 --out runs/report        # results of several machines, as one study

Reads what `lapa study run` left in STUDY/results (lapa.study.results) and nothing else. Writes report.html (one file,
loads nothing), table.md, report.json and PNGs. A study that is not whole is reported as what it is: what is missing is
listed. How intervals are made: lapa.study.statistics. What each figure means: docs/metrics.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lapa.console import console, finish, say
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output, write_json
from lapa.study import page
from lapa.study import plots as figures
from lapa.study.page import Table
from lapa.study.results import ARMS, SPLITS, Arm, ArmResult, load_results
from lapa.study.statistics import Group, by_wording, compare, success_of
from lapa.study.tables import (
    ABOUT_CORRELATIONS,
    Correlation,
    correlation_table,
    correlations,
    main_table,
    meanings,
    paper_table,
    provenance_table,
    seconds_table,
    sizes_table,
    task_table,
    wording_table,
)
from lapa.study.verdicts import (
    ARM_MEANINGS,
    CODES,
    INTERVALS,
    PAPER,
    SPLIT_MEANINGS,
    STRIP,
    WHY_WORDING,
    cautions,
    missing,
    verdicts,
    where,
)

PAGE, MARKDOWN, REPORT = "report.html", "table.md", "report.json"
PAPER_ADDRESS = "https://arxiv.org/abs/2410.11758"


@dataclass(frozen=True)
class ReportConfig:
    """Report a study: a page, tables, figures and intervals."""

    studies: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the study; several, as of several machines, are reported as one."""
    out: Path | None = None
    """Folder of the report; by default `report` in the first study."""
    overwrite: bool = False
    """Replace what `out` holds."""


@dataclass(frozen=True)
class Findings:
    """What the report says. verdicts: sentences, by what `where` calls their group.

    heard, unheard: groups on the goals whose wording the labelled episodes hold, and on the others; wording: of both.
    """

    results: tuple[ArmResult, ...]
    groups: tuple[Group, ...]
    heard: tuple[Group, ...]
    unheard: tuple[Group, ...]
    wording: Table
    cautions: list[str]
    verdicts: dict[str, list[str]]
    missing: list[str]
    correlations: list[Correlation]


def run(config: ReportConfig) -> None:
    """`lapa study report`. Raises UserError where there are no results, or of different studies."""
    if not config.studies:
        raise UserError("name at least one folder of a study: lapa study report STUDY")
    figures.require_matplotlib()
    found = findings(load_results(config.studies))
    out = config.out or config.studies[0] / "report"
    claim_output(
        out,
        complete=(out / PAGE).exists(),
        overwrite=config.overwrite,
        resumable=False,
        inputs=config.studies,
    )
    pictures = draw(found, out)
    write_json(out / REPORT, as_json(found))
    _write(out / MARKDOWN, as_markdown(found))
    _write(out / PAGE, as_html(found, pictures))
    for caution in found.cautions:
        say(caution)
    console.print(page.table_rich(main_table(found.groups)))
    if found.wording.rows:
        console.print(page.table_rich(found.wording))
    for group in found.groups:
        say(f"{where(group)}:")
        for sentence in found.verdicts[where(group)]:
            say(f"  {sentence}")
    if found.missing:
        say(f"not whole: {len(found.missing)} things are missing, listed in {MARKDOWN}")
    finish(f"{PAGE}, {MARKDOWN}, {REPORT} and {len(pictures)} figures", out)


def findings(results: Sequence[ArmResult]) -> Findings:
    """What the results say. UserError where none holds a rollout."""
    groups = tuple(group for group in compare(results) if group.cells)
    if not groups:
        raise UserError(f"{results[0].folder}: no result holds a rollout; run `lapa study run` to its end")
    heard, unheard = by_wording(results, heard=True), by_wording(results, heard=False)
    of_heard = {where(group): group for group in heard}
    return Findings(
        results=tuple(results),
        groups=groups,
        heard=heard,
        unheard=unheard,
        wording=wording_table(heard, unheard),
        cautions=cautions(results),
        verdicts={where(group): verdicts(group, of_heard.get(where(group))) for group in groups},
        missing=missing(results, groups),
        correlations=correlations(results),
    )


def chosen(groups: Sequence[Group]) -> list[Group]:
    """One group a split, to be shown in detail: that with most arms.

    Of those, the one whose number of labelled episodes most groups share, and then the least.
    """
    numbers = [group.demonstrations for group in groups]
    best: dict[str, Group] = {}
    for group in sorted(groups, key=lambda g: (-len(g.cells), -numbers.count(g.demonstrations), g.demonstrations)):
        best.setdefault(group.split, group)
    return [best[split] for split in SPLITS if split in best]


def draw(found: Findings, out: Path) -> dict[str, Path]:
    """Writes the PNGs that the results allow; caption -> file."""
    detailed = chosen(found.groups)
    drawings = [
        (
            "success",
            "Success by arm and split; the black lines are 95% intervals (with one seed, over goals alone).",
            figures.success_by_split(found.groups),
        ),
        ("tasks", "Success by task, %.", figures.success_by_task(detailed)),
    ]
    if len(found.groups) > len(detailed):
        text = "Success against the number of labelled episodes, with 95% intervals."
        drawings.append(("demonstrations", text, figures.success_by_demonstrations(found.groups)))
    for group in detailed:
        if (curves := figures.learning_curves(_runs_of(group, found))) is not None:
            text = (
                f"Learning curves, a line each run: {where(group)}. Losses of different arms are of different things."
            )
            drawings.append((f"curves-{group.split}", text, curves))
    if (scatter := figures.figures_against_success(found.results, found.correlations)) is not None:
        text = (
            "What may explain success: a point each run, at their mean success where runs share the very same figure; "
            "the correlations stand in the table below."
        )
        drawings.append(("figures", text, scatter))
    for name, _, figure in drawings:
        figures.save(figure, out / f"{name}.png")
    return {caption: out / f"{name}.png" for name, caption, _ in drawings}


def _runs_of(group: Group, found: Findings) -> list[ArmResult]:
    key = (group.split, group.demonstrations)
    return [result for result in found.results if (result.split, result.demonstrations) == key]


def as_markdown(found: Findings) -> str:
    """For benchmarks/results: verdicts, tables, what is missing."""
    first = found.results[0]
    parts = [
        f"## Study, preset {first.preset}",
        *(f"**{caution}**" for caution in found.cautions),
        *_verdicts_markdown(found),
        page.table_markdown(main_table(found.groups)),
    ]
    if found.wording.rows:
        parts += [f"### {found.wording.title}", WHY_WORDING, page.table_markdown(found.wording)]
    parts += [INTERVALS, "### What is missing", "\n".join(f"- {text}" for text in found.missing) or "Nothing."]
    for table in (*map(task_table, chosen(found.groups)), *_tables(found)):
        parts += [f"### {table.title}", page.table_markdown(table)]
    return "\n\n".join(parts) + "\n"


def _verdicts_markdown(found: Findings) -> list[str]:
    return [f"**{name}.** {' '.join(sentences)}" for name, sentences in found.verdicts.items()]


def _tables(found: Findings) -> list[Table]:
    tables = [paper_table(), correlation_table(found.correlations), seconds_table(found.results)]
    tables += [sizes_table(found.results[0]), provenance_table(found.results)]
    return [table for table in tables if table.rows]


def as_html(found: Findings, pictures: Mapping[str, Path]) -> str:
    """The page, for someone who has not read the paper."""
    first, detailed = found.results[0], chosen(found.groups)
    parts = [page.bullets(found.cautions, "verdicts")] if found.cautions else []
    parts += [
        page.paragraph(
            "Demonstrations with a robot's actions are dear, videos are plenty. If a robot policy has only a few "
            "labelled episodes of each task, does it pay to pretrain it on videos that carry no actions? The five arms "
            "compared here have the same labelled episodes, the same finetuning budget, the same goals to reach in the "
            "simulator and (but for unipi, which plans in pictures) the same network. They differ in what they do with "
            "the videos:"
        ),
        page.terms(ARM_MEANINGS.items()),
        page.paragraph("The videos are, in three splits:"),
        page.terms(SPLIT_MEANINGS.items()),
        page.link(PAPER_ADDRESS, "The method: Latent Action Pretraining from Videos (LAPA), arXiv 2410.11758"),
        page.paragraph(f"Run at the preset {first.preset}; sizes, versions and hardware stand at the end."),
        page.heading("What the numbers say"),
    ]
    for name, sentences in found.verdicts.items():
        parts += [page.heading(name, 3), page.bullets(sentences, "verdicts")]
    parts.append(page.table_html(main_table(found.groups)))
    if found.wording.rows:
        parts += [page.table_html(found.wording), page.paragraph(WHY_WORDING)]
    parts.append(page.paragraph(INTERVALS))
    parts += [page.heading("What is missing"), page.bullets(found.missing or ["Nothing."])]
    parts += [page.heading("Figures"), *(page.picture(path, caption) for caption, path in pictures.items())]
    parts.append(
        page.details("Success by task, in numbers", [page.table_html(task_table(group)) for group in detailed])
    )
    parts += _pictures_of_runs(found, detailed)
    parts += [page.heading("Numbers beside it"), *map(page.table_html, _tables(found))]
    parts.append(page.paragraph(ABOUT_CORRELATIONS))
    if words := meanings(found.results):
        parts += [page.heading("What the figures are", 3), page.terms(words)]
    return page.document("Does latent pretraining pay?", parts)


def _pictures_of_runs(found: Findings, detailed: Sequence[Group]) -> list[str]:
    """Strips of rollouts of each arm, and what codes do: of each split, the first seed that has a picture."""
    strips, codes = [], []
    for group in detailed:
        own = _runs_of(group, found)
        with_strip: dict[Arm, ArmResult] = {}
        for result in (result for result in own if result.strip):
            with_strip.setdefault(result.arm, result)
        for arm, result in with_strip.items():
            assert result.strip is not None
            strips.append(
                page.picture(result.strip, f"{arm}: rollouts of seed {result.seed}, {where(group)} ({STRIP}).")
            )
        for result in [result for result in own if result.codes][:1]:
            assert result.codes is not None
            text = "What the codes of the latent action model do to a picture"
            codes.append(page.picture(result.codes, f"{text}: seed {result.seed}, {where(group)} ({CODES})."))
    parts = [page.heading("Rollouts"), *strips] if strips else []
    return [*parts, page.heading("Codes"), *codes] if codes else parts


def as_json(found: Findings) -> dict[str, Any]:
    """All figures, for programs. Rollouts and curves stay in the study's results."""
    first = found.results[0]
    return {
        "preset": first.preset,
        "sizes": first.sizes,
        "cautions": found.cautions,
        "heard": [dataclasses.asdict(group) for group in found.heard],
        "unheard": [dataclasses.asdict(group) for group in found.unheard],
        "groups": [{**dataclasses.asdict(group), "verdicts": found.verdicts[where(group)]} for group in found.groups],
        "missing": found.missing,
        "correlations": [dataclasses.asdict(each) for each in found.correlations],
        "paper": [
            {**dataclasses.asdict(column), "gap_recovered": {arm: column.gap(arm) for arm in ARMS}} for column in PAPER
        ],
        "runs": [_run_as_json(result) for result in found.results],
    }


def _run_as_json(result: ArmResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "success": success_of(result),
        "num_rollouts": len(result.rollouts),
        "figures": result.figures,
        "seconds": result.seconds,
        "provenance": result.provenance,
    }


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
