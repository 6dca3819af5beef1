"""Demonstrations of Language Table's expert, written as a dataset; only successful episodes are kept.

    lapa data language-table --families all --episodes 50 --no-actions --out data/videos
    lapa data language-table --families separate,block2block --episodes 20 --seed 1 --out data/robot

The dataset depends on families, episodes, seed and size, not on the number of workers.
"""

from __future__ import annotations

from contextlib import closing

from lapa.config import require_at_least
from lapa.envs import episode_seed, record
from lapa.envs.language_table import LanguageTableConfig
from lapa.envs.language_table.simulator import (
    CAMERA,
    LANGUAGE_TABLE,
    LONGEST_MOVE,
    MAX_STEPS,
    LanguageTableEnvironment,
)
from lapa.locks import locks_output

# The frame after it shows the result.
FRAMES_AFTER_SUCCESS = 1


@locks_output
def run(config: LanguageTableConfig) -> None:
    """Records the dataset at `config.out`. Raises UserError on a user's mistake, before any work is done."""
    families = tuple(LANGUAGE_TABLE.parse_tasks(config.families))
    require_at_least(config, episodes=1, look=0, noise=0, workers=1)
    robot = "language-table-xarm"
    recording = record.Recording("language-table", LANGUAGE_TABLE, _attempt, (CAMERA,), robot, horizon_seconds=0.3)
    record.record_dataset(config, families, recording)


def _attempt(config: LanguageTableConfig, family: str, episode: int) -> record.Demonstration | None:
    """Runs in a worker process."""
    seed = episode_seed(config.seed, "demonstration", family, episode)
    # Only what the expert solves is kept, so the authors' oracle, which is slow, need not find a plan first.
    with closing(LanguageTableEnvironment(family, config.size, (CAMERA,), config.look, planned=False)) as environment:
        return record.record(
            environment, seed, episode, FRAMES_AFTER_SUCCESS, MAX_STEPS, config.noise, motion=2, most=LONGEST_MOVE
        )
