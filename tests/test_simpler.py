"""SIMPLER: actions and states are BridgeData's, what is missing is named, and the tasks run on stand-in assets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lapa.envs import simpler
from lapa.envs.simpler import ASSETS, CAMERAS, NAMES, SIMPLER, SUITES, Simulator, to_simulator, to_state
from lapa.errors import UserError
from lapa.evaluation import rollout
from lapa.evaluation.config import EvaluateConfig
from lapa.sources.rlds.table import KNOWN, columns
from simpler_stand_in import write_assets

CAMERA = CAMERAS[0]
CARROT, EGGPLANT = "widowx_carrot_on_plate", "widowx_put_eggplant_in_basket"
STILL = np.array([0, 0, 0, 0, 0, 0, 1.0])


def turn(axis: int, angle: float) -> np.ndarray:
    """The matrix of a rotation about x, y or z, written out."""
    cosine, sine = np.cos(angle), np.sin(angle)
    matrix, (one, other) = np.eye(3), [number for number in range(3) if number != axis]
    matrix[one, one] = matrix[other, other] = cosine
    matrix[one, other], matrix[other, one] = (sine, -sine) if axis == 1 else (-sine, sine)
    return matrix


def quaternion_of(matrix: np.ndarray) -> np.ndarray:
    """w x y z of a rotation by less than 180 degrees."""
    w = np.sqrt(1 + np.trace(matrix)) / 2
    x, y, z = matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]
    return np.array([w, *np.array([x, y, z]) / (4 * w)])


def test_actions_and_states_have_the_dimensions_and_rate_of_bridge_data() -> None:
    for dataset in ("bridge_dataset", "bridge_orig", "bridge"):
        known = KNOWN[dataset]
        assert (known.fps, known.control, known.binary) == (SIMPLER.fps, "delta", True)
    parts = columns(KNOWN["bridge_orig"].action, {"action": 7})
    action_TA = np.array([[0.01, -0.02, 0.03, 0.1, -0.2, 0.3, opening] for opening in (1.0, 0.4, 0.0)], np.float32)
    read_TA = np.concatenate([part.of({"action": action_TA}, 3) for part in parts], axis=1)
    assert read_TA.shape[1] == len(SIMPLER.action_names)
    # What was read moves the simulator's hand as recorded, and opens and closes its gripper.
    sent_TA = np.stack([to_simulator(action) for action in read_TA])
    np.testing.assert_allclose(sent_TA[:, :3], action_TA[:, :3])
    assert sent_TA[:, 6].tolist() == [1, -1, -1]


def test_roll_pitch_and_yaw_turn_about_the_fixed_axes_of_the_base() -> None:
    roll, pitch, yaw = angles = (0.3, -0.4, 0.5)
    meant = turn(2, yaw) @ turn(1, pitch) @ turn(0, roll)
    first, second, third = to_simulator(np.array([0, 0, 0, *angles, 1]))[3:6]
    # As ManiSkill's controller composes them.
    np.testing.assert_allclose(turn(0, first) @ turn(1, second) @ turn(2, third), meant, atol=1e-12)
    assert abs(np.array([first, second, third]) - angles).max() > 0.1


def test_the_states_rotation_is_zero_where_the_hand_points_down() -> None:
    # Along the fingers is the hand's x axis: a quarter turn about y points it down.
    down = turn(1, np.pi / 2)
    fingers = np.array([0.037, 0.037])
    state = to_state(np.array([0.3, -0.1, 0.2]), quaternion_of(down), fingers)
    np.testing.assert_allclose(state, [0.3, -0.1, 0.2, 0, 0, 0, 1], atol=1e-6)
    roll, pitch, yaw = angles = (0.3, -0.4, 0.5)
    turned = turn(2, yaw) @ turn(1, pitch) @ turn(0, roll) @ down
    np.testing.assert_allclose(to_state(np.zeros(3), quaternion_of(turned), fingers)[3:6], angles, atol=1e-6)


@pytest.mark.parametrize(("fingers", "opening"), [(0.037, 1), (0.015, 0), (0.026, 0.5), (0.0371, 1), (0.0149, 0)])
def test_the_states_gripper_is_its_opening(fingers: float, opening: float) -> None:
    state = to_state(np.zeros(3), np.array([1.0, 0, 0, 0]), np.full(2, fingers))
    assert state[6] == pytest.approx(opening)


def test_missing_assets_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"lacks robots/widowx\S* and \d+ more files.*download_asset -y widowx250s"):
        simpler.check()


def test_the_results_say_where_assets_are_not_simplers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    monkeypatch.setattr(simpler, "choose_driver", lambda: "llvmpipe")
    for name in ASSETS:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    notes = {"protocol": "visual matching, in ManiSkill 3", "assets": "bridge_v2_real2sim", "renderer": "llvmpipe"}
    assert simpler.check() == notes
    (tmp_path / "data" / simpler.TASK_FOLDER / simpler.STAND_IN).touch()
    assert simpler.check() == notes | {"assets": "stand-ins: these figures are not SIMPLER's"}


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """A machine on which the named driver files render; returns those that were tried, "" for the machine's own."""
    for variable in simpler.DRIVER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    files = {install: str(tmp_path / name) for install, name in zip(simpler.CPU_DRIVERS, "ab", strict=True)}
    monkeypatch.setattr(simpler, "CPU_DRIVERS", files)
    for file in files.values():
        Path(file).touch()

    def machine(*working: str) -> list[str]:
        tried: list[str] = []

        def run(*_: object, env: dict[str, str], **__: object) -> subprocess.CompletedProcess:
            file = env.get("VK_ICD_FILENAMES", "")
            tried.append(Path(file).name)
            if Path(file).name in working:
                return subprocess.CompletedProcess([], 0, f"device:{Path(file).name}\n", "")
            return subprocess.CompletedProcess([], 1, "", "RuntimeError: ErrorFeatureNotPresent\n")

        monkeypatch.setattr(subprocess, "run", run)
        return tried

    monkeypatch.setattr(os, "environ", dict(os.environ))
    return machine


