"""Metrics of a run: one JSON object a line in `metrics.jsonl`, the same in its tracker, and curves.png in the end."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lapa import __version__
from lapa.engine.curves import CURVES, METRICS, draw_curves
from lapa.engine.trackers import Tracker
from lapa.errors import UserError, shown
from lapa.files import atomic_path, read_json_lines, read_object


class MetricLog:
    """Appends to `folder/metrics.jsonl`. A resume drops the rows after `first_step`, which are computed again."""

    def __init__(self, folder: Path, first_step: int, tracker: Tracker, *, enabled: bool = True) -> None:
        self.enabled, self.tracker = enabled, tracker
        if not enabled:
            return
        self.path = folder / METRICS
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_json_lines(self.path, step=int) if row["step"] <= first_step]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._started = time.time()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values under the number of finished steps."""
        if not self.enabled:
            return
        row = {"step": step, "seconds": round(time.time() - self._started, 3), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.tracker.scalars(step, values)

    def close(self) -> None:
        """Also draws the curves, where anything is logged."""
        if self.enabled:
            self.tracker.close()
            draw_curves([self.path], [""], self.path.with_name(CURVES))


def read_figures(path: Path, *figures: str, **keys: type) -> dict[str, Any]:
    """Reads the metrics.json of a finished training.

    figures: beginnings of the names of entries that are finite numbers; keys: as of `read_object`.
    Raises UserError naming the file where it is damaged.
    """
    remedy = "copy it again, or --overwrite to train anew"
    found = read_object(path, remedy, **keys)
    for name, value in found.items():
        if name.startswith(figures) and (type(value) not in (int, float) or not math.isfinite(value)):
            raise UserError(f"{path}: {shown(name)} is {shown(value)}, expected a number; {remedy}")
    return found


def versions_and_hardware() -> dict[str, Any]:
    """Versions, device and command, which are written next to every result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["lapa", *sys.argv[1:]]),
        "lapa": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": gpu,
        "num_gpus": torch.cuda.device_count(),
        "cpu_threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
