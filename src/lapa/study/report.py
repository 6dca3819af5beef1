"""`lapa study report`: turns the results of a study into tables and plots.

    lapa study report runs/study
    lapa study report slice1 slice2 slice3 --out runs/report        # results of several machines, as one study

Reads the results that `lapa study run` wrote to STUDY/results, and nothing else. Writes table.md, report.json and PNGs;
`lapa view STUDY` shows them on a page, with images of rollouts. The intervals: lapa.study.statistics. The meaning of
each figure: docs/metrics.md. The paper is LAPA (Ye et al., https://arxiv.org/abs/2410.11758).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa.console import finish, print_results
from lapa.errors import UserError
from lapa.files import claim_output, write_json, write_text
from lapa.locks import locks_output
from lapa.study import plots
from lapa.study.blocks import Block, Bullets, Figure, Heading, Paragraph, Table, markdown, rich_table
from lapa.study.config import ReportConfig
from lapa.study.results import ARMS, SPLITS, Arm, ArmResult, load_results
from lapa.study.statistics import LEAST_GOALS, NUM_DRAWS, TOO_FEW, TRAININGS, Estimate, Gap, Group, by_wording, compare
from lapa.verdicts import LEAST_SEEDS, LEVELS, Level, Verdict

MARKDOWN, REPORT = "table.md", "report.json"
TITLE = "Does latent pretraining pay?"
MAX_VALUES = 4  # of one setting that are shown

QUESTION = (
    "Demonstrations with a robot's actions are expensive, videos are plenty. With only a few labelled episodes of each "
    "task, does it pay to pretrain a robot policy on videos without actions? The arms have the same labelled episodes, "
    "finetuning budget, goals in the simulator and (except unipi) network. They differ in their use of the videos:"
)
# Of the arms, then of the splits.
MEANINGS = (
    ("scratch", "trained on the labelled episodes alone."),
    (
        "captions",
        "a control: pretrained as lapa, but with the codes of other frames; only images and captions are true.",
    ),
    (
        "vpt",
        "pretrained on actions that an inverse dynamics model of the labelled episodes predicts for the videos.",
    ),
    ("unipi", "a video model predicts the next frames, the inverse dynamics model the actions between them."),
    ("lapa", "pretrained to predict latent actions: codes for the change between two frames, learned without actions."),
    ("actionvla", "pretrained on the true actions of the videos, which no other arm may use: the upper bound."),
    ("in-domain", "the videos show the tasks of the labelled episodes, in the same surroundings."),
    ("cross-task", "the videos show other tasks."),
    ("cross-environment", "the videos show the same tasks from another camera, in other colours and textures."),
    ("cross-embodiment", "the videos show the same tasks done by a hand, and no robot."),
)
INTERVALS = (
    f"Intervals are 95% percentile intervals of {NUM_DRAWS} draws of the goals of each task, the same for every arm "
    f"(differences are paired), each with {TRAININGS} draws of the error of a mean over few trainings, by Student's t "
    "over the seeds. With one seed they cover goals alone and hold for that training only. "
    f"Under {LEAST_GOALS} goals a task there is no interval. The success rate is the mean over tasks of the mean over "
    "seeds. Gap recovered is (arm - scratch) / (actionvla - scratch): 0 is no better than without video, 1 is as good "
    "as with true actions. Mean rank: 1 is the best arm, over the tasks and seeds that all arms played."
)
WHY_WORDING = (
    "Videos come with captions in every phrasing of a task, the few labelled episodes contain only some. On goals in a "
    "wording that scratch was not trained on (unheard), an arm with video may win by the captions alone; on heard "
    "goals scratch knows the words too."
)


@dataclass(frozen=True)
class Findings:
    """Everything in the report. heard, unheard: groups on goals whose wording the labelled episodes contain, or not."""

    results: tuple[ArmResult, ...]
    groups: tuple[Group, ...]
    heard: tuple[Group, ...]
    unheard: tuple[Group, ...]


@locks_output
def run(config: ReportConfig) -> None:
    """`lapa study report`. Raises UserError where there are no results, or results of different studies."""
    if not config.studies:
        raise UserError("name at least one folder of a study: lapa study report STUDY")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('the report needs matplotlib; install it: pip install "lapa-vla[study]"')
    found = findings(load_results(config.studies))
    out = config.out or config.studies[0] / "report"
    claim_output(
        out, complete=(out / REPORT).exists(), overwrite=config.overwrite, resumable=False, inputs=config.studies
    )
    blocks = content(found, draw(found, out))
    notes = cautions(found.results)
    verdict = verdict_of(found.groups, notes)
    figures = {**as_json(found), "verdict": verdict.as_json()}
    write_text(out / MARKDOWN, markdown(TITLE, blocks))
    write_json(out / REPORT, figures)
    tables = map(rich_table, map(short_table, found.groups))
    lines = [*comparisons(found.groups), str(verdict)]
    print_results(figures, *notes, *tables, *lines, as_json=config.json)
    first, *others = map(str, config.studies)
    page = shlex.join(["lapa", "view", first, *(["--compare", *others] if others else [])])
    finish(f"{MARKDOWN}, {REPORT} and plots", out, [page])


def verdict_of(groups: Sequence[Group], cautions: Sequence[str] = ()) -> Verdict:
    """Whether latent pretraining pays: good where LAPA is above scratch in every group, of LEAST_SEEDS seeds or more.

    Bad where it is below scratch in one, doubtful otherwise, as with cautions and where a group lacks one of the two.
    """
    differences = {group.name: group.cells["lapa"].versus.get("scratch") for group in groups if "lapa" in group.cells}
    known = {name: difference for name, difference in differences.items() if difference is not None}
    if not known:
        return Verdict("doubtful", ("no group has both lapa and scratch",))
    levels: dict[str, Level] = {
        name: "bad" if each.sign < 0 else "good" if each.sign > 0 and each.num_seeds >= LEAST_SEEDS else "doubtful"
        for name, each in known.items()
    }
    worst = max(levels.values(), key=LEVELS.index)
    reasons = [f"{name}: {comparison('lapa', 'scratch', known[name])}" for name in known if levels[name] == worst]
    few = min(each.num_seeds for each in known.values()) < LEAST_SEEDS
    verdict = Verdict(worst, (*reasons, *([f"fewer than {LEAST_SEEDS} seeds"] if few else [])))
    skipped = [f"not judged for lack of lapa or scratch: {group.name}" for group in groups if group.name not in known]
    for reason in reversed([*cautions, *skipped]):
        verdict = verdict.at_best_doubtful(reason)
    return verdict


def findings(results: Sequence[ArmResult]) -> Findings:
    """Compares the arms. Raises UserError where no result has a rollout."""
    groups = compare(results)
    if not groups:
        raise UserError(f"{results[0].folder}: no result has a rollout; run `lapa study run` to its end")
    return Findings(tuple(results), groups, by_wording(results, heard=True), by_wording(results, heard=False))


def content(found: Findings, drawn: Mapping[str, Path]) -> list[Block]:
    """The report for a reader who does not know the paper. drawn: caption -> file of each plot."""
    lines = cautions(found.results)
    blocks: list[Block] = [Bullets(tuple(("", line) for line in lines), highlighted=True)] if lines else []
    blocks += [
        Paragraph(QUESTION),
        Bullets(MEANINGS),
        Heading("Results"),
        Bullets(tuple(("", line) for line in comparisons(found.groups)), highlighted=True),
        main_table(found.groups),
        Paragraph(INTERVALS),
    ]
    if found.heard or found.unheard:
        blocks += [wording_table(found.heard, found.unheard), Paragraph(WHY_WORDING)]
    blocks += [Figure(path, caption) for caption, path in drawn.items()]
    blocks += [*_images_of_runs(found), Heading("Tables"), *map(task_table, detailed_groups(found.groups))]
    title = "Seconds of each stage, mean over runs; a stage that several runs share counts in each"
    tables = (
        means_table("Figures of the runs, mean over each arm", found.results, lambda run: run.figures, digits=3),
        means_table(title, found.results, _seconds, digits=0),
        settings_table(found.results),
    )
    return [*blocks, *(table for table in tables if table.rows)]


def detailed_groups(groups: Sequence[Group]) -> list[Group]:
    """Returns one group a split, to be shown in detail: the one with most arms.

    Of several, the one whose number of labelled episodes most groups share, then the one with fewest.
    """
    numbers = [group.demonstrations for group in groups]
    best: dict[str, Group] = {}
    for group in sorted(groups, key=lambda g: (-len(g.cells), -numbers.count(g.demonstrations), g.demonstrations)):
        best.setdefault(group.split, group)
    return [best[split] for split in SPLITS if split in best]


def draw(found: Findings, out: Path) -> dict[str, Path]:
    """Writes the plots that the results allow; returns caption -> file."""
    detailed = detailed_groups(found.groups)
    text = "Success by arm and split; the black lines are 95% intervals."
    drawings: list[tuple[str, str, Any]] = [
        ("success", text, plots.success_by_split(found.groups)),
        ("tasks", "Success by task, %.", plots.success_by_task(detailed)),
    ]
    if len(found.groups) > len(detailed):
        text = "Success against the number of labelled episodes, with 95% intervals."
        drawings.append(("demonstrations", text, plots.success_by_demonstrations(found.groups)))
    for group in detailed:
        text = f"Learning curves, a line each run: {group.name}. Losses of different arms are not comparable."
        drawings.append((f"curves-{group.split}", text, plots.learning_curves(_runs_of(group, found))))
    drawings = [drawing for drawing in drawings if drawing[2] is not None]
    for name, _, figure in drawings:
        plots.save(figure, out / f"{name}.png")
    return {caption: out / f"{name}.png" for name, caption, _ in drawings}


def _runs_of(group: Group, found: Findings) -> list[ArmResult]:
    key = (group.split, group.demonstrations)
    return [result for result in found.results if (result.split, result.demonstrations) == key]


def _images_of_runs(found: Findings) -> list[Block]:
    """Rollouts of each arm, and the effect of the codes: of each split, the first seed that has an image."""
    blocks: list[Block] = []
    for group in detailed_groups(found.groups):
        runs = _runs_of(group, found)
        for arm in group.cells:
            for result, path in [(run, run.strip) for run in runs if run.arm == arm and run.strip][:1]:
                text = f"{arm}: rollouts of seed {result.seed}, {group.name}. Each row is a task, from start to end."
                blocks.append(Figure(path, text))
        for result, path in [(run, run.codes) for run in runs if run.codes][:1]:
            text = (
                f"What the codes of the latent action model do, seed {result.seed}, {group.name}. Each row is a pair "
                "of frames: what changes between them, and what the model changes with their own and with other codes."
            )
            blocks.append(Figure(path, text))
    return blocks


def as_json(found: Findings) -> dict[str, Any]:
    """All figures, for programs. Rollouts and curves stay in the study's results."""
    return {
        "preset": found.results[0].preset,
        "sizes": found.results[0].sizes,
        "cautions": cautions(found.results),
        "comparisons": comparisons(found.groups),
        "groups": [dataclasses.asdict(group) for group in found.groups],
        "heard": [dataclasses.asdict(group) for group in found.heard],
        "unheard": [dataclasses.asdict(group) for group in found.unheard],
        "runs": [
            {
                "name": result.name,
                "success": result.success_rate(),
                "num_rollouts": len(result.rollouts),
                "figures": result.figures,
                "seconds": result.seconds,
                "provenance": result.provenance,
            }
            for result in found.results
        ],
    }


