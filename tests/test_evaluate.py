"""Rollouts: the interval, comparable episodes, batched policy calls over worker processes, resume, and mistakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lapa.data.sources.metaworld_simulator import Simulator, check_installation, episode_seed
from lapa.data.video import probe
from lapa.evaluate import rollout
from lapa.evaluate.environments import ENVIRONMENTS, make
from lapa.evaluate.episodes import Job, Setup, play_all
from lapa.evaluate.rollout import EvaluateConfig, evaluate, wilson_interval
from lapa.evaluate.synthetic import DIRECTIONS
from lapa.types import Observation

SQUARES = Setup(
    env="synthetic", size=64, cameras=("front",), seed=0, max_steps=30, actor="policy", slots=6, steps_per_call=4
)
ALL = [Job(direction, (0, 1)) for direction in DIRECTIONS]


class Obedient:
    """Moves the square where the instruction says, in chunks of 8; counts what it is asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, observations: Sequence[Observation]) -> np.ndarray:
        self.batches.append(len(observations))
        angles = [DIRECTIONS.index(o.instruction.removeprefix("move ")) * np.pi / 4 for o in observations]
        actions_BA = 2.5 * np.stack([np.cos(angles), -np.sin(angles)], axis=-1)
        return np.repeat(actions_BA[:, None], 8, axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, and the closed form for none and all of n.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_against_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_at_the_ends() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(6, 5)


def test_baselines_meet_the_same_episodes(tmp_path: Path) -> None:
    config = EvaluateConfig("expert", tmp_path / "expert", env="synthetic", tasks="all", episodes=5, videos=2)
    expert = evaluate(config)
    random = evaluate(replace(config, policy="random", out=tmp_path / "random"))
    assert expert["overall"]["success_rate"] == 1.0
    assert random["overall"]["success_rate"] < 0.3
    assert random["overall"]["interval"][1] < expert["overall"]["interval"][0]
    assert [e["seed"] for e in expert["episodes"]] == [e["seed"] for e in random["episodes"]]
    assert json.loads((tmp_path / "expert" / "results.json").read_text()) == expert
    assert probe(tmp_path / "expert" / "videos" / "up-left.mp4").width == 2 * 64


def test_random_actions_repeat_for_a_seed(tmp_path: Path) -> None:
    config = EvaluateConfig("random", tmp_path / "a", env="synthetic", tasks="up,down", episodes=6, videos=0)
    first = evaluate(config)["episodes"]
    assert evaluate(replace(config, out=tmp_path / "b", parallel=1))["episodes"] == first
    assert evaluate(replace(config, out=tmp_path / "c", seed=1))["episodes"] != first


def test_the_policy_is_asked_in_batches_and_obeyed() -> None:
    policy = Obedient()
    outcomes = list(play_all(SQUARES, ALL, policy, workers=0))
    assert len(outcomes) == 16 and all(outcome.success for outcome in outcomes)
    # 25.6 px at 2.5 px a step, and a call for every 4 steps.
    assert {outcome.steps for outcome in outcomes if outcome.task == "right"} == {11}
    assert policy.batches == [2, 2, 2] * 8


def test_worker_processes_play_what_one_process_plays() -> None:
    policy = Obedient()
    jobs = [Job(direction, tuple(range(12))) for direction in ("up", "left", "down-right")]
    apart = sorted(play_all(SQUARES, jobs, policy, workers=2), key=str)
    assert max(policy.batches) == 12 and sum(policy.batches) >= 3 * 36
    assert apart == sorted(play_all(SQUARES, jobs, Obedient(), workers=0), key=str)


def test_a_failing_worker_is_reported() -> None:
    broken = replace(SQUARES, cameras=("front",), size=64, env="synthetic")
    with pytest.raises(RuntimeError, match="not in tuple"):
        list(play_all(broken, [Job("sideways", (0,))], Obedient(), workers=1))


def test_actions_that_are_not_finite_stop_the_run() -> None:
    with pytest.raises(ValueError, match="not finite"):
        list(play_all(SQUARES, ALL, lambda seen: np.full((len(seen), 1, 2), np.nan), workers=0))


def test_resume_plays_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvaluateConfig("random", tmp_path / "whole", env="synthetic", tasks="up,left", episodes=4, videos=1)
    whole = evaluate(config)
    cut = replace(config, out=tmp_path / "cut")
    write_json = rollout.write_json

    def full_disk(path: Path, value: object) -> None:
        if path.name == "results.json":
            raise OSError("No space left on device")
        write_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(rollout, "write_json", full_disk)
        evaluate(cut)
    journal = cut.out / "episodes.jsonl"
    journal.write_text("\n".join(journal.read_text().splitlines()[:5]) + '\n{"task": "le')
    (cut.out / "videos" / "left.mp4").unlink()
    with pytest.raises(ValueError, match="--resume to go on"):
        evaluate(cut)
    with pytest.raises(ValueError, match=r"begun with other settings \(seed was"):
        evaluate(replace(cut, seed=3, resume=True))
    resumed = evaluate(replace(cut, resume=True))
    assert resumed["episodes"] == whole["episodes"] and resumed["tasks"] == whole["tasks"]
    assert (cut.out / "videos" / "left.mp4").exists()
    assert len(journal.read_text().splitlines()) == 8
    assert evaluate(replace(cut, resume=True)) == resumed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": "metawrld"}, "did you mean 'metaworld'"),
        ({"tasks": "rihgt"}, "did you mean 'right'"),
        ({"policy": "nowhere"}, "nowhere: no such folder"),
        ({"episodes": 0}, "--episodes must be at least 1"),
        ({"max_steps": 5000}, "--max-steps must be at most"),
        ({"steps_per_call": 0}, "--steps-per-call"),
        ({"size": 33}, "--size must be even"),
    ],
)
def test_mistakes_are_named_before_any_work(tmp_path: Path, change: dict, message: str) -> None:
    values = {"policy": "random", "out": tmp_path / "results", "env": "synthetic", "tasks": "all"}
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateConfig(**{**values, **change}))
    assert not (tmp_path / "results").exists()


def test_every_environment_keeps_the_protocol() -> None:
    for name, kind in ENVIRONMENTS.items():
        assert kind.max_steps <= kind.longest and kind.size % 2 == 0
        if not kind.in_process:
            continue
        environment = make(name, kind.parse_tasks("all")[0])
        environment.reset(0)
        seen = environment.observe()
        assert seen.images[kind.cameras[0]].shape == (kind.size, kind.size, 3)
        assert environment.expert_action().shape == (kind.action_dim,)
        assert isinstance(environment.step(environment.expert_action()), bool)
        environment.close()


def test_metaworld_rollouts_in_workers() -> None:
    try:
        check_installation()
    except ValueError as error:
        pytest.skip(str(error))
    first: list[Observation] = []

    def still(observations: Sequence[Observation]) -> np.ndarray:
        first.extend(observations if not first else ())
        assert len(observations) == 6
        return np.zeros((len(observations), 3, 4), np.float32)

    setup = Setup("metaworld", 32, ("corner4",), seed=4, max_steps=6, actor="policy", slots=3)
    jobs = [Job("drawer-open", (0, 1, 2)), Job("window-close", (0, 1, 2))]
    outcomes = list(play_all(setup, jobs, still, workers=2))
    assert len(outcomes) == 6 and not any(outcome.success for outcome in outcomes)
    alone = Simulator("window-close", size=32)
    alone.reset(episode_seed(4, "evaluation", "window-close", 2))
    np.testing.assert_array_equal(first[5].images["corner4"], alone.render()["corner4"])
    assert first[5].instruction == alone.instruction
    alone.close()
