"""`lapa study report`: turns the results of a study into tables and plots.

    lapa study report runs/study
    lapa study report slice1 slice2 slice3 --out runs/report        # results of several machines, as one study

Reads the results that `lapa study run` wrote to STUDY/results, and nothing else. Writes table.md, which is short,
report.json and PNGs; `lapa view STUDY` shows them on a page, with all tables and images of rollouts. The intervals:
lapa.study.statistics. The meaning of each figure: docs/metrics.md. The paper is LAPA (Ye et al.,
https://arxiv.org/abs/2410.11758).
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
from lapa.study.results import ARMS, SPLITS, Arm, ArmResult, load_results, settings_of
from lapa.study.statistics import LEAST_GOALS, NUM_DRAWS, TOO_FEW, TRAININGS, Estimate, Gap, Group, by_wording, compare
from lapa.verdicts import LEAST_SEEDS, LEVELS, Level, Verdict

MARKDOWN, REPORT = "table.md", "report.json"
TITLE = "Does latent pretraining pay?"
# What `Setting.short` says.
SETTING = "split, videos and labelled episodes a task"
MAX_VALUES = 4  # of one setting that are shown

QUESTION = (
    "Demonstrations with a robot's actions are expensive, videos are plenty. With only a few labelled episodes of each "
    "task, does it pay to pretrain a robot policy on videos without actions? The arms have the same labelled episodes, "
    "finetuning budget, goals in the simulator and (except unipi) network. They differ in their use of the videos:"
)
# Of the arms, then of the splits.
MEANINGS: tuple[tuple[str, str], ...] = (
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
SEEDS = (
    "A seed has its own videos, labelled episodes, trainings (latent action model, inverse dynamics, video model, "
    "policies) and goals of rollouts, which its arms share. Episodes for action errors and probes are the same for all."
)
INTERVALS = (
    f"Success is the mean over tasks of the mean over seeds. Intervals are 95% percentile intervals of {NUM_DRAWS} "
    f"draws of the goals of each task, the same for every arm (differences are paired), each with {TRAININGS} draws of "
    "the error of a mean over few trainings, by Student's t over the seeds. With one seed they cover goals alone and "
    f"hold for that training only; under {LEAST_GOALS} goals a task there is none. Gap recovered is (arm - scratch) / "
    "(actionvla - scratch): 0 is no better than without video, 1 is as good as with true actions."
)
HEARD = (
    " Heard goals have a wording that the labelled episodes contain (in Language Table: name the same blocks as one of "
    "them): on others an arm with video may win by the captions alone."
)
# Figures that the main text shows.
FIGURES = {
    "inverse_r2": "inverse dynamics: R2 on the videos",
    "inverse_linear_r2": "inverse dynamics: R2 after a linear map",
    "lam_mlp_r2": "codes: R2 of the action",
    "lam_error_of_copying": "codes: error over copying",
    "token_accuracy": "codes predicted by the policy",
}
# Of the stages of an arm, those of its training; what is left is recording, rollouts and measures.
FINETUNING = ("finetuning", "video model finetuning")
FROM_VIDEO = (
    "latent action model", "labels", "shuffled labels", "inverse dynamics", "pseudo-labelled videos", "video model",
    "pretraining", "planner",
)  # fmt: skip
# Success on seen / unseen instructions in Language Table, %, 250 rollouts a cell.
PAPER = Table(
    "The paper's own numbers, Language Table: success, %, seen / unseen",
    ("arm", "in-domain (181k videos, 1k labelled)", "cross-task (7k)", "cross-environment (442k real videos, 1k)"),
    (
        ("scratch", "15.6 / 15.2", "27.2 / 22.4", "15.6 / 15.2"),
        ("vpt", "44.0 / 32.8", "72.0 / 60.8", "18.0 / 18.4"),
        ("unipi", "22.0 / 13.2", "20.8 / 16.0", "13.6 / 12.0"),
        ("lapa", "62.0 / 49.6", "73.2 / 54.8", "33.6 / 29.6"),
        ("actionvla", "77.0 / 58.8", "77.0 / 58.8", "64.8 / 54.0"),
    ),
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
    draw(found, out)
    notes = cautions(found.results)
    verdict = verdict_of(found.groups, notes)
    figures = {**as_json(found), "verdict": verdict.as_json()}
    write_text(out / MARKDOWN, markdown(TITLE, summary(found)))
    write_json(out / REPORT, figures)
    tables = map(rich_table, map(short_table, found.groups))
    lines = [*comparisons(found.groups), str(verdict)]
    print_results(figures, *notes, *tables, *lines, as_json=config.json)
    first, *others = map(str, config.studies)
    page = shlex.join(["lapa", "view", first, *(["--compare", *others] if others else [])])
    finish(f"{MARKDOWN}, {REPORT} and plots", out, [page])


def verdict_of(groups: Sequence[Group], cautions: Sequence[str] = ()) -> Verdict:
    """Whether latent pretraining pays: good where LAPA is above scratch in every group, of LEAST_SEEDS seeds or more.

    Bad where it is below scratch in one, doubtful otherwise, as with cautions, where a group lacks one of the two, and
    where it is not above the control.
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
    controls = {group.name: group.cells["lapa"].versus.get("captions") for group in groups if "lapa" in group.cells}
    unproven = [
        f"{name}: {comparison('lapa', 'captions', difference)}"
        for name, difference in controls.items()
        if difference is not None and difference.sign < 1
    ]
    for reason in reversed([*cautions, *skipped, *unproven]):
        verdict = verdict.at_best_doubtful(reason)
    return verdict