def cautions(results: Sequence[ArmResult]) -> list[str]:
    """Notes that a reader needs before any number."""
    lines = ["preset debug: these numbers measure nothing"] if results[0].preset == "debug" else []
    versions = {str(result.provenance.get("code", "not noted")) for result in results}
    if len(versions) > 1:
        lines.append(f"the runs are of {len(versions)} versions of the code (report.json has each)")
    lines += [
        f"{each.name}: {each.errors} episodes ended in an error and are left out" for each in results if each.errors
    ]
    return lines


def comparisons(groups: Sequence[Group]) -> list[str]:
    """One line for each arm against scratch, and for lapa against vpt."""
    return [
        f"{group.name}: {comparison(arm, other, difference)}"
        for group in groups
        for arm, cell in group.cells.items()
        for other, difference in cell.versus.items()
    ]


def comparison(arm: Arm, other: Arm, difference: Estimate) -> str:
    """Returns the comparison as a sentence: above, below, indistinguishable, or too few rollouts."""
    seeds = "1 seed, goals alone" if difference.num_seeds == 1 else f"{difference.num_seeds} seeds"
    if difference.low is None or difference.high is None:
        return f"{arm} is not compared with {other}: {TOO_FEW} ({_points(difference.value):+.1f} points, {seeds})"
    interval = f"95% interval {_points(difference.low):+.1f} to {_points(difference.high):+.1f}, {seeds}"
    if difference.sign:
        side = "above" if difference.sign > 0 else "below"
        return f"{arm} is {abs(_points(difference.value)):.1f} points {side} {other} ({interval})"
    return (
        f"{arm} and {other} are statistically indistinguishable: {_points(difference.value):+.1f} points ({interval})"
    )


