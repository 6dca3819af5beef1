"""The tables of a study's report.

print(table_markdown(main_table(compare(results))))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lapa.study.page import Table
from lapa.study.results import ARMS, ArmResult
from lapa.study.statistics import Correlation, Group
from lapa.study.verdicts import PAPER, gap_text, percent, points, stage_of, where

MAX_VALUES = 4  # of one entry of the provenance that are shown


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


def correlation_table(found: Sequence[Correlation]) -> Table:
    rows = [
        (each.figure, str(each.num_runs), each.note, "")
        if each.spearman is None or each.pearson is None
        else (each.figure, str(each.num_runs), f"{each.spearman:+.2f}", f"{each.pearson:+.2f}")
        for each in found
    ]
    return Table("Figures and success over runs", ("figure", "runs", "rank correlation", "correlation"), tuple(rows))


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