def findings(results: Sequence[ArmResult]) -> Findings:
    """Compares the arms. Raises UserError where no result has a rollout."""
    groups = compare(results)
    if not groups:
        raise UserError(f"{results[0].folder}: no result has a rollout; run `lapa study run` to its end")
    return Findings(tuple(results), groups, by_wording(results, heard=True), by_wording(results, heard=False))


def summary(found: Findings) -> list[Block]:
    """The report for a reader who does not know the paper: the main table, what it shows, and what is missing."""
    notes, lacking = cautions(found.results), missing(found.results)
    shown = {run.arm for run in found.results} | {run.setting.split for run in found.results}
    blocks: list[Block] = [Bullets(tuple(("", line) for line in notes), highlighted=True)] if notes else []
    blocks += [
        Paragraph(QUESTION),
        Bullets(tuple(each for each in MEANINGS if each[0] in shown)),
        Heading("Results"),
        Bullets(tuple(("", line) for line in (*comparisons(found.groups), *savings(found))), highlighted=True),
        main_table(found.groups, found.heard),
        Paragraph(f"{SEEDS} {INTERVALS}{HEARD if found.heard else ''}"),
    ]
    if (why := figures_table(found.results)).rows:
        blocks.append(why)
    if (cost := cpu_table(found.results)).rows:
        blocks.append(cost)
    world = found.results[0].sizes.get("world", {})
    if (world.get("env"), world.get("tasks")) == ("language_table", "all"):
        blocks.append(PAPER)
    if lacking:
        blocks += [Heading("Missing"), Bullets(tuple(("", line) for line in lacking))]
    return blocks


def content(found: Findings, drawn: Mapping[str, Path]) -> list[Block]:
    """The summary, plots, images of runs and all tables. drawn: caption -> file of each plot."""
    blocks = [*summary(found), *(Figure(path, caption) for caption, path in drawn.items()), *_images_of_runs(found)]
    title = "Seconds of each stage, mean over runs; a stage that several runs share counts in each"
    tables = (
        wording_table(found.heard, found.unheard),
        *map(task_table, detailed_groups(found.groups)),
        *(
            means_table(f"Figures of the runs, mean over each arm: {group.name}", runs, lambda run: run.figures, 3)
            for group in found.groups
            for runs in [_runs_of(group, found)]
        ),
        means_table(title, found.results, _seconds, 0),
        settings_table(found.results),
    )
    return [*blocks, Heading("Tables"), *(table for table in tables if table.rows)]


def missing(results: Sequence[ArmResult]) -> list[str]:
    """What of split, arm and seed has no result, among the seeds that have one."""
    seeds = sorted({run.seed for run in results})
    lines = []
    for split in SPLITS:
        settings = [setting for setting in settings_of(results) if setting.split == split]
        if not settings:
            lines.append(f"{split}: no arm")
        for setting in settings:
            done = {(run.arm, run.seed) for run in results if run.setting == setting}
            lacking = {arm: [seed for seed in seeds if (arm, seed) not in done] for arm in ARMS}
            named = [
                arm if len(own) == len(seeds) else f"{arm} (seed {', '.join(map(str, own))})"
                for arm, own in lacking.items()
                if own
            ]
            if named:
                lines.append(f"{setting.name}: {', '.join(named)}")
    return lines