def main_table(groups: Sequence[Group]) -> Table:
    """Success, difference to scratch, gap recovered and rank of each arm."""
    rows = [
        (
            f"{group.split}, {group.demonstrations}",
            arm,
            _percent(cell.success),
            str(len(cell.seeds)),
            str(cell.num_rollouts),
            _difference(cell.versus.get("scratch")),
            gap_text(cell.gap),
            "-" if cell.mean_rank is None else f"{cell.mean_rank:.2f}",
        )
        for group in groups
        for arm, cell in group.cells.items()
    ]
    header = ("split, labelled episodes a task", "arm", "success, %", "seeds", "rollouts", "minus scratch, points")
    return Table("Success of each arm, with 95% intervals", (*header, "gap recovered", "mean rank"), tuple(rows))


def short_table(group: Group) -> Table:
    """The part of the main table that is shown in a terminal: it fits into 80 columns."""
    rows = [
        (arm, _percent(cell.success), _difference(cell.versus.get("scratch")), gap_text(cell.gap))
        for arm, cell in group.cells.items()
    ]
    return Table(group.name, ("arm", "success, %", "minus scratch, points", "gap recovered"), tuple(rows))


def wording_table(heard: Sequence[Group], unheard: Sequence[Group]) -> Table:
    """Success on the goals whose wording the labelled episodes contain, and on the others."""
    both = [{f"{each.split}, {each.demonstrations}": each.cells for each in groups} for groups in (heard, unheard)]
    rows = []
    for name in dict.fromkeys([*both[0], *both[1]]):
        own, other = (found.get(name, {}) for found in both)
        for arm in (arm for arm in ARMS if arm in own or arm in other):
            rates = [_percent(cells[arm].success) if arm in cells else "-" for cells in (own, other)]
            rows.append((name, arm, *rates, _difference(own[arm].versus.get("scratch") if arm in own else None)))
    header = ("split, labelled episodes a task", "arm", "success on heard goals, %", "success on unheard goals, %")
    return Table("By wording", (*header, "minus scratch on heard goals, points"), tuple(rows))


