"""The tables of a study's report, and the correlations that one of them holds.

print(table_markdown(main_table(compare(results))))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lapa.study.page import Table
from lapa.study.results import ARMS, Arm, ArmResult, Split
from lapa.study.statistics import Group, ranks, success_of
from lapa.study.verdicts import PAPER, gap_text, percent, points, stage_of, where

FIGURE_MEANINGS = {
    "action_error": "how far the policy's actions are from the recorded ones of episodes no arm learned from, in the "
    "robot's units; lower is better.",
    "action_error_normalised": "the same over each action's own range; lower is better.",
    "action_r2": "share of the recorded actions' variance that the policy's actions explain, on the same episodes; "
    "higher is better, 1 is perfect, 0 is what the mean action gives.",
    "token_accuracy": "share of latent actions that the pretrained policy says as the latent action model does, on "
    "videos it did not see; higher is better.",
    "lam_linear_r2": "share of the true actions' variance that a linear map reads off the codes; higher is better.",
    "lam_mlp_r2": "the same with a small network in place of the linear map; higher is better.",
    "lam_error_of_copying": "error of the latent action model's second frame over that of repeating the first; lower "
    "is better, 1 is no better than copying.",
    "lam_shuffled_over_own": "error with another pair's codes over that with the own; higher is better, 1 means that "
    "the codes are not used.",
    "lam_codes_used": "codes that occur at all; higher is better, up to all there are.",
    "lam_joint_perplexity": "how many whole codes it is as if it used, all equally often; higher is better, but no "
    "proof that they mean anything.",
    "loss": "what training brings down; lower is better, and comparable within one arm and stage only.",
    "held_out_loss": "the loss on episodes kept out of training; lower is better, rising means overfitting.",
    "held_out_token_accuracy": "share of tokens said right on episodes kept out of training; higher is better.",
    "held_out_action_error": "how far actions are from the recorded ones there, in the robot's units; lower is better.",
}
ABOUT_CORRELATIONS = (
    "Correlations pool runs of different arms, splits and numbers of labelled episodes (lam_* figures: runs of lapa "
    "alone): they may show how arms differ, and no cause. Of many figures one correlates by chance. Runs that are "
    "copies of one another count once; runs of an arm and seed that share the very same figure are one point."
)
LEAST_RUNS = 5  # from which a correlation is given
MAX_VALUES = 4  # of one entry of the provenance that are shown


@dataclass(frozen=True)
class Correlation:
    """Of a figure with the success rate over runs of these arms, copies left out. note: why there are no values."""

    figure: str
    num_runs: int
    arms: tuple[Arm, ...]
    spearman: float | None = None
    pearson: float | None = None
    note: str = ""


def main_table(groups: Sequence[Group]) -> Table:
    """The report's first table: success, difference to scratch, gap recovered, rank."""
    header = (
        "split, labelled episodes a task",
        "arm",
        "success, %",
        "seeds",
        "rollouts",
        "minus scratch, points",
        "gap recovered",
        "mean rank",
    )
    rows = [
        (
            f"{group.split}, {group.demonstrations}",
            arm,
            percent(cell.success),
            str(len(cell.seeds)),
            str(cell.num_rollouts),
            points(cell.versus["scratch"]) if "scratch" in cell.versus else "-",
            gap_text(cell.gap),
            "-" if cell.mean_rank is None else f"{cell.mean_rank:.2f}",
        )
        for group in groups
        for arm, cell in group.cells.items()
    ]
    return Table("Success of each arm, with 95% intervals", header, tuple(rows))


def wording_table(heard: Sequence[Group], unheard: Sequence[Group]) -> Table:
    """By whether the labelled episodes hold the goal's wording; without rows where no rollout says."""
    cells = [{(each.split, each.demonstrations): each.cells for each in groups} for groups in (heard, unheard)]
    rows = []
    for split, number in dict.fromkeys([*cells[0], *cells[1]]):
        own, other = (found.get((split, number), {}) for found in cells)
        for arm in (arm for arm in ARMS if arm in own or arm in other):
            versus = own[arm].versus if arm in own else {}
            rows.append(
                (
                    f"{split}, {number}",
                    arm,
                    *(percent(found[arm].success) if arm in found else "-" for found in (own, other)),
                    points(versus["scratch"]) if "scratch" in versus else "-",
                )
            )
    header = (
        "split, labelled episodes a task",
        "arm",
        "success on heard goals, %",
        "success on unheard goals, %",
        "minus scratch on heard goals, points",
    )
    return Table("By wording", header, tuple(rows))


def task_table(group: Group) -> Table:
    tasks = sorted({task for cell in group.cells.values() for task in cell.by_task})
    rows = [
        (task, *(f"{100 * cell.by_task[task]:.0f}" if task in cell.by_task else "-" for cell in group.cells.values()))
        for task in tasks
    ]
    return Table(f"Success by task, %: {where(group)}", ("task", *group.cells), tuple(rows))