def test_a_machine_that_renders_keeps_its_driver(drivers: Callable[..., list[str]]) -> None:
    tried = drivers("", "a", "b")
    assert simpler.choose_driver() == "device:"
    assert tried == [""] and "VK_ICD_FILENAMES" not in os.environ


def test_the_first_driver_for_a_cpu_that_renders_is_chosen(drivers: Callable[..., list[str]]) -> None:
    tried = drivers("b")
    assert simpler.choose_driver() == "device:b"
    assert tried == ["", "a", "b"]
    # What this process starts has it too, and tries no other.
    assert Path(os.environ["VK_ICD_FILENAMES"]).name == "b"
    assert simpler.choose_driver() == "device:b" and tried[3:] == ["b"]


def test_without_a_driver_both_are_named_with_package_and_variable(drivers: Callable[..., list[str]]) -> None:
    drivers()
    with pytest.raises(UserError) as caught:
        simpler.choose_driver()
    message = str(caught.value)
    assert "ErrorFeatureNotPresent" in message and message.count("VK_ICD_FILENAMES=") == 2
    assert "mesa-vulkan-drivers" in message and "chromium" in message


def test_a_missing_library_of_opencv_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "ImportError: libGL.so.1: cannot open shared object file: No such file or directory\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", reason))
    with pytest.raises(UserError, match=r"libGL.so.1.*apt-get install libgl1"):
        simpler.choose_driver()


def test_a_driver_of_the_users_choice_is_not_replaced(drivers: Callable[..., list[str]]) -> None:
    tried = drivers("a", "b")
    os.environ["VK_ICD_FILENAMES"] = "mine.json"
    with pytest.raises(UserError, match="ErrorFeatureNotPresent"):
        simpler.choose_driver()
    assert tried == ["mine.json"]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stand-in assets; skips where ManiSkill or a Vulkan driver is missing. ManiSkill reads the folder's name once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = write_assets(tmp_path_factory.mktemp("assets")) if importlib.util.find_spec("trimesh") else Path()
        patch.setenv("MS_ASSET_DIR", str(folder))
        try:
            SIMPLER.check_machine()
        except UserError as error:
            pytest.skip(str(error))
        yield folder


@pytest.fixture(scope="session")
def simulators(stand_in: Path) -> Iterator[dict[str, Simulator]]:
    """All tasks at once in one process."""
    made = {task: Simulator(task, 64, CAMERAS) for task in NAMES}
    yield made
    for simulator in made.values():
        simulator.close()


