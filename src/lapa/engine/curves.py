"""Training curves as an image: the loss and the figures of the validation split, of one or several runs.

    lapa plot LAM                      # curves.png
    lapa plot RUN1 RUN2 --out both.png --overwrite

Every training writes its own as `training/curves.png`. docs/metrics.md explains the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lapa.console import finish
from lapa.drawing import charts
from lapa.engine.config import PlotConfig
from lapa.errors import UserError
from lapa.files import atomic_path, distinct_names, read_json_lines

METRICS, CURVES = "metrics.jsonl", "curves.png"
EVALUATION = "eval/"
MAX_PANELS = 9


def run(config: PlotConfig) -> None:
    """`lapa plot`. Raises UserError where a run has no metrics, and where `out` is there already or no .png."""
    if config.out.suffix.lower() != ".png":
        raise UserError(f"--out {config.out}: must end in .png")
    paths = {run: next((path for path in candidates(run) if path.is_file()), None) for run in config.runs}
    for folder, path in paths.items():
        if path is None:
            raise UserError(f"{folder}: no training run, it has no training/{METRICS}; give the folder of a training")
    if config.out.exists() and not config.overwrite:
        raise UserError(f"{config.out}: is there already; --overwrite to replace it, or give another --out")
    found = [path for path in paths.values() if path is not None]
    if not draw_curves(found, distinct_names(list(paths)), config.out):
        raise UserError(f"{config.runs[0]}: no loss is logged yet; wait for the first")
    finish("training curves", config.out)


def candidates(run: Path) -> list[Path]:
    """Where the metrics of a run may be: it is named by its own folder, by `training`, or by the file."""
    return [run / "training" / METRICS, run / METRICS, run]


def draw_curves(metrics: Sequence[Path], names: Sequence[str], out: Path) -> bool:
    """Draws metrics.jsonl of each run under its name, as one image. Returns False where none has a loss."""
    found = {name: read_json_lines(path, step=int) for name, path in zip(names, metrics, strict=True)}
    chosen = panels(found)
    if chosen:
        with atomic_path(out) as path:
            charts(chosen, "steps").save(path)
    return bool(chosen)


def panels(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Returns the points of each run by the title of their chart: the loss, then figures that the most runs have.

    A figure that was measured several times and never changed, such as the error of copying, is left out.
    """
    keys = dict.fromkeys(key for rows in found.values() for row in rows for key in row if _is_shown(key))
    points = {key: {name: _points(rows, key) for name, rows in found.items()} for key in keys}
    shown = [key for key, lines in points.items() if any(map(_changes, lines.values()))]
    shown.sort(key=lambda key: (key != "loss", -sum(map(bool, points[key].values()))))
    return {_title(key): points[key] for key in shown[:MAX_PANELS]}


def _is_shown(key: str) -> bool:
    return key == "loss" or key.startswith(EVALUATION)


def _changes(points: Sequence[tuple[float, float]]) -> bool:
    return len(points) == 1 or len({value for _, value in points}) > 1


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    values = [(row["step"], row.get(key)) for row in rows]
    return [(step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]


def _title(key: str) -> str:
    name = key.removeprefix(EVALUATION).removeprefix("held_out_").replace("_", " ")
    return "training loss" if key == "loss" else f"validation: {name}"
