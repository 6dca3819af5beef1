"""Language Table: the stand-ins are gone after the imports, and an episode is the authors' own, rendered when asked."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lapa.data.spec import open_dataset
from lapa.envs import episode_seed, make
from lapa.envs.language_table import LanguageTableConfig, simulator
from lapa.envs.language_table import record as recorder
from lapa.envs.language_table.pusher import LONGEST_STEP, push
from lapa.envs.language_table.simulator import (
    CAMERA,
    COMMIT,
    FAMILIES,
    LANGUAGE_TABLE,
    VARIABLE,
    LanguageTableEnvironment,
    check_checkout,
)
from lapa.envs.language_table.stand_ins import PyPolicy, stand_ins
from lapa.errors import UserError
from lapa.evaluation.config import EvaluateConfig
from lapa.evaluation.rollout import evaluate

needs_simulator = pytest.mark.skipif(
    importlib.util.find_spec("pybullet") is None or not os.environ.get(VARIABLE), reason="needs pybullet and a checkout"
)


def test_stand_ins_are_found_by_imports_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium")
    theirs = SimpleNamespace(name="another TensorFlow")
    monkeypatch.setitem(sys.modules, "tensorflow", theirs)
    before = set(sys.modules)
    with stand_ins():
        import tensorflow
        from tf_agents.policies import py_policy
        from tf_agents.trajectories import policy_step

        assert tensorflow is not theirs

    assert py_policy.PyPolicy is PyPolicy and policy_step.__name__ == "tf_agents.trajectories.policy_step"
    assert sys.modules["tensorflow"] is theirs
    assert not {name for name in set(sys.modules) - before if name.startswith("tf_agents")}


def test_a_checkout_that_is_missing_or_of_another_commit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"which \$LANGUAGE_TABLE names: git clone https://github.com"):
        check_checkout()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=re.escape(f"$LANGUAGE_TABLE={tmp_path}: is no checkout of Language Table")):
        check_checkout()
    (tmp_path / "language_table" / "environments").mkdir(parents=True)
    (tmp_path / "language_table" / "environments" / "language_table.py").touch()
    assert check_checkout()["checkout"] == "no git"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    assert len(check_checkout()["checkout"]) == 12
    assert "another commit than the tested one" in capsys.readouterr().err


def test_it_is_simulated_in_processes_of_its_own(tmp_path: Path) -> None:
    config = EvaluateConfig("expert", tmp_path / "out", env="language_table", tasks="separat", episodes=1, workers=0)
    with pytest.raises(UserError, match="did you mean 'separate'"):
        evaluate(config)
    with pytest.raises(UserError, match="--workers must be at least 1 in language_table"):
        evaluate(replace(config, tasks="separate"))


def test_the_expert_pushes_a_block_to_its_goal_from_anywhere() -> None:
    """A round block without friction: it is never pushed away from its goal, and pushes are steered."""
    random = np.random.default_rng(0)
    bounds_22 = np.array([[0.0, -0.5], [0.7, 0.5]])
    steps, furthest = [], 0.0
    for _ in range(100):
        stick_2, block_2, goal_2 = random.uniform((0.15, -0.3), (0.55, 0.3), (3, 2))
        while np.linalg.norm(stick_2 - block_2) < 0.06 or np.linalg.norm(goal_2 - block_2) < 0.06:
            stick_2, block_2 = random.uniform((0.15, -0.3), (0.55, 0.3), (2, 2))
        begun, number = np.linalg.norm(goal_2 - block_2), 0
        while np.linalg.norm(goal_2 - block_2) > 0.03 and number < 100:
            move_2, number = push(stick_2, block_2, goal_2, bounds_22), number + 1
            assert np.linalg.norm(move_2) <= LONGEST_STEP + 1e-9
            for _ in range(10):
                stick_2 = stick_2 + move_2 / 10
                away_2 = block_2 - stick_2
                block_2 = stick_2 + away_2 * max(1, 0.02 / max(np.linalg.norm(away_2), 1e-9))
            furthest = max(furthest, float(np.linalg.norm(goal_2 - block_2) - begun))
        steps.append(number)
    assert np.mean(steps) < 27 and max(steps) < 60 and furthest < 1e-6


class FakeSimulator:
    """Counts what it is asked, and draws from NumPy's global numbers as the checkout's does."""

    bounds_22 = np.array([[0.1, -0.4], [0.315, 0.4]])

    def __init__(self) -> None:
        self.resets, self.images, self.moves = 0, 0, []
        self.pybullet_client = SimpleNamespace(disconnect=lambda: self.moves.append("disconnected"))

    def _observation(self) -> dict[str, np.ndarray]:
        return {"instruction": np.array([104, 105, 0]), "effector_translation": np.array([0.3, 0.1])}

    def reset(self) -> dict[str, np.ndarray]:
        self.resets += 1
        self.drawn = np.random.random()  # noqa: NPY002
        return self._observation()

    def compute_state(self) -> dict[str, np.ndarray]:
        """The block is before the stick, and the goal behind the block."""
        towards = {"start_block": 0.03, "task_target": 0.2}
        return {
            "effector_target_translation": np.array([0.3, 0.1]),
            **{f"effector_target_to_{name}_translation": np.array([x, 0]) for name, x in towards.items()},
        }

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, dict]:
        self.moves.append(action.tolist())
        return self._observation(), 0.0, len(self.moves) == 2, {}

    def image(self) -> np.ndarray:
        self.images += 1
        return np.full((180, 320, 3), 7, np.uint8)

    @staticmethod
    def decode_instruction(codes: np.ndarray) -> str:
        return bytes(codes[codes != 0].tolist()).decode()


class FakeOracle:
    """Finds a plan at the third reset."""

    def __init__(self) -> None:
        self.asked = 0

    def get_plan(self, state: dict[str, np.ndarray]) -> bool:
        self.asked += 1
        return self.asked == 3


def test_an_episode_begins_where_the_oracle_can_plan_and_renders_only_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[FakeSimulator] = []

    def make_fake(task: str, seed: int) -> FakeSimulator:
        made.append(FakeSimulator())
        return made[-1]

    monkeypatch.setattr(simulator, "_make", make_fake)
    monkeypatch.setattr(simulator, "_oracle", lambda simulator: FakeOracle())
    environment = LanguageTableEnvironment("separate", 32, ("rgb",))
    np.random.seed(1)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    environment.reset(2**62 + 5, 0)
    assert np.random.random() == expected  # noqa: NPY002
    assert made[0].resets == 3 and made[0].images == 0
    assert environment.step(np.array([0.5, 0])) is False and environment.step(environment.expert_action()) is True
    # The expert's push ends where the stick may not go further.
    np.testing.assert_allclose(made[0].moves, [[0.1, 0], [0.015, 0]], atol=1e-9)
    assert made[0].images == 0
    seen = environment.observe()
    assert seen.instruction == "hi" and seen.images[CAMERA].shape == (32, 32, 3) and made[0].images == 1
    assert seen.state is not None and seen.state.dtype == np.float32
    drawn = made[0].drawn
    environment.reset(2**62 + 5, 0)
    assert made[0].moves[-1] == "disconnected" and made[1].drawn == drawn
    environment.close()
    demonstration = LanguageTableEnvironment("separate", 32, ("rgb",), planned=False)
    demonstration.reset(0)
    assert made[2].resets == 1


@pytest.fixture
def environment() -> Iterator[LanguageTableEnvironment]:
    made = LanguageTableEnvironment("separate", 64, (CAMERA,))
    yield made
    made.close()


@needs_simulator
def test_the_machine_is_ready() -> None:
    assert LANGUAGE_TABLE.check_machine()["checkout"] == COMMIT[:12]


@needs_simulator
def test_an_episode_is_the_authors_own_to_the_bit(environment: LanguageTableEnvironment) -> None:
    """Against their class, which renders at every step, and their order of calls."""
    seed = episode_seed(0, "evaluation", "separate", 1)
    environment.reset(seed, 1)
    ours = [environment.observe()]
    for action in ([0.02, 0.01], [-0.01, 0.03]):
        environment.step(np.array(action))
        ours.append(environment.observe())

    modules = simulator._modules()
    lazy = modules.simulator
    np.random.seed(seed % 2**32)  # noqa: NPY002
    name, reward = FAMILIES["separate"]
    block_mode = modules.blocks.LanguageTableBlockVariants.BLOCK_8
    theirs = lazy.__base__(block_mode, reward_factory=getattr(modules.rewards[name], reward), seed=seed % 2**32)
    for missing in ("time_step_spec", "action_spec"):
        setattr(theirs, missing, getattr(lazy, missing).__get__(theirs))
    oracle = modules.oracle(theirs, use_ee_planner=True)
    planned = False
    while not planned:
        observation = theirs.reset()
        planned = oracle.get_plan(theirs.compute_state())
    assert ours[0].instruction == theirs.decode_instruction(observation["instruction"])
    for action, seen in zip(([0.02, 0.01], [-0.01, 0.03]), ours[1:], strict=True):
        observation, *_ = theirs.step(np.array(action))
        np.testing.assert_array_equal(observation["effector_translation"].astype(np.float32), seen.state)
    np.testing.assert_array_equal(environment._simulator.image(), observation["rgb"])
    theirs.pybullet_client.disconnect()


@needs_simulator
def test_a_seed_is_an_episode_whatever_came_before(environment: LanguageTableEnvironment) -> None:
    alone = make("language_table", "separate", size=64)
    alone.reset(7, 0)
    environment.reset(3, 0)
    for _ in range(5):
        environment.step(environment.expert_action())
    environment.reset(7, 0)
    before, after = alone.observe(), environment.observe()
    assert before.instruction == after.instruction
    np.testing.assert_array_equal(before.images[CAMERA], after.images[CAMERA])
    alone.close()


@needs_simulator
@pytest.mark.parametrize(
    ("task", "blocks"), [("block2block", 8), ("block2block_4block", 4), ("block2absolute_1block", 1)]
)
def test_the_suites_of_fewer_blocks_have_fewer_on_the_table(task: str, blocks: int) -> None:
    assert task in LANGUAGE_TABLE.parse_tasks("all,4blocks,1block")
    environment = LanguageTableEnvironment(task, 64, (CAMERA,))
    environment.reset(0)
    state = environment._simulator.compute_state()
    places = [at for name, at in state.items() if name.startswith("block_") and name.endswith("_translation")]
    assert sum(at[0] < 1 for at in places) == blocks
    # Of the others one is kept for the constructor, and the heap of eight for the published tasks.
    assert len(environment._simulator._block_ids) == {8: 16, 4: 4, 1: 2}[blocks]
    environment.close()


@needs_simulator
def test_another_look_changes_the_images_and_nothing_of_what_moves() -> None:
    seen: dict[int | None, tuple[np.ndarray, np.ndarray]] = {}
    for look in (None, 1, 2):
        environment = LanguageTableEnvironment("separate", 64, (CAMERA,), look)
        environment.reset(3)
        for _ in range(3):
            environment.step(environment.expert_action())
        observation = environment.observe()
        assert observation.state is not None
        seen[look] = observation.images[CAMERA].astype(int), np.asarray(observation.state)
        environment.close()
    np.testing.assert_array_equal(seen[None][1], seen[1][1])
    assert all(np.abs(seen[one][0] - seen[other][0]).mean() > 20 for one, other in ((None, 1), (None, 2), (1, 2)))


@needs_simulator
def test_the_expert_solves_an_episode_in_a_worker(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = EvaluateConfig("expert", tmp_path / "out", env="language_table", tasks="separate", episodes=1, videos=0)
    report = evaluate(replace(config, workers=1))
    assert report["overall"]["successes"] == 1
    assert report["notes"]["checkout"] == COMMIT[:12] and "pybullet" in report
    assert capfd.readouterr().out == ""


def test_mistakes_of_a_recording_are_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LanguageTableConfig(tmp_path / "data")
    for change, message in (
        ({"families": "separat"}, "did you mean 'separate'"),
        ({"episodes": 0}, "--episodes"),
        ({"size": 65}, "--size must be even"),
        ({"workers": 0}, "--workers"),
        ({"look": -1}, "--look"),
    ):
        with pytest.raises(UserError, match=message):
            recorder.run(replace(config, **change))
    monkeypatch.setattr("lapa.envs._is_installed", lambda name: False)
    with pytest.raises(UserError, match=r'pip install "lapa-vla\[language-table\]"'):
        recorder.run(config)
    assert not (tmp_path / "data").exists()


@needs_simulator
def test_a_recording_is_what_the_expert_did(tmp_path: Path) -> None:
    config = LanguageTableConfig(tmp_path / "data", families="separate", episodes=1, size=64, workers=1)
    recorder.run(config)
    dataset = open_dataset(tmp_path / "data")
    assert (dataset.fps, len(dataset.episodes), dataset.action_dim, dataset.state_dim) == (10, 1, 2, 2)
    actions_TA = dataset.actions(0)
    assert np.linalg.norm(actions_TA, axis=1).max() <= LONGEST_STEP + 1e-6 and np.abs(actions_TA).max() > 0.005
    played = make("language_table", "separate", size=64)
    played.reset(episode_seed(0, "demonstration", "separate", 0), 0)
    assert dataset.episodes[0].instruction == played.observe().instruction
    solved = [played.step(action) for action in actions_TA]
    assert solved.index(True) == len(solved) - 2
    played.close()