def play(simulator: Simulator, episode: int, actions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The image and the state after some actions in an episode."""
    simulator.reset(0, episode)
    for action in actions:
        assert not simulator.step(action)
    seen = simulator.observe()
    assert seen.state is not None
    return seen.images[CAMERA], seen.state


@pytest.mark.parametrize("task", NAMES)
def test_an_episode_is_the_same_whatever_came_before(simulators: dict[str, Simulator], task: str) -> None:
    actions = [np.array([0.01, 0.01, -0.01, 0.05, 0, 0.05, opening]) for opening in (1, 1, 0, 0)]
    first = play(simulators[task], 5, actions)
    other = play(simulators[task], 6, actions)
    again = play(simulators[task], 5, actions)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()


def test_the_hand_moves_as_bridge_data_says(simulators: dict[str, Simulator]) -> None:
    simulator = simulators[CARROT]
    for dim, size in enumerate((0.02, 0.02, 0.02, 0.1, 0.1, 0.1)):
        _, before = play(simulator, 0, [])
        moved = STILL.copy()
        moved[dim] = size
        _, after = play(simulator, 0, [moved, STILL, STILL, STILL])
        change = after - before
        assert change[dim] == pytest.approx(size, rel=0.15)
        assert np.abs(np.delete(change, dim)).max() < 0.15 * size
    closing = STILL.copy()
    closing[6] = 0
    assert play(simulator, 0, [STILL] * 3)[1][6] == pytest.approx(1, abs=0.05)
    assert play(simulator, 0, [closing] * 4)[1][6] == pytest.approx(0, abs=0.05)


def test_the_base_is_turned_in_the_world(simulators: dict[str, Simulator]) -> None:
    simulator = simulators[CARROT]
    hand = simulator._environment.agent.robot.links_map["ee_gripper_link"]
    simulator.reset(0, 0)
    before = hand.pose.p[0].numpy().copy()
    for action in (np.array([0.02, 0.02, 0.02, 0, 0, 0, 1]), STILL, STILL, STILL):
        simulator.step(action)
    np.testing.assert_allclose(hand.pose.p[0].numpy() - before, [-0.02, -0.02, 0.02], atol=0.003)


def test_tasks_alive_at_once_keep_their_photographs_and_objects(simulators: dict[str, Simulator]) -> None:
    seen = {task: play(simulator, 0, [])[0] for task, simulator in simulators.items()}
    photographs = {CARROT: (140, 90, 60), EGGPLANT: (60, 90, 140)}
    for task, colour in photographs.items():
        # The lower right corner is table.
        np.testing.assert_array_equal(seen[task][-1, -1], colour)
    # The sink and the plane in it are in the photograph, not drawn.
    colours = np.unique(seen[EGGPLANT].reshape(-1, 3), axis=0)
    yellow = (colours[:, 0] > 150) & (colours[:, 1] > 130) & (colours[:, 2] < 100)
    assert not yellow.any()


def test_success_is_counted_when_the_object_is_where_it_belongs(simulators: dict[str, Simulator]) -> None:
    import torch
    from mani_skill.utils.structs.pose import Pose

    for task, simulator in simulators.items():
        simulator.reset(0, 0)
        assert not simulator.step(STILL)
        base = simulator._environment
        thing, goal = base.objs[base.source_obj_name], base.objs[base.target_obj_name]
        thing.set_pose(Pose.create_from_pq(p=goal.pose.p + torch.tensor([0, 0, 0.03]), q=thing.pose.q))
        solved = [simulator.step(STILL) for _ in range(3)]
        assert solved[-1], task


def test_instructions_and_initial_states_are_simplers(simulators: dict[str, Simulator]) -> None:
    instructions = {task: simulator.observe().instruction for task, simulator in simulators.items()}
    assert instructions == {
        "widowx_spoon_on_towel": "put the spoon on the towel",
        "widowx_carrot_on_plate": "put carrot on plate",
        "widowx_stack_cube": "stack the green block on the yellow block",
        "widowx_put_eggplant_in_basket": "put eggplant into yellow basket",
    }
    for task, simulator in simulators.items():
        base = simulator._environment
        (known,) = (one for one in SUITES["widowx"] if one.name == task)
        assert len(base.xyz_configs) * len(base.quat_configs) == known.initial_states


def test_an_evaluation_plays_numbered_states_to_the_end_and_names_the_assets(stand_in: Path, tmp_path: Path) -> None:
    def evaluate(**options: object) -> dict:
        config = EvaluateConfig(policy="random", out=tmp_path / "results", env="simpler", tasks=CARROT, **options)
        rollout.run(config)
        return json.loads((tmp_path / "results" / "results.json").read_text())

    results = evaluate(episodes=2, max_steps=3, workers=0, videos=1, size=64)
    assert results["notes"]["assets"] == "stand-ins: these figures are not SIMPLER's"
    assert [episode["steps"] for episode in results["episodes"]] == [3, 3]
    with pytest.raises(UserError, match="24"):
        evaluate(episodes=25)