def savings(found: Findings) -> list[str]:
    """What lapa saves over actionvla and over vpt, as far as the results show it."""

    def computed(cost: Mapping[Arm, float]) -> str:
        return f" (CPU seconds of training: {', '.join(f'{arm} {cost[arm]:.0f}' for arm in cost)})" if cost else ""

    lines = []
    cells = {group.name: group.cells for group in found.groups if "lapa" in group.cells}
    known = {name: own["lapa"] for name, own in cells.items() if "actionvla" in own and "scratch" in own["lapa"].versus}
    gaps = [f"{name}: {gap_text(lapa.gap)}" for name, lapa in known.items() if lapa.versus["scratch"].sign > 0]
    if gaps:
        labels = f"the actions of the videos{computed(_cost_of(found.results, 'lapa', 'actionvla'))}"
        lines.append(f"what lapa saves over actionvla is labels: {labels}; gap recovered in {'; '.join(gaps)}")
    against = {name: own["lapa"].versus["vpt"] for name, own in cells.items() if "vpt" in own["lapa"].versus}
    above = [name for name, difference in against.items() if difference.sign > 0]
    rest = [name for name, difference in against.items() if difference.sign <= 0 and difference.low is not None]
    if above or rest:
        cost = _cost_of(found.results, "lapa", "vpt")
        saved = "compute, no labels" if cost and cost["lapa"] < cost["vpt"] else "nothing" if cost else "no labels"
        where = [f"above it in {'; '.join(above)}"] * bool(above) + [f"not above it in {'; '.join(rest)}"] * bool(rest)
        gained = ", so what it gains is robustness" if above and rest and "in-domain" not in " ".join(above) else ""
        lines.append(f"over vpt lapa saves {saved}{computed(cost)}; it is {' and '.join(where)}{gained}")
    return lines


def _cpu_seconds(results: Sequence[ArmResult]) -> dict[Arm, dict[str, float]]:
    """The CPU seconds of each stage of an arm, mean over the runs that have those of all their stages."""
    found: dict[Arm, dict[str, float]] = {}
    for arm in ARMS:
        runs = [run for run in results if run.arm == arm and _is_timed(run)]
        for run in runs:
            for title, seconds in run.cpu_seconds.items():
                stages = found.setdefault(arm, {})
                stages[run.stage_of(title)] = stages.get(run.stage_of(title), 0.0) + seconds / len(runs)
    return found


def _cost_of(results: Sequence[ArmResult], *arms: Arm) -> dict[Arm, float]:
    """CPU seconds of training, mean over the settings and seeds in which all arms were timed; empty without one."""
    timed = {arm: {(run.setting, run.seed) for run in results if run.arm == arm and _is_timed(run)} for arm in arms}
    shared = set.intersection(*timed.values())
    stages = _cpu_seconds([run for run in results if (run.setting, run.seed) in shared])
    return {arm: _training(stages[arm]) for arm in arms if shared}


def _is_timed(run: ArmResult) -> bool:
    return run.cpu_seconds.keys() >= run.seconds.keys() > set()


def _training(stages: Mapping[str, float]) -> float:
    return sum(seconds for stage, seconds in stages.items() if stage in (*FROM_VIDEO, *FINETUNING))


def figures_table(results: Sequence[ArmResult]) -> Table:
    """What may explain success in each setting: what inverse dynamics and codes know; means over seeds."""
    rows = []
    for setting in settings_of(results):
        own = [run.figures for run in results if run.setting == setting]
        known = [[figures[name] for figures in own if name in figures] for name in FIGURES]
        if any(known):
            rows.append((setting.short, *(f"{sum(each) / len(each):.2f}" if each else "-" for each in known)))
    title = "What may explain it (docs/metrics.md), mean over seeds"
    return Table(title, (SETTING, *FIGURES.values()), tuple(rows))


def cpu_table(results: Sequence[ArmResult]) -> Table:
    """The CPU seconds of each arm; without those whose stages were not all timed so."""
    rows = []
    for arm, stages in _cpu_seconds(results).items():
        finetuning = sum(seconds for stage, seconds in stages.items() if stage in FINETUNING)
        parts = (_training(stages) - finetuning, finetuning, sum(stages.values()) - _training(stages))
        rows.append((arm, *(f"{part:.0f}" for part in (*parts, sum(parts)))))
    title = "CPU seconds of each arm, mean over its runs; a stage that several arms share counts in each"
    header = ("arm", "learning from video", "finetuning", "recording, rollouts, measures", "all")
    return Table(title, header, tuple(rows))


