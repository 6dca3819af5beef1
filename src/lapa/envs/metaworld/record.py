"""Demonstrations from Meta-World's scripted experts, written as a dataset; only successful episodes are kept.

    lapa data metaworld --tasks mt10 --episodes 50 --seed 0 --no-actions --out data/videos
    lapa data metaworld --tasks door-open,window-open --episodes 5 --seed 1 --out data/robot

The control rate is 80 Hz and an expert needs 40 to 120 steps, about one second: a horizon of 0.1 to 0.2 seconds
(8 to 16 frames) suits these episodes; the paper's 0.6 seconds would span half of one.
The dataset depends on tasks, episodes, seed and image settings, not on the number of workers.
"""

from __future__ import annotations

from lapa.config import require_at_least
from lapa.envs import episode_seed, record
from lapa.envs.metaworld import MetaworldConfig
from lapa.envs.metaworld.simulator import MAX_STEPS, METAWORLD, Simulator, check_cameras
from lapa.errors import UserError
from lapa.locks import locks_output

# Frames kept after success: enough to show the result, too few to train a policy to stand still.
FRAMES_AFTER_SUCCESS = 5


@locks_output
def run(config: MetaworldConfig) -> None:
    """Records the dataset at `config.out`. Raises UserError on a user's mistake, before any work is done."""
    tasks = tuple(METAWORLD.parse_tasks(config.tasks))
    check_cameras(config.cameras)
    require_at_least(config, episodes=1, look=0, noise=0, workers=1)
    if not 1 <= config.max_steps <= MAX_STEPS:
        raise UserError(f"--max-steps must lie in 1 to {MAX_STEPS} (Meta-World's own limit), got {config.max_steps}")
    # Its control is "delta": the gripper's number is the effort with which it closes, anywhere from -1 to 1.
    robot = "metaworld-sawyer"
    recording = record.Recording("metaworld", METAWORLD, _attempt, config.cameras, robot, horizon_seconds=0.2)
    record.record_dataset(config, tasks, recording)


def play(
    simulator: Simulator, seed: int, *, noise: float = 0.0, max_steps: int = MAX_STEPS
) -> record.Demonstration | None:
    """Records the expert in the episode of `seed`; None without success within `max_steps`."""
    return record.record(simulator, seed, 0, FRAMES_AFTER_SUCCESS, max_steps, noise, motion=3, most=1.0)


_simulator: Simulator | None = None


def _attempt(config: MetaworldConfig, task: str, episode: int) -> record.Demonstration | None:
    """Runs in a worker process, which keeps its simulator until another task comes."""
    global _simulator
    if _simulator is None or _simulator.task != task:
        if _simulator is not None:
            _simulator.close()
        _simulator = Simulator(
            task, size=config.size, cameras=config.cameras, look=config.look, embodiment=config.embodiment
        )
    seed = episode_seed(config.seed, "demonstration", task, episode)
    return play(_simulator, seed, noise=config.noise, max_steps=config.max_steps)
