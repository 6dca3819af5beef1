"""The plots of a study's report, by matplotlib without a display or any global state.

    save(success_by_split(groups), Path("success.png"))

An arm has one colour everywhere and one marker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapa.drawing import BLUE, GREEN, GREY, ORANGE, PINK, SKY
from lapa.files import atomic_path
from lapa.study.results import ARMS, Arm, ArmResult, Curve
from lapa.study.statistics import Estimate, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of ARMS: scratch, captions, vpt, unipi, lapa, actionvla.
COLOURS = dict(zip(ARMS, (GREY, SKY, ORANGE, PINK, BLUE, GREEN), strict=True))
MARKERS = dict(zip(ARMS, "oPsvD^", strict=True))
# Validation metrics that are shown first, of those that the curves have.
HELD_OUT = ("eval/held_out_token_accuracy", "eval/held_out_action_error", "eval/held_out_loss")
MAX_HELD_OUT = 2
# The numbers of a setting -> what they count.
NUMBERS = {"videos": "video", "demonstrations": "labelled episode"}
LEGEND_WIDTH = 5.4  # inches


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata={"Software": None})


def success_by_split(groups: Sequence[Group]) -> Figure:
    """Bars with their intervals, the groups side by side."""
    arms = _arms_of(groups)
    figure, [[axis]] = _panels(1, 1, 1.0 + 0.42 * len(groups) * (len(arms) + 1), 2.8, arms)
    width = 0.84 / len(arms)
    for place, group in enumerate(groups):
        for arm, cell in group.cells.items():
            middle = place + (arms.index(arm) - (len(arms) - 1) / 2) * width
            low, high = _ends(cell.success)
            axis.bar(middle, 100 * cell.success.value, 0.92 * width, color=COLOURS[arm])
            axis.vlines(middle, 100 * low, 100 * high, color="black", linewidth=1.2)
            axis.text(middle, 100 * high + 1.5, f"{100 * cell.success.value:.0f}", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(groups)), [_title(group) for group in groups])
    axis.set(xlim=(-0.55, len(groups) - 0.45), ylim=(0, 110), yticks=range(0, 101, 20), ylabel="success, %")
    return figure


def success_by_task(groups: Sequence[Group]) -> Figure:
    """One heat map for each group: tasks down, arms across, the mean over tasks at the bottom."""
    tasks = sorted({task for group in groups for cell in group.cells.values() for task in cell.by_task})
    arms = _arms_of(groups)
    figure, axes = _panels(1, len(groups), 1.9 + 0.55 * len(arms), 1.3 + 0.26 * (len(tasks) + 1))
    for axis, group in zip(axes[0], groups, strict=True):
        rates = np.full((len(tasks) + 1, len(arms)), np.nan)
        for arm, cell in group.cells.items():
            for task, rate in [*cell.by_task.items(), (None, cell.success.value)]:
                rates[len(tasks) if task is None else tasks.index(task), arms.index(arm)] = rate
        axis.imshow(rates, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), rate in np.ndenumerate(rates):
            text, colour = "-" if np.isnan(rate) else f"{100 * rate:.0f}", "white" if rate > 0.6 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        axis.axhline(len(tasks) - 0.5, color="black", linewidth=0.8)
        axis.grid(visible=False)
        axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
        axis.set_yticks(range(len(tasks) + 1), [*tasks, "all"] if axis is axes[0][0] else [])
        axis.set_title(_title(group), fontsize=9)
    return figure


def success_by(name: str, groups: Sequence[Group]) -> Figure | None:
    """Success against a number of NUMBERS: a line for each arm, its interval a band.

    A panel for each split and other number with several values; None without one.
    """
    panels: dict[str, list[Group]] = {}
    for group in groups:
        (other,) = (each for each in NUMBERS if each != name)
        fixed = f"{group.setting.split}, {NUMBERS[other]}s: {getattr(group.setting, other)}"
        panels.setdefault(fixed, []).append(group)
    panels = {fixed: own for fixed, own in panels.items() if len(own) > 1}
    if not panels:
        return None
    figure, axes = _panels(1, len(panels), 3.4, 3.2, _arms_of(groups))
    for axis, (fixed, own) in zip(axes[0], panels.items(), strict=True):
        for arm in _arms_of(own):
            cells = [(getattr(group.setting, name), group.cells[arm].success) for group in own if arm in group.cells]
            numbers = [number for number, _ in cells]
            low, high = 100 * np.array([_ends(success) for _, success in cells]).T
            axis.fill_between(numbers, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
            rates = [100 * success.value for _, success in cells]
            axis.plot(numbers, rates, color=COLOURS[arm], marker=MARKERS[arm], markersize=4)
        numbers = [getattr(group.setting, name) for group in own]
        axis.set(xscale="log", ylim=(-2, 102), xlabel=f"{NUMBERS[name]}s a task", ylabel="success, %")
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.set_xticks([], minor=True)
        axis.set_title(fixed, fontsize=9)
    return figure


def learning_curves(results: Sequence[ArmResult]) -> Figure | None:
    """One row for each training stage: its loss, then validation metrics; None without curves.

    A line for each run, or a point where there is one value.
    """
    stages: dict[str, list[tuple[Arm, Curve]]] = {}
    for result in results:
        for curve in result.curves:
            stages.setdefault(result.stage_of(curve.name), []).append((result.arm, curve))
    if not stages:
        return None
    keys = {name: ["loss", *_held_out([curve for _, curve in own])] for name, own in stages.items()}
    trained = {arm for own in stages.values() for arm, _ in own}
    arms = [arm for arm in ARMS if arm in trained]
    figure, axes = _panels(len(stages), max(map(len, keys.values())), 3.2, 2.1, arms)
    for row, (name, own) in zip(axes, stages.items(), strict=True):
        for axis, key in zip(row, keys[name], strict=False):
            for arm, curve in own:
                points = [(line["step"], line[key]) for line in curve.rows if _is_number(line.get(key))]
                steps, values = zip(*points, strict=True) if points else ((), ())
                marker = MARKERS[arm] if len(points) == 1 else "None"
                axis.plot(steps, values, color=COLOURS[arm], marker=marker, linewidth=1, alpha=0.8)
            axis.set_title(f"{name}: {key.removeprefix('eval/').replace('_', ' ')}", fontsize=8)
        for axis in row[len(keys[name]) :]:
            axis.set_axis_off()
        row[0].set_xlabel("steps", fontsize=7)
    return figure


def _held_out(curves: Sequence[Curve]) -> list[str]:
    """Returns at most two validation metrics of the curves, those of HELD_OUT first."""
    keys = sorted({key for curve in curves for row in curve.rows for key in row if key.startswith("eval/")})
    return [*(key for key in HELD_OUT if key in keys), *(key for key in keys if key not in HELD_OUT)][:MAX_HELD_OUT]


def _ends(estimate: Estimate) -> tuple[float, float]:
    """The ends of the interval; both the value where there is none."""
    if estimate.low is None or estimate.high is None:
        return estimate.value, estimate.value
    return estimate.low, estimate.high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _arms_of(groups: Sequence[Group]) -> list[Arm]:
    return [arm for arm in ARMS if any(arm in group.cells for group in groups)]


def _title(group: Group) -> str:
    videos, demonstrations = group.setting.numbers
    return f"{group.setting.split}\n{videos} videos, labelled: {demonstrations} a task"


def _panels(
    rows: int, columns: int, width: float, height: float, arms: Sequence[Arm] = ()
) -> tuple[Figure, list[list[Axes]]]:
    """Returns a figure and its panels, width x height inches each, with a legend of the arms."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(max(columns * width, LEGEND_WIDTH), rows * height + 0.4), layout="constrained")
    axes = [list(row) for row in figure.subplots(rows, columns, squeeze=False)]
    for axis in (axis for row in axes for axis in row):
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    if arms:
        handles = [Line2D([], [], color=COLOURS[arm], marker=MARKERS[arm], label=arm) for arm in arms]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(arms), frameon=False, fontsize=8)
    return figure, axes
