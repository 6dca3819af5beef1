"""Rollouts: the interval, comparable episodes, batched policy calls over worker processes, resume, and mistakes."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageColor

from lapa.checksums import SUMS, write_marker
from lapa.data.video import decode_clip, probe
from lapa.drawing import BAD, GOOD, INK
from lapa.envs import ENVIRONMENTS, EnvironmentKind, Task, episode_seed, kind_of, make
from lapa.envs.metaworld.simulator import METAWORLD, Simulator
from lapa.envs.synthetic import DIRECTIONS, SYNTHETIC, SquareEnvironment
from lapa.errors import UserError
from lapa.evaluation import episodes, rollout
from lapa.evaluation.config import EvaluateConfig
from lapa.evaluation.episodes import (
    LostProcessError,
    RolloutSettings,
    TaskEpisodes,
    WorkerReply,
    _answered,
    _LocalWorker,
    _ProcessWorker,
    play_episodes,
)
from lapa.evaluation.rollout import VIDEO_WIDTH, evaluate, wilson_interval
from lapa.policy.execution import TemporalEnsemble
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.types import Observation

SQUARES = RolloutSettings(
    env="synthetic", size=64, cameras=("front",), seed=0, max_steps=30, actor="policy", num_parallel=6, steps_per_call=4
)
ALL = [TaskEpisodes(direction, (0, 1)) for direction in DIRECTIONS]


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
    with pytest.raises(AssertionError, match="6 successes of 5"):
        wilson_interval(6, 5)


def test_baselines_meet_the_same_episodes(tmp_path: Path) -> None:
    config = EvaluateConfig("expert", tmp_path / "expert", env="synthetic", tasks="all", episodes=5, videos=2)
    expert = evaluate(config)
    random = evaluate(replace(config, policy="random", out=tmp_path / "random"))
    zero = evaluate(replace(config, policy="zero", out=tmp_path / "zero"))
    assert expert["overall"]["success_rate"] == 1.0
    assert zero["overall"]["success_rate"] == 0.0
    assert random["overall"]["success_rate"] < 0.3
    assert random["overall"]["interval"][1] < expert["overall"]["interval"][0]
    assert [e["seed"] for e in expert["episodes"]] == [e["seed"] for e in random["episodes"]]
    assert json.loads((tmp_path / "expert" / "results.json").read_text()) == expert
    assert probe(tmp_path / "expert" / "videos" / "up-left-1.mp4").width == VIDEO_WIDTH


@pytest.mark.parametrize(("policy", "colour"), [("expert", GOOD), ("random", BAD)])
def test_a_video_ends_with_its_outcome_below_the_frame(tmp_path: Path, policy: str, colour: str) -> None:
    settings = {"env": "synthetic", "tasks": "up", "episodes": 1, "videos": 1, "max_steps": 30}
    report = evaluate(EvaluateConfig(policy, tmp_path / "out", **settings))
    assert set(report["episodes"][0]) == {"task", "episode", "seed", "success", "steps", "instruction"}
    assert report["episodes"][0]["instruction"] == "move up"
    path = tmp_path / "out" / "videos" / "up-0.mp4"
    video = probe(path)
    shown = decode_clip(path, [0, (video.num_frames or 1) - 1], video.fps)
    assert video.height > video.width == VIDEO_WIDTH
    for frame_HWC, expected in zip(shown, (INK, colour), strict=True):
        edge = frame_HWC[VIDEO_WIDTH + 4 :, :4].mean((0, 1))
        assert np.abs(edge - ImageColor.getrgb(expected)).max() < 30


def test_random_actions_repeat_for_a_seed(tmp_path: Path) -> None:
    config = EvaluateConfig("random", tmp_path / "a", env="synthetic", tasks="up,down", episodes=6, videos=0)
    first = evaluate(config)["episodes"]
    assert evaluate(replace(config, out=tmp_path / "b", parallel=1))["episodes"] == first
    assert evaluate(replace(config, out=tmp_path / "c", seed=1))["episodes"] != first


def test_the_policy_is_asked_in_batches_and_obeyed() -> None:
    policy = Obedient()
    results = list(play_episodes(SQUARES, ALL, policy, num_workers=0))
    assert len(results) == 16 and all(result.success for result in results)
    # 25.6 px at 2.5 px a step, and a call for every 4 steps.
    assert {result.steps for result in results if result.task == "right"} == {11}
    assert policy.batches == [2, 2, 2] * 8


class Wavering(Obedient):
    """Halves its speed at every other call, and in each chunk ever more: overlapping chunks never agree."""

    def __call__(self, observations: Sequence[Observation]) -> np.ndarray:
        states_BS = np.stack([observation.state for observation in observations])
        hesitation_B = 0.5 + 0.5 * (states_BS.astype(int).sum(axis=1) % 2)
        slower_K = np.linspace(1, 0.5, 8)
        actions_BKA = super().__call__(observations) * hesitation_B[:, None, None] * slower_K[:, None]
        return actions_BKA.astype(np.float32)


@pytest.mark.parametrize("steps_per_call", [None, 3])
def test_overlapping_chunks_are_averaged_in_each_episode(steps_per_call: int | None) -> None:
    settings = replace(SQUARES, num_parallel=2, ensemble=0.1, steps_per_call=steps_per_call, binary=(False, False))
    policy = Wavering()
    (result,) = play_episodes(settings, [TaskEpisodes("right", (3,))], policy, num_workers=0)
    assert len(policy.batches) == -(-result.steps // (steps_per_call or 1))

    environment, plan, steps = make("synthetic", "right"), TemporalEnsemble(0.1, steps_per_call or 1), 0
    environment.reset(result.seed, result.episode)
    solved = False
    while not solved:
        solved = environment.step(plan.next(lambda: Wavering()([environment.observe()])[0]))
        steps += 1
    assert result.success and result.steps == steps


@pytest.mark.parametrize("ensemble", [None, 0.1])
def test_worker_processes_play_what_one_process_plays(ensemble: float | None) -> None:
    settings = replace(SQUARES, ensemble=ensemble)
    policy = Wavering()
    assignments = [TaskEpisodes(direction, tuple(range(12))) for direction in ("up", "left", "down-right")]
    apart = sorted(play_episodes(settings, assignments, policy, num_workers=2), key=str)
    assert max(policy.batches) == 12 and sum(policy.batches) >= 3 * 36
    assert apart == sorted(play_episodes(settings, assignments, Wavering(), num_workers=0), key=str)
    # Which episodes share a batch does not matter.
    assert apart == sorted(
        play_episodes(replace(settings, num_parallel=1), assignments, Wavering(), num_workers=0), key=str
    )


def test_an_exception_in_a_worker_is_an_error_of_its_episode_alone() -> None:
    assignments = [TaskEpisodes("sideways", (0,)), TaskEpisodes("up", (0,))]
    lost, played = sorted(play_episodes(SQUARES, assignments, Obedient(), num_workers=1), key=str)
    assert (lost.task, played.task) == ("sideways", "up") and played.success and not played.error
    assert re.fullmatch(r"a simulator process failed \(ValueError: .*not in tuple \(in \w+ of \w+\.py\)\)", lost.error)


def test_a_worker_that_is_killed_while_it_sends_is_lost() -> None:
    worker = _ProcessWorker(SQUARES)
    worker._process.kill()
    worker._connection.close()
    worker._connection, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 100) + b"a part of a reply")
    theirs.close()
    with pytest.raises(LostProcessError, match=r"died \(exit code -9\)"):
        worker.receive()
    worker.close()


def test_actions_that_are_not_finite_stop_the_run() -> None:
    with pytest.raises(ValueError, match="not finite"):
        list(play_episodes(SQUARES, ALL, lambda seen: np.full((len(seen), 1, 2), np.nan), num_workers=0))


def test_resume_plays_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvaluateConfig("random", tmp_path / "whole", env="synthetic", tasks="up,left", episodes=4, videos=1)
    whole = evaluate(config)
    cut = replace(config, out=tmp_path / "cut")

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(rollout, "write_marker", full_disk)
        evaluate(cut)
    journal = cut.out / "episodes.jsonl"
    journal.write_text("\n".join(journal.read_text().splitlines()[:5]) + '\n{"task": "le')
    (cut.out / "videos" / "left-0.mp4").unlink()
    with pytest.raises(ValueError, match="--resume to go on"):
        evaluate(cut)
    with pytest.raises(ValueError, match=r"begun with other settings \(seed was"):
        evaluate(replace(cut, seed=3, resume=True))
    resumed = evaluate(replace(cut, resume=True))
    assert resumed["episodes"] == whole["episodes"] and resumed["tasks"] == whole["tasks"]
    assert (cut.out / "videos" / "left-0.mp4").exists()
    assert len(journal.read_text().splitlines()) == 8
    assert evaluate(replace(cut, resume=True)) == resumed
    (tmp_path / "cut" / "SHA256SUMS").unlink()
    for odd in ([], {**resumed, "overall": None}, {**resumed, "tasks": 1.5}):
        (tmp_path / "cut" / "results.json").write_text(json.dumps(odd))
        with pytest.raises(ValueError, match=r"results.json: no report of `lapa evaluate`"):
            evaluate(replace(cut, resume=True))


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
        ({"ensemble": 0.01}, "--ensemble averages a policy's chunks, and random predicts none"),
        ({"ensemble": float("inf")}, "--ensemble must be a finite number"),
    ],
)
def test_mistakes_are_named_before_any_work(tmp_path: Path, change: dict, message: str) -> None:
    values = {"policy": "random", "out": tmp_path / "results", "env": "synthetic", "tasks": "all"}
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateConfig(**{**values, **change}))
    assert not (tmp_path / "results").exists()


@dataclass(frozen=True)
class Robot:
    """What evaluate asks a loaded policy for, before it acts."""

    cameras: tuple[str, ...] = ("front",)
    action_dim: int = 2
    state_dim: int = 0
    fps: float | None = 10.0
    chunk: int = 8
    binary: tuple[bool, ...] = (False, False)

    @property
    def action_space(self) -> Robot:
        return self

    def infer(self, observations: Sequence[Observation]) -> np.ndarray:
        return Wavering()(observations)


def of_robot(robot: Robot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> EvaluateConfig:
    """A config whose policy folder holds that robot."""
    from lapa.policy.runtime import Policy

    (tmp_path / "policy" / "model").mkdir(parents=True, exist_ok=True)
    (tmp_path / "policy" / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(Policy, "from_pretrained", lambda folder, device, statistics_key: robot)
    values = {"env": "synthetic", "tasks": "up,left", "episodes": 2, "videos": 0, **values}
    return EvaluateConfig(str(tmp_path / "policy"), tmp_path / "results", **values)


@pytest.mark.parametrize(
    ("robot", "values", "message"),
    [
        (
            Robot(cameras=("front", "wrist"), action_dim=7, state_dim=3, fps=5.0),
            {},
            "policy: needs the cameras wrist, synthetic has front; predicts 7 action dimensions, synthetic takes 2; "
            "needs 3 state dimensions, synthetic has 2; acts 5 times a second, synthetic 10 times; "
            "finetune it on episodes from synthetic",
        ),
        (Robot(), {"steps_per_call": 9}, "--steps-per-call 9 is more than the policy's chunk of 8"),
        (Robot(chunk=1), {"ensemble": 0.01}, "--ensemble: a chunk of 1 ends before"),
        (Robot(), {"ensemble": 0.01, "steps_per_call": 8}, "--ensemble: a chunk of 8 ends before"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(
    robot: Robot, values: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(of_robot(robot, tmp_path, monkeypatch, **values))
    assert not (tmp_path / "results").exists()


def test_without_tasks_all_of_the_environment_are_played(tmp_path: Path) -> None:
    results = evaluate(EvaluateConfig("expert", tmp_path / "out", env="synthetic", episodes=1, videos=0))
    assert results["tasks"].keys() == kind_of("synthetic").parse_tasks("all").keys() and len(results["tasks"]) == 8
    assert kind_of("metaworld").default_tasks == "mt10"


def test_an_ensemble_is_resumed_under_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = of_robot(Robot(state_dim=2), tmp_path, monkeypatch, ensemble=0.1)
    whole = evaluate(config)
    (config.out / "results.json").unlink()
    journal = config.out / "episodes.jsonl"
    journal.write_text("\n".join(journal.read_text().splitlines()[:1]) + "\n")
    with pytest.raises(ValueError, match=r"ensemble was 0.1, is None"):
        evaluate(replace(config, ensemble=None, resume=True))
    assert evaluate(replace(config, resume=True))["episodes"] == whole["episodes"]
    (tmp_path / "policy" / "model" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="policy_fingerprint was"):
        evaluate(replace(config, resume=True))


def test_a_policy_is_told_by_the_files_that_it_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, policy = of_robot(Robot(state_dim=2), tmp_path, monkeypatch), tmp_path / "policy"
    (policy / "tokenizer.json").write_text("{}")
    write_marker(policy, "config.json", {}, ["tokenizer.json", "model/model.safetensors"])
    evaluate(config)
    # An export of the policy into its own folder.
    (policy / "lerobot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (policy / "lerobot" / name).write_bytes(b"of another kind")
    (config.out / "results.json").unlink()
    evaluate(replace(config, resume=True))
    (config.out / "results.json").unlink()
    (policy / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="policy_fingerprint was"):
        evaluate(replace(config, resume=True))
    (policy / "tokenizer.json").write_text("{}")
    evaluate(replace(config, resume=True))
    (config.out / "results.json").unlink()
    # As the message on a changed file advises where the change is meant.
    lines = (policy / SUMS).read_text().splitlines(keepends=True)
    (policy / SUMS).write_text("".join(line for line in lines if "model.safetensors" not in line))
    (policy / "model" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="policy_fingerprint was"):
        evaluate(replace(config, resume=True))


def test_observations_bring_the_state_that_datasets_store(tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(tmp_path / "d", episodes=2, frames=6, actions=True)
    environment = make("synthetic", "up")
    environment.reset(0, 0)
    before, action = environment.observe().state, np.array([1.5, -2.0], np.float32)
    environment.step(action)
    assert before is not None and before.dtype == np.float32
    assert len(before) == dataset.state_dim == kind_of("synthetic").state_dim
    np.testing.assert_allclose(environment.observe().state - before, action, atol=1e-5)
    states_TS, actions_TA = dataset.states(1), dataset.actions(1)
    assert states_TS is not None
    np.testing.assert_allclose(states_TS[1] - states_TS[0], actions_TA[0], atol=1e-5)
    # Both say where the square is: its hue there is that of no place far from it.
    for picture_HWC, state_S in (
        (environment.observe().images["front"], environment.observe().state),
        (dataset.frames(1, [0])[0], states_TS[0]),
    ):
        column, row = state_S.astype(int)
        distance_HW = np.abs(picture_HWC.astype(int) - picture_HWC[row, column]).sum(axis=-1)
        rows, columns = np.nonzero(distance_HW < 60)
        np.testing.assert_allclose([columns.mean(), rows.mean()], state_S, atol=2)


def test_environments_of_other_distributions_are_found_by_their_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "their_robot"
    (tmp_path / "their_robot-1.0.dist-info").mkdir()
    (tmp_path / "their_robot-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: their-robot\n")
    (tmp_path / "their_robot-1.0.dist-info" / "entry_points.txt").write_text(
        "[lapa.environments]\nsquares = their_robot:SQUARES\nbroken = their_robot:MISSING\nno-kind = their_robot:make\n"
    )
    package.mkdir()
    (package / "__init__.py").write_text(
        "from dataclasses import replace\nfrom lapa.envs import make\nfrom lapa.envs.synthetic import SYNTHETIC\n"
        "SQUARES = replace(SYNTHETIC, longest=25)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(kind_of("squares"), EnvironmentKind)
    config = EvaluateConfig("expert", tmp_path / "out", env="squares", tasks="up", episodes=2, videos=0)
    report = evaluate(config)
    assert report["overall"]["successes"] == 2 and kind_of("squares").longest == 25
    with pytest.raises(UserError, match="environment 'broken': cannot load their_robot:MISSING"):
        kind_of("broken")
    with pytest.raises(UserError, match=r"their_robot:make is not a lapa\.envs\.EnvironmentKind"):
        kind_of("no-kind")
    with pytest.raises(UserError, match="did you mean 'squares'"):
        kind_of("square")


def test_a_users_mistake_in_a_worker_stays_one() -> None:
    """As where the renderer fails in the worker: the parent raises the same one line."""
    broken = replace(SQUARES, env="nowhere")
    with pytest.raises(UserError, match="unknown environment 'nowhere'"):
        list(play_episodes(broken, [TaskEpisodes("up", (0,))], Obedient(), num_workers=1))


def test_every_environment_keeps_the_protocol() -> None:
    for name in ENVIRONMENTS:
        kind = kind_of(name)
        assert kind.size % 2 == 0
        assert len(kind.action_low) == len(kind.action_high) == kind.action_dim
        if not kind.in_process:
            continue
        environment = make(name, next(iter(kind.parse_tasks("all"))))
        environment.reset(0, 0)
        seen = environment.observe()
        assert seen.images[kind.cameras[0]].shape == (kind.size, kind.size, 3)
        assert seen.state is not None and seen.state.shape == (kind.state_dim,)
        assert environment.expert_action().shape == (kind.action_dim,)
        assert isinstance(environment.step(environment.expert_action()), bool)
        environment.close()


def test_metaworld_rollouts_in_workers() -> None:
    try:
        METAWORLD.check_machine()
    except ValueError as error:
        pytest.skip(str(error))
    first: list[Observation] = []

    def still(observations: Sequence[Observation]) -> np.ndarray:
        first.extend(observations if not first else ())
        assert len(observations) == 6
        return np.zeros((len(observations), 3, 4), np.float32)

    settings = RolloutSettings("metaworld", 32, ("corner4",), seed=4, max_steps=6, actor="policy", num_parallel=3)
    assignments = [TaskEpisodes("drawer-open", (0, 1, 2)), TaskEpisodes("window-close", (0, 1, 2))]
    results = list(play_episodes(settings, assignments, still, num_workers=2))
    assert len(results) == 6 and not any(result.success for result in results)
    alone = Simulator("window-close", size=32)
    alone.reset(episode_seed(4, "evaluation", "window-close", 2))
    np.testing.assert_array_equal(first[5].images["corner4"], alone.render()["corner4"])
    # The state that `lapa data metaworld` stores.
    np.testing.assert_array_equal(first[5].state, alone.state)
    assert alone.state.shape == (kind_of("metaworld").state_dim,)
    assert first[5].instruction == alone.instruction
    alone.close()


def test_resume_knows_a_policy_under_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = of_robot(Robot(state_dim=2), tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    config = replace(config, policy=os.path.relpath(config.policy))
    whole = evaluate(config)
    (config.out / "results.json").unlink()
    absolute = replace(config, policy=str(Path(config.policy).resolve()), resume=True)
    assert evaluate(absolute)["episodes"] == whole["episodes"]
    shutil.move(config.policy, tmp_path / "moved")
    assert evaluate(replace(absolute, policy=str(tmp_path / "moved")))["episodes"] == whole["episodes"]


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (Task("up", 40), {"policy": "expert"}, "synthetic has no expert for up; evaluate a policy, or `random`"),
        (
            Task("up", 40, initial_states=2),
            {"episodes": 3},
            "--episodes must be at most the 2 initial states of up in synthetic, got 3",
        ),
    ],
)
def test_what_a_task_lacks_is_named_before_any_work(
    task: Task, values: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "kind_of", lambda name: replace(SYNTHETIC, suites=lambda: {"all": [task]}))
    config = EvaluateConfig("random", tmp_path / "results", env="synthetic", tasks="up", episodes=2)
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(replace(config, **values))
    assert not (tmp_path / "results").exists()


def test_a_kind_may_play_to_the_limit_and_note_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make_square(task: str, size: int, cameras: Sequence[str]) -> SquareEnvironment:
        made.append(task)
        return SquareEnvironment(task, size, cameras)

    tasks = [Task("up", 30, expert=True), Task("left", 35, expert=True)]
    kind = replace(
        SYNTHETIC,
        make=make_square,
        suites=lambda: {"both": tasks},
        check=lambda: {"protocol": "squares"},
        stops_at_success=False,
    )
    monkeypatch.setitem(ENVIRONMENTS, "others", "others:KIND")
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: kind)
    config = EvaluateConfig("expert", tmp_path / "out", env="others", tasks="both", episodes=3, videos=0, workers=0)
    report = evaluate(config)
    assert {row["task"]: row["steps"] for row in report["episodes"]} == {"up": 30, "left": 35}
    assert report["overall"]["successes"] == 6 and report["notes"] == {"protocol": "squares"}
    assert report["config"]["max_steps"] == {"up": 30, "left": 35}
    assert made == ["up", "left"]  # one each, since a baseline plays one episode after the other

    (config.out / "results.json").unlink()
    kind = replace(kind, check=lambda: {"protocol": "circles"})
    with pytest.raises(UserError, match=r"notes\.protocol was 'squares', is 'circles'"):
        evaluate(replace(config, resume=True))
    kind = replace(kind, check=lambda: {"protocol": "squares", "renderer": "another"})
    resumed = evaluate(replace(config, resume=True))
    assert resumed["notes"]["renderer"] == "another" and resumed["episodes"] == report["episodes"]


@pytest.mark.parametrize(("workers", "parallel", "expected"), [(9, 2, (2, 1)), (2, 5, (2, 2)), (0, 5, (0, 5))])
def test_no_more_simulators_than_parallel(
    workers: int, parallel: int, expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[int, int]] = []

    def play(settings: RolloutSettings, assignments: Any, infer: Any, num_workers: int, **options: bool) -> list:
        chosen.append((num_workers, settings.num_parallel))
        return []

    monkeypatch.setattr(rollout, "play_episodes", play)
    monkeypatch.setattr(rollout, "kind_of", lambda name: replace(SYNTHETIC, in_process=False))
    config = of_robot(Robot(state_dim=2), tmp_path, monkeypatch, episodes=20, workers=workers, parallel=parallel)
    report = evaluate(config)
    assert chosen == [expected]
    assert report["overall"]["success_rate"] is None
    cells = [list(column.cells) for column in rollout._table(report).columns]
    assert [column[-1] for column in cells[1:3]] == ["0 of 0", "-"]


def test_random_actions_need_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = replace(SYNTHETIC, action_high=(float("inf"), 1.0))
    monkeypatch.setattr(rollout, "kind_of", lambda name: kind)
    with pytest.raises(UserError, match="synthetic has actions without bounds"):
        evaluate(EvaluateConfig("random", tmp_path / "out", env="synthetic", tasks="up"))


FRAGILE = """
import os, time
from dataclasses import replace
from pathlib import Path
from lapa.envs.synthetic import SYNTHETIC, SquareEnvironment