def paper_table() -> Table:
    """The published success rates, with the gap recovered that follows from them."""
    rows = [
        (
            column.setting,
            *(f"{column.success[arm]:.1f}" for arm in ARMS),
            f"{column.gap('vpt'):.2f}",
            f"{column.gap('lapa'):.2f}",
        )
        for column in PAPER
    ]
    header = ("setting, goals", *ARMS, "gap recovered by vpt", "by lapa")
    return Table("The paper's success rates, % (Language Table, 250 rollouts each; SIMPLER)", header, tuple(rows))


def correlations(results: Sequence[ArmResult]) -> list[Correlation]:
    """Of every figure with the success rate, over the runs that have it; lam_* figures over those of lapa."""
    found = []
    for name in sorted({name for result in results for name in result.figures}):
        points = figure_and_success(results, name)
        arms = tuple(arm for arm in ARMS if any(arm == own for own, _, _ in points))
        if len(points) < LEAST_RUNS:
            found.append(Correlation(name, len(points), arms, note=f"too few (fewer than {LEAST_RUNS} runs)"))
            continue
        xs, ys = (np.array(column, dtype=float) for column in zip(*((x, y) for _, x, y in points), strict=True))
        if np.ptp(xs) == 0 or np.ptp(ys) == 0:
            found.append(Correlation(name, len(points), arms, note="the figure or success does not vary"))
            continue
        found.append(Correlation(name, len(points), arms, _pearson(ranks(xs), ranks(ys)), _pearson(xs, ys)))
    return found


def figure_and_success(results: Sequence[ArmResult], name: str) -> list[tuple[Arm, float, float]]:
    """Runs with that figure: arm, value, success rate; each once.

    What several splits share (scratch) is one run. Runs of an arm, seed and split with the very same value, such as of
    one latent action model under several numbers of labelled episodes, are one point at their mean success.
    """
    distinct = {(run.arm, run.seed, run.rollouts, tuple(sorted(run.figures.items()))): run for run in results}
    points: dict[tuple[Arm, int, Split, float], list[float]] = {}
    for run in distinct.values():
        value, success = run.figures.get(name), success_of(run)
        if value is None or success is None or not math.isfinite(value):
            continue
        if not name.startswith("lam_") or run.arm == "lapa":
            points.setdefault((run.arm, run.seed, run.split, float(value)), []).append(success)
    return [(arm, value, float(np.mean(rates))) for (arm, _, _, value), rates in points.items()]


def _pearson(xs: np.ndarray, ys: np.ndarray) -> float:
    return float(np.corrcoef(xs, ys)[0, 1])


def correlation_table(found: Sequence[Correlation]) -> Table:
    rows = [
        (
            each.figure,
            str(each.num_runs),
            ", ".join(each.arms),
            *(
                (each.note, "")
                if each.spearman is None or each.pearson is None
                else (f"{each.spearman:+.2f}", f"{each.pearson:+.2f}")
            ),
        )
        for each in found
    ]
    header = ("figure", "runs, each once", "of arms", "rank correlation", "correlation")
    return Table("Figures and success over runs", header, tuple(rows))


def meanings(results: Sequence[ArmResult]) -> list[tuple[str, str]]:
    """What each figure of these results and their curves is."""
    there = {name for result in results for name in result.figures}
    there |= {key.removeprefix("eval/") for run in results for curve in run.curves for row in curve.rows for key in row}
    return [(name, meaning) for name, meaning in FIGURE_MEANINGS.items() if name in there]


def seconds_table(results: Sequence[ArmResult]) -> Table:
    """Mean seconds of each stage over the runs of an arm that have it; `-` where none has."""
    arms = [arm for arm in ARMS if any(result.arm == arm for result in results)]
    spent: dict[str, dict[str, list[float]]] = {}
    for result in results:
        stages = {stage_of(title, result): seconds for title, seconds in result.seconds.items()}
        for stage, seconds in {**stages, "all of a run": sum(stages.values())}.items() if stages else ():
            spent.setdefault(stage, {}).setdefault(result.arm, []).append(seconds)
    rows = [
        (stage, *(f"{sum(each[arm]) / len(each[arm]):.0f}" if arm in each else "-" for arm in arms))
        for stage, each in sorted(spent.items(), key=lambda item: item[0] == "all of a run")
    ]
    title = "Seconds of each stage, mean over runs; what several runs share is counted in each"
    return Table(title, ("stage", *arms), tuple(rows))


def sizes_table(result: ArmResult) -> Table:
    rows = [("preset", result.preset), *((key, str(value)) for key, value in _flat(result.sizes).items())]
    return Table("The study's sizes", ("setting", "value"), tuple(rows))


def provenance_table(results: Sequence[ArmResult]) -> Table:
    """Every entry with its different values, of many the first ones and their number."""
    rows = []
    flat = [_flat(result.provenance) for result in results]
    for key in dict.fromkeys(key for entries in flat for key in entries):
        values = list(dict.fromkeys(str(entries[key]) for entries in flat if key in entries))
        more = f"; and {len(values) - MAX_VALUES} others" if len(values) > MAX_VALUES else ""
        rows.append((key, "; ".join(values[:MAX_VALUES]) + more))
    return Table("Versions, hardware, commands", ("what", "values"), tuple(rows))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