def task_table(group: Group) -> Table:
    tasks = sorted({task for cell in group.cells.values() for task in cell.by_task})
    rates = [[cell.by_task.get(task) for cell in group.cells.values()] for task in tasks]
    rows = [
        (task, *("-" if rate is None else f"{100 * rate:.0f}" for rate in row))
        for task, row in zip(tasks, rates, strict=True)
    ]
    return Table(f"Success by task, %: {group.name}", ("task", *group.cells), tuple(rows))


def means_table(
    title: str, results: Sequence[ArmResult], values_of: Callable[[ArmResult], Mapping[str, float]], digits: int
) -> Table:
    """The mean of each value over the runs of an arm that have it."""
    found: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for name, value in values_of(result).items():
            found.setdefault(name, {}).setdefault(result.arm, []).append(value)
    arms = [arm for arm in ARMS if any(result.arm == arm for result in results)]
    rows = [
        (name, *(f"{sum(each[arm]) / len(each[arm]):.{digits}f}" if arm in each else "-" for arm in arms))
        for name, each in found.items()
    ]
    return Table(title, ("mean", *arms), tuple(rows))


def _seconds(result: ArmResult) -> Mapping[str, float]:
    """Seconds of a run's stages, without the arm in their names."""
    stages = {result.stage_of(title): seconds for title, seconds in result.seconds.items()}
    return {"all of a run": sum(stages.values()), **stages} if stages else {}


def settings_table(results: Sequence[ArmResult]) -> Table:
    """Sizes, versions, hardware and commands, with the different values of each entry."""
    found: dict[str, list[str]] = {}

    def collect(entries: Mapping[str, Any], prefix: str = "") -> None:
        for key, value in entries.items():
            if isinstance(value, Mapping):
                collect(value, f"{prefix}{key}.")
            elif str(value) not in found.setdefault(prefix + key, []):
                found[prefix + key].append(str(value))

    for result in results:
        collect({"preset": result.preset, **result.sizes, **result.provenance})
    rows = []
    for key, values in found.items():
        more = f"; and {len(values) - MAX_VALUES} others" if len(values) > MAX_VALUES else ""
        rows.append((key, "; ".join(values[:MAX_VALUES]) + more))
    return Table("Sizes, versions, hardware, commands", ("setting", "values"), tuple(rows))


def _difference(estimate: Estimate | None) -> str:
    """A difference of success rates, and its seeds where they are few: `+12.0 [4.0, 20.0] (1 seed)`."""
    if estimate is None:
        return "-"
    seeds = f" ({estimate.num_seeds} seed{'s' if estimate.num_seeds > 1 else ''})"
    return f"{_points(estimate.value):+.1f} {_interval(estimate)}{seeds if estimate.num_seeds < LEAST_SEEDS else ''}"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} {_interval(estimate)}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"({TOO_FEW})"
    return f"[{_points(estimate.low):.1f}, {_points(estimate.high):.1f}]"


def gap_text(gap: Gap | None) -> str:
    if gap is None:
        return "-"
    value = "-" if gap.value is None else f"{gap.value:.2f}"
    return f"{value} ({gap.note})" if gap.low is None else f"{value} [{gap.low:.2f}, {gap.high:.2f}]"


def _points(rate: float) -> float:
    """Percentage points, rounded to a tenth; never -0.0."""
    return round(100 * rate, 1) + 0.0
