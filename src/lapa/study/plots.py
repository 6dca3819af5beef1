"""The plots of a study's report, by matplotlib without a display or any global state.

    save(success_by_split(groups), Path("success.png"))

An arm has one colour everywhere (of Okabe and Ito, which the colour-blind can distinguish) and one marker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapa.errors import UserError
from lapa.files import atomic_path
from lapa.study.results import ARMS, SPLITS, Arm, ArmResult, Curve
from lapa.study.statistics import Estimate, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS: dict[Arm, str] = {
    "scratch": "#7f7f7f",
    "vpt": "#e69f00",
    "unipi": "#cc79a7",
    "lapa": "#0072b2",
    "actionvla": "#009e73",
}
MARKERS: dict[Arm, str] = {"scratch": "o", "vpt": "s", "unipi": "v", "lapa": "D", "actionvla": "^"}
# Validation metrics that are shown first, of those that the curves have.
HELD_OUT = ("held_out_token_accuracy", "held_out_action_error", "held_out_loss")
MAX_HELD_OUT = 2
LEGEND_WIDTH = 5.4  # inches


def require_matplotlib() -> None:
    """Raises UserError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('the report needs matplotlib; install it: pip install "lapa-vla[study]"') from None


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata={"Software": None})


def success_by_split(groups: Sequence[Group]) -> Figure:
    """Bars with their intervals: one row for each number of labelled episodes, splits side by side."""
    numbers = sorted({group.demonstrations for group in groups})
    splits = [split for split in SPLITS if any(group.split == split for group in groups)]
    arms = _arms_of(groups)
    figure, axes = _panels(len(numbers), 1, width=1.0 + 0.42 * len(splits) * (len(arms) + 1), height=2.8)
    width = 0.84 / len(arms)
    for (axis,), number in zip(axes, numbers, strict=True):
        for group in (group for group in groups if group.demonstrations == number):
            for arm, cell in group.cells.items():
                middle = splits.index(group.split) + (arms.index(arm) - (len(arms) - 1) / 2) * width
                rate = cell.success.value
                low, high = _ends(cell.success)
                axis.bar(middle, 100 * rate, 0.92 * width, color=COLOURS[arm])
                axis.vlines(middle, 100 * low, 100 * high, color="black", linewidth=1.2)
                axis.text(middle, 100 * high + 1.5, f"{100 * rate:.0f}", ha="center", va="bottom", fontsize=7)
        axis.set(xticks=range(len(splits)), xticklabels=splits, ylim=(0, 110), yticks=range(0, 101, 20))
        axis.set_xlim(-0.55, len(splits) - 0.45)
        axis.set_title(f"{number} labelled episode{'s' if number > 1 else ''} a task", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.set_ylabel("success, %")
    _legend(figure, arms)
    return figure


def success_by_task(groups: Sequence[Group]) -> Figure:
    """One heat map for each group: tasks down, arms across, the mean over tasks at the bottom."""
    tasks = sorted({task for group in groups for cell in group.cells.values() for task in cell.by_task})
    arms = _arms_of(groups)
    figure, axes = _panels(1, len(groups), width=1.9 + 0.55 * len(arms), height=1.3 + 0.26 * (len(tasks) + 1))
    for axis, group in zip(axes[0], groups, strict=True):
        rates = np.full((len(tasks) + 1, len(arms)), np.nan)
        for arm, cell in group.cells.items():
            for task, rate in cell.by_task.items():
                rates[tasks.index(task), arms.index(arm)] = rate
            rates[-1, arms.index(arm)] = cell.success.value
        axis.imshow(rates, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), rate in np.ndenumerate(rates):
            text, colour = (
                ("-", "black") if np.isnan(rate) else (f"{100 * rate:.0f}", "white" if rate > 0.6 else "black")
            )
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        axis.axhline(len(tasks) - 0.5, color="black", linewidth=0.8)
        axis.set_xticks(range(len(arms)), arms, fontsize=7, rotation=30, ha="right")
        axis.set_yticks(range(len(tasks) + 1), [*tasks, "all"] if axis is axes[0][0] else [], fontsize=7)
        axis.set_title(f"{group.split}, {group.demonstrations} a task", fontsize=9)
    return figure


def success_by_demonstrations(groups: Sequence[Group]) -> Figure:
    """One panel for each split with several numbers of labelled episodes: a line for each arm, its interval a band."""
    splits = [split for split in SPLITS if sum(group.split == split for group in groups) > 1]
    figure, axes = _panels(1, len(splits), width=3.4, height=3.2)
    for axis, split in zip(axes[0], splits, strict=True):
        of_split = [group for group in groups if group.split == split]
        for arm in _arms_of(of_split):
            cells = [(group.demonstrations, group.cells[arm].success) for group in of_split if arm in group.cells]
            numbers = [number for number, _ in cells]
            low, high = zip(*(_ends(success) for _, success in cells), strict=True)
            band = 100 * np.array([low, high])
            axis.fill_between(numbers, *band, color=COLOURS[arm], alpha=0.15, linewidth=0)
            axis.plot(
                numbers,
                [100 * success.value for _, success in cells],
                color=COLOURS[arm],
                marker=MARKERS[arm],
                markersize=4,
            )
        numbers = sorted({group.demonstrations for group in of_split})
        axis.set(xscale="log", ylim=(-2, 102), xlabel="labelled episodes a task")
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.set_xticks([], minor=True)
        axis.set_title(split, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("success, %")
    _legend(figure, _arms_of(groups))
    return figure


def learning_curves(results: Sequence[ArmResult]) -> Figure | None:
    """One row for each training stage: its loss, then validation metrics; None without curves.

    A line for each run, or a point where there is one value.
    """
    curves = [(result.stage_of(curve.name), result.arm, curve) for result in results for curve in result.curves]
    stages = list(dict.fromkeys(stage for stage, _, _ in curves))
    if not stages:
        return None
    keys = {name: ["loss", *_held_out([curve for stage, _, curve in curves if stage == name])] for name in stages}
    figure, axes = _panels(len(stages), max(map(len, keys.values())), width=3.2, height=2.1)
    for row, name in zip(axes, stages, strict=True):
        for axis, key in zip(row, keys[name], strict=False):
            for arm, curve in [(arm, curve) for stage, arm, curve in curves if stage == name]:
                points = [(line["step"], line[key]) for line in curve.rows if _is_number(line.get(key))]
                steps, values = zip(*points, strict=True) if points else ((), ())
                marker = MARKERS[arm] if len(points) == 1 else "None"
                axis.plot(steps, values, color=COLOURS[arm], marker=marker, linewidth=1, alpha=0.8)
            axis.set_title(f"{name}: {key.removeprefix('eval/').replace('_', ' ')}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        for axis in row[len(keys[name]) :]:
            axis.set_axis_off()
        row[0].set_xlabel("steps", fontsize=7)
    _legend(figure, [arm for arm in ARMS if any(found == arm for _, found, _ in curves)])
    return figure


def _held_out(curves: Sequence[Curve]) -> list[str]:
    """Returns at most two validation metrics of the curves, those of HELD_OUT first."""
    keys = sorted({key for curve in curves for row in curve.rows for key in row if key.startswith("eval/")})
    known = [f"eval/{key}" for key in HELD_OUT if f"eval/{key}" in keys]
    return [*known, *(key for key in keys if key not in known)][:MAX_HELD_OUT]


def _ends(estimate: Estimate) -> tuple[float, float]:
    """The ends of the interval; both the value where there is none."""
    if estimate.low is None or estimate.high is None:
        return estimate.value, estimate.value
    return estimate.low, estimate.high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _arms_of(groups: Sequence[Group]) -> list[Arm]:
    return [arm for arm in ARMS if any(arm in group.cells for group in groups)]


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(columns * width, LEGEND_WIDTH), rows * height + 0.4), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _legend(figure: Figure, arms: Sequence[Arm]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[arm], marker=MARKERS[arm], label=arm) for arm in arms]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