def detailed_groups(groups: Sequence[Group]) -> list[Group]:
    """Returns one group a split, to be shown in detail: the one with most arms.

    Of several, the one whose numbers of videos and labelled episodes most groups share, then the one with fewest.
    """
    numbers = [group.setting.numbers for group in groups]

    def order(group: Group) -> tuple[Any, ...]:
        return -len(group.cells), -numbers.count(group.setting.numbers), group.setting.numbers

    best: dict[str, Group] = {}
    for group in sorted(groups, key=order):
        best.setdefault(group.setting.split, group)
    return [best[split] for split in SPLITS if split in best]


def draw(found: Findings, out: Path) -> dict[str, Path]:
    """Writes the plots that the results allow; returns caption -> file."""
    detailed = detailed_groups(found.groups)
    text = "Success of each arm; the black lines are 95% intervals."
    drawings: list[tuple[str, str, Any]] = [
        ("success", text, plots.success_by_split(detailed)),
        ("tasks", "Success by task, %.", plots.success_by_task(detailed)),
    ]
    for name, what in plots.NUMBERS.items():
        drawings.append((name, f"Success against the number of {what}s.", plots.success_by(name, found.groups)))
    for group in detailed[:1]:
        text = f"Learning curves, a line each run: {group.name}. Losses of different arms are not comparable."
        drawings.append(("curves", text, plots.learning_curves(_runs_of(group, found))))
    drawings = [drawing for drawing in drawings if drawing[2] is not None]
    for name, _, figure in drawings:
        plots.save(figure, out / f"{name}.png")
    return {caption: out / f"{name}.png" for name, caption, _ in drawings}


def _runs_of(group: Group, found: Findings) -> list[ArmResult]:
    return [result for result in found.results if result.setting == group.setting]


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
        "savings": savings(found),
        "missing": missing(found.results),
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
                "cpu_seconds": result.cpu_seconds,
                "provenance": result.provenance,
            }
            for result in found.results
        ],
    }


def cautions(results: Sequence[ArmResult]) -> list[str]:
    """Notes that a reader needs before any number."""
    lines = ["preset debug: these numbers measure nothing"] if results[0].preset == "debug" else []
    noted = [str(result.provenance.get("code", "not noted")) for result in results]
    versions = {version for each in noted for version in each.split(", ")}
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


def main_table(groups: Sequence[Group], heard: Sequence[Group] = ()) -> Table:
    """Success, difference to scratch, on heard goals too where there are some, and gap recovered of each arm."""
    on_heard = {group.name: group.cells for group in heard}
    rows = []
    for group in groups:
        for arm, cell in group.cells.items():
            own = on_heard.get(group.name, {}).get(arm)
            differences = [cell, own] if heard else [cell]
            rows.append(
                (
                    group.setting.short,
                    arm,
                    _percent(cell.success),
                    str(len(cell.seeds)),
                    str(cell.num_rollouts),
                    *(_difference(each.versus.get("scratch") if each else None) for each in differences),
                    gap_text(cell.gap),
                )
            )
    header = (SETTING, "arm", "success, %", "seeds", "rollouts", "minus scratch, points")
    words = ("the same on heard goals",) if heard else ()
    return Table("Success of each arm, with 95% intervals", (*header, *words, "gap recovered"), tuple(rows))


def short_table(group: Group) -> Table:
    """The part of the main table that is shown in a terminal: it fits into 80 columns."""
    rows = [
        (arm, _percent(cell.success), _difference(cell.versus.get("scratch")), gap_text(cell.gap))
        for arm, cell in group.cells.items()
    ]
    return Table(group.name, ("arm", "success, %", "minus scratch, points", "gap recovered"), tuple(rows))


def wording_table(heard: Sequence[Group], unheard: Sequence[Group]) -> Table:
    """Success on the goals whose wording the labelled episodes contain, and on the others."""
    both = [{each.setting.short: each.cells for each in groups} for groups in (heard, unheard)]
    rows = []
    for name in dict.fromkeys([*both[0], *both[1]]):
        own, other = (found.get(name, {}) for found in both)
        for arm in (arm for arm in ARMS if arm in own or arm in other):
            rates = [_percent(cells[arm].success) if arm in cells else "-" for cells in (own, other)]
            rows.append((name, arm, *rates, _difference(own[arm].versus.get("scratch") if arm in own else None)))
    header = (SETTING, "arm", "success on heard goals, %", "success on unheard goals, %")
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
    if gap.low is None:
        return f"{value} ({gap.note})"
    return f"{value} [{gap.low:.2f}, {gap.high:.2f}]{' (1 seed)' if gap.num_seeds == 1 else ''}"


def _points(rate: float) -> float:
    """Percentage points, rounded to a tenth; never -0.0."""
    return round(100 * rate, 1) + 0.0
