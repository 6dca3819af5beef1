"""Options of `lapa evaluate`; imports neither torch nor a simulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lapa.config import ReportOptions
from lapa.engine.config import TrackerName


@dataclass(frozen=True)
class EvaluateConfig(ReportOptions):
    """Rolls a policy out and counts its successes."""

    policy: Annotated[str, tyro.conf.Positional]
    """Folder of a finetuned policy or its id on the hub, or `random`, `zero` (actions) or `expert` as baselines."""
    out: Path
    """Folder for results.json and the videos."""
    env: str = "metaworld"
    """Environment, one of those that `lapa envs` lists."""
    tasks: str | None = None
    """Tasks and suites of tasks separated by commas, or all; `lapa envs NAME` lists them. By default mt10 in
    Meta-World and all tasks elsewhere."""
    episodes: int = 20
    """Episodes of each task."""
    seed: int = 0
    """Determines the episodes' goals; policies are comparable under one seed."""
    max_steps: int | None = None
    """An episode fails after this many steps; by default as many as the benchmark allows the task."""
    steps_per_call: int | None = None
    """Steps between two calls of the policy; by default its whole chunk is executed, or with --ensemble one step."""
    ensemble: float | None = None
    """Average overlapping chunks' predictions of one moment, the i-th oldest weighted exp(-ENSEMBLE * i): 0.01 is
    usual."""
    statistics_key: str | None = None
    """Dataset whose statistics the policy acts by, where it learned from several with actions."""
    size: int | None = None
    """Height and width of rendered images; by default the environment's own."""
    videos: int = 4
    """The first so many rollouts of each task are recorded, each as a video; 0 for none."""
    workers: int | None = None
    """Simulator processes, at most PARALLEL, 0 to simulate in this one; by default one for each CPU core."""
    parallel: int = 16
    """At most so many simulators in all processes together, and so the largest batch of the policy."""
    tracker: TrackerName | None = None
    """Also report success rates and videos to this tracker; without it, they are in OUT alone."""
    overwrite: bool = False
    """Replace what lies at --out."""
    resume: bool = False
    """Play only the episodes that are missing at --out, or ended in an error."""