class Fragile(SquareEnvironment):
    def reset(self, seed, episode):
        super().reset(seed, episode)
        begun = Path(os.environ["BEGUN"]) / str(episode)
        count = len(begun.read_text()) if begun.exists() else 0
        begun.write_text("x" * (count + 1))
        if episode == 1 and count == 0:
            os.abort()
        if episode == 4 and not (begun.parent / "repaired").exists():
            time.sleep(60)

FRAGILE = replace(SYNTHETIC, make=Fragile, in_process=False)
"""


def test_episodes_of_a_lost_process_are_repeated_once_and_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    (tmp_path / "fragile-1.0.dist-info").mkdir()
    (tmp_path / "fragile-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\n")
    (tmp_path / "fragile-1.0.dist-info" / "entry_points.txt").write_text(
        "[lapa.environments]\nfragile = fragile:FRAGILE\n"
    )
    (tmp_path / "begun").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BEGUN", str(tmp_path / "begun"))
    monkeypatch.setattr("lapa.evaluation.episodes.HANG_SECONDS", 8)
    monkeypatch.setattr("lapa.evaluation.episodes.SLOW_SECONDS", 1)
    config = EvaluateConfig("expert", tmp_path / "out", env="fragile", tasks="up", episodes=6, videos=0)
    config = replace(config, workers=1, parallel=2)
    report = evaluate(config)
    overall = report["overall"]
    assert (overall["successes"], overall["episodes"], overall["errors"]) == (5, 5, 1)
    assert report["episodes"][4]["error"].startswith("a simulator process hung")
    assert [row["episode"] for row in report["episodes"]] == list(range(6))
    assert all("error" not in row for row in report["episodes"] if row["episode"] != 4)
    assert len((tmp_path / "begun" / "4").read_text()) >= 2
    printed = capsys.readouterr().err
    assert "died (exit code -6), perhaps for lack of memory; to be repeated one by one: up, episode 1" in printed
    assert "again in episode 4 of up, which counts as an error" in printed
    assert "a simulator process is silent for 1 s (up, episodes 4)" in printed

    (tmp_path / "begun" / "repaired").touch()
    resumed = evaluate(replace(config, resume=True))
    assert "errors" not in resumed["overall"] and resumed["overall"]["successes"] == 6
    assert len((tmp_path / "begun" / "0").read_text()) == 1
    assert evaluate(replace(config, resume=True)) == resumed


class Silent:
    """A worker of the parent process that replies once it is waited for so often."""

    def __init__(self, waits: int) -> None:
        self.waits, self.slow, self.assignment = waits, False, TaskEpisodes("up", (0,))
        self.waited: list[float] = []

    def replied(self, timeout: float) -> bool:
        self.waited.append(timeout)
        self.waits -= 1
        return self.waits < 0


def test_others_go_on_without_a_process_that_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    quick, silent = Silent(0), Silent(3)
    assert _answered([silent, quick]) == [quick]
    assert "a simulator process is silent for 60 s (up, episodes 0)" in capsys.readouterr().err
    quick.waits = 0
    assert _answered([silent, quick]) == [quick]
    assert silent.waited[-1] == 0.0
    # Alone it is waited for, until it replies.
    assert _answered([silent]) == [silent]
    assert silent.waited[-1] > 0.0
    assert capsys.readouterr().err == ""


def test_an_environment_in_which_every_episode_raises_ends_the_run(tmp_path: Path, broken: None) -> None:
    config = EvaluateConfig("expert", tmp_path / "out", env="broken", tasks="up", episodes=9, videos=0)
    with pytest.raises(UserError, match=r"the first 3 episodes all ended in the same error: .*KeyError.*--resume"):
        evaluate(replace(config, workers=1, parallel=1))
    assert len((tmp_path / "out" / "episodes.jsonl").read_text().splitlines()) == 2


class InThisProcess(_LocalWorker):
    """A worker process in which an exception is the loss of the process, without the seconds that a new one takes."""

    def send(self, message: TaskEpisodes | np.ndarray) -> None:
        self.lost = None
        try:
            super().send(message)
        except KeyError as error:
            self.lost = LostProcessError(str(error))

    def receive(self) -> WorkerReply:
        if self.lost:
            raise self.lost
        return super().receive()


def test_what_a_simulator_prints_is_not_among_the_figures(
    tmp_path: Path, broken: None, capfd: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig("expert", tmp_path / "out", env="broken", tasks="right", episodes=1, videos=0, json=True)
    rollout.run(replace(config, workers=1, parallel=1))
    assert json.loads(capfd.readouterr().out)["overall"]["episodes"] == 1


def test_no_evaluation_stops_early_before_an_error_in_every_task(broken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "_ProcessWorker", InThisProcess)
    settings = replace(SQUARES, env="broken", actor="expert", num_parallel=1)
    first, *others = play_episodes(settings, [TaskEpisodes("left", (0, 1, 2)), TaskEpisodes("right", (0,))], None, 1)
    assert first.error and first.task == "left"
    # The other task is tried next, and once one episode was played, all are.
    assert [(each.task, each.episode, bool(each.error)) for each in others] == [
        ("right", 0, False),
        ("left", 1, True),
        ("left", 2, True),
    ]


def test_a_resumed_evaluation_plays_all_episodes_and_keeps_its_report_until_the_next(
    tmp_path: Path, broken: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodes, "_ProcessWorker", InThisProcess)
    out = tmp_path / "out"
    config = EvaluateConfig("expert", out, env="broken", tasks="left", episodes=4, videos=0, workers=1, parallel=1)
    with pytest.raises(UserError, match="which plays all the others"):
        evaluate(config)
    resumed = replace(config, resume=True)
    assert evaluate(resumed)["overall"]["errors"] == 3

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rollout, "play_episodes", interrupted)
        evaluate(resumed)
    assert json.loads((out / "results.json").read_text())["overall"]["errors"] == 3
    assert evaluate(resumed)["overall"]["errors"] == 3
    assert (out / "SHA256SUMS").exists()


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "broken-1.0.dist-info").mkdir()
    (tmp_path / "broken-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\n")
    (tmp_path / "broken-1.0.dist-info" / "entry_points.txt").write_text("[lapa.environments]\nbroken = broken:BROKEN\n")
    monkeypatch.syspath_prepend(tmp_path)


BROKEN = """
import os
from dataclasses import replace
from lapa.envs.synthetic import SYNTHETIC, SquareEnvironment

class Broken(SquareEnvironment):
    # All episodes of up fail, and the first three of left.
    def reset(self, seed, episode=0):
        super().reset(seed, episode)
        self.fails = self._task == "up" or (self._task == "left" and episode < 3)
        print("a banner", flush=True)
        os.system("echo a banner of another language")

    def step(self, action):
        if self.fails:
            raise KeyError("pixels")
        return super().step(action)

BROKEN = replace(SYNTHETIC, make=Broken, in_process=False)
"""
