"""Meta-World: the simulator repeats itself and shows upright pictures; the recorder is exact, resumable and polite."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lapa.data.metadata import JOURNAL
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.envs import episode_seed
from lapa.envs import record as recorder
from lapa.envs.metaworld import MetaworldConfig
from lapa.envs.metaworld import record as metaworld
from lapa.envs.metaworld import simulator as metaworld_simulator
from lapa.envs.metaworld.record import FRAMES_AFTER_SUCCESS
from lapa.envs.metaworld.record import play as record
from lapa.envs.metaworld.simulator import (
    FPS,
    INSTRUCTIONS,
    METAWORLD,
    SUITES,
    Simulator,
    draw_instruction,
)


def picture(simulator: Simulator) -> np.ndarray:
    return simulator.render()["corner4"]


def test_tasks_are_parsed() -> None:
    parse_tasks = METAWORLD.parse_tasks
    assert tuple(parse_tasks("mt10")) == SUITES["mt10"]
    assert len(parse_tasks("mt50")) == 50 and parse_tasks("all") == parse_tasks("MT50")
    assert list(parse_tasks("door-open-v3, window-open,door-open")) == ["door-open", "window-open"]
    with pytest.raises(ValueError, match="did you mean 'door-open'"):
        parse_tasks("dor-open")
    with pytest.raises(ValueError, match="no task given"):
        parse_tasks(" , ")


def test_every_task_has_paraphrases_of_its_own() -> None:
    phrases = [phrase for several in INSTRUCTIONS.values() for phrase in several]
    assert len(set(phrases)) == len(phrases)
    assert all(4 <= len(several) <= 6 for several in INSTRUCTIONS.values())
    assert {draw_instruction("push", seed) for seed in range(50)} == set(INSTRUCTIONS["push"])


def test_tasks_are_those_of_the_package(simulators: None) -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3

    assert {f"{task}-v3" for task in INSTRUCTIONS} == set(ALL_V3_ENVIRONMENTS)
    assert [f"{task}-v3" for task in SUITES["mt10"]] == list(MT10_V3)


def test_demonstrations_and_evaluation_never_share_a_seed() -> None:
    drawn = {
        episode_seed(seed, purpose, task, episode)
        for seed in range(5)
        for purpose in ("demonstration", "evaluation")
        for task in SUITES["mt10"]
        for episode in range(20)
    }
    assert len(drawn) == 5 * 2 * 10 * 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "dor-open"}, "did you mean 'door-open'"),
        ({"cameras": ("corner5",)}, "unknown camera 'corner5'"),
        ({"episodes": 0}, "--episodes"),
        ({"size": 65}, "--size must be even"),
        ({"max_steps": 501}, "--max-steps"),
        ({"noise": -1.0}, "--noise"),
        ({"look": -1}, "--look"),
        ({"workers": 0}, "--workers"),
    ],
)
def test_mistakes_are_named_before_any_work(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metaworld.run(MetaworldConfig(**{"out": tmp_path / "data", **change}))
    assert not (tmp_path / "data").exists()


def test_a_missing_package_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lapa.envs._is_installed", lambda name: False)
    with pytest.raises(ValueError, match=r'pip install "lapa-vla\[metaworld\]"'):
        metaworld.run(MetaworldConfig(out=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_missing_egl_is_named_with_the_packages(
    simulators: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The EGL binding refuses to load with another platform set, as it does without its libraries.
    monkeypatch.setenv("PYOPENGL_PLATFORM", "glx")
    with pytest.raises(ValueError, match=r"through egl.*apt-get install libegl1"):
        metaworld.run(MetaworldConfig(out=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_seed_is_an_episode_whatever_came_before(simulators: None) -> None:
    used, fresh = Simulator("coffee-button", size=64), Simulator("coffee-button", size=64)
    used.reset(1)
    for _ in range(15):
        used.step(used.expert_action())
    pictures = [picture(used)]
    for simulator in (used, fresh):
        simulator.reset(2)
        for _ in range(10):
            simulator.step(simulator.expert_action())
        pictures.append(picture(simulator))
    np.testing.assert_array_equal(used.state, fresh.state)
    np.testing.assert_array_equal(pictures[1], pictures[2])
    assert (pictures[0] != pictures[1]).any()
    used.close()
    fresh.close()


def test_a_shared_renderer_shows_what_one_of_its_own_shows(simulators: None) -> None:
    several = [Simulator("button-press-topdown", size=64) for _ in range(3)]
    for seed, simulator in enumerate(several):
        simulator.reset(seed)
    shared = [picture(simulator) for simulator in several]
    for simulator, seen in zip(several, shared, strict=True):
        metaworld_simulator._renderer.release()
        np.testing.assert_array_equal(picture(simulator), seen)
    assert (shared[0] != shared[1]).any()
    for simulator in several:
        simulator.close()


def test_tasks_alternate_in_one_process(simulators: None) -> None:
    several = [Simulator(task, size=32) for task in ("window-open", "drawer-open")]
    for simulator in several:
        simulator.reset(0)
    first = [picture(simulator) for simulator in several]
    for simulator, seen in zip(several, first, strict=True):
        np.testing.assert_array_equal(picture(simulator), seen)
        simulator.close()


def test_corner_views_stand_upright(simulators: None) -> None:
    simulator = Simulator("door-open", cameras=("corner4", "corner2"))
    simulator.reset(0)
    for seen in simulator.render().values():
        # Above is the grey ground behind the table, below the table's brown wood.
        above, below = seen[2:12, 70:].reshape(-1, 3), seen[90:110, 50:80].reshape(-1, 3)
        assert np.ptp(above.mean(0)) < 12
    assert below.mean(0)[0] > below.mean(0)[2] + 15
    simulator.close()


def test_a_recorded_episode_ends_shortly_after_success(simulators: None) -> None:
    simulator = Simulator("coffee-button", size=32)
    demonstration = record(simulator, 5, noise=0.1)
    assert demonstration is not None
    length = len(demonstration.actions_TA)
    assert demonstration.frames_THWC["corner4"].shape == (length, 32, 32, 3)
    assert demonstration.states_TS.shape == demonstration.actions_TA.shape == (length, 4)
    assert np.abs(demonstration.actions_TA).max() <= 1
    simulator.reset(5)
    solved = [simulator.step(action) for action in demonstration.actions_TA]
    assert solved.index(True) == length - FRAMES_AFTER_SUCCESS - 1
    assert record(simulator, 5, max_steps=5) is None
    simulator.close()


def test_recording_is_the_same_for_any_workers_and_after_a_kill(
    simulators: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The fixture has just made sure, and it takes a second each time.
    monkeypatch.setattr(metaworld, "METAWORLD", replace(METAWORLD, packages=(), check=dict))
    config = MetaworldConfig(tmp_path / "a", tasks="coffee-button,handle-press", episodes=1, size=32, workers=1)
    metaworld.run(config)
    whole = open_dataset(tmp_path / "a")
    assert (whole.fps, len(whole.episodes), whole.action_dim) == (FPS, 2, 4)
    assert whole.action_space is not None and whole.action_space.control == "delta"
    assert not any(whole.action_space.binary)
    assert "embodiment" not in whole.info

    add_episode = DatasetWriter.add_episode

    def dies(writer: DatasetWriter, *arguments: object, **named: object) -> int:
        if writer.num_episodes == 1:
            raise KeyboardInterrupt
        return add_episode(writer, *arguments, **named)  # type: ignore[arg-type]

    bare = {**vars(config), "out": tmp_path / "b", "actions": False, "workers": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DatasetWriter, "add_episode", dies)
        metaworld.run(MetaworldConfig(**bare))
    with pytest.raises(ValueError, match="begun with other settings \\(seed was"):
        metaworld.run(MetaworldConfig(**bare | {"seed": 1, "resume": True}))
    with pytest.raises(ValueError, match="--resume"):
        metaworld.run(MetaworldConfig(**bare))
    metaworld.run(MetaworldConfig(**bare | {"resume": True}))

    resumed = open_dataset(tmp_path / "b")
    assert resumed.action_dim is None and resumed.state_dim is None
    assert resumed.episodes == whole.episodes
    for episode in whole.episodes:
        np.testing.assert_array_equal(whole.frames(episode.index, None), resumed.frames(episode.index, None))


def test_a_dataset_begun_before_there_were_looks_and_embodiments_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metaworld, "METAWORLD", replace(METAWORLD, packages=(), check=dict))
    monkeypatch.setattr(recorder, "record_all", interrupted)
    config = MetaworldConfig(tmp_path / "data", tasks="push", episodes=1, size=32)
    with pytest.raises(KeyboardInterrupt):
        metaworld.run(config)
    begun, journal = tmp_path / "data" / "meta/metaworld.json", tmp_path / "data" / JOURNAL
    settings, header = json.loads(begun.read_text()), json.loads(journal.read_text())
    for name in ("look", "embodiment"):
        settings.pop(name, None)
        header["extra_info"].pop(name, None)
    begun.write_text(json.dumps(settings))
    journal.write_text(json.dumps(header) + "\n")
    with pytest.raises(ValueError, match="look was None, is 3"):
        metaworld.run(replace(config, look=3, resume=True))
    with pytest.raises(KeyboardInterrupt):
        metaworld.run(replace(config, resume=True))


def test_a_dataset_goes_on_in_its_own_look_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metaworld, "METAWORLD", replace(METAWORLD, packages=(), check=dict))
    monkeypatch.setattr(recorder, "record_all", interrupted)
    config = MetaworldConfig(tmp_path / "data", tasks="push", episodes=1, size=32, look=3, embodiment="hand")
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            metaworld.run(replace(config, resume=resume))
    header = json.loads((tmp_path / "data" / JOURNAL).read_text().splitlines()[0])
    assert (header["extra_info"]["look"], header["extra_info"]["embodiment"]) == (3, "hand")
    with pytest.raises(ValueError, match="look was 3, is None"):
        metaworld.run(replace(config, look=None, resume=True))
    with pytest.raises(ValueError, match="embodiment was 'hand', is None"):
        metaworld.run(replace(config, embodiment=None, resume=True))


def test_failed_attempts_are_replaced_by_the_next_seeds() -> None:
    kept, tried = {"a": 0, "b": 0}, {"a": 0, "b": 0}
    first = recorder.next_attempts(2, kept, tried, most=4)
    assert first == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    kept.update(a=2, b=1)
    assert recorder.next_attempts(2, kept, tried, most=4) == [("b", 2)]
    assert recorder.next_attempts(2, kept, tried, most=4) == [("b", 3)]
    assert recorder.next_attempts(2, kept, tried, most=4) == []


def play(look: int | None, task: str = "coffee-button", size: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions, states and pictures of an expert's episode, which must end in success."""
    simulator = Simulator(task, size=size, look=look)
    demonstration = record(simulator, 5)
    simulator.close()
    assert demonstration is not None
    return demonstration.actions_TA, demonstration.states_TS, demonstration.frames_THWC["corner4"]


def test_another_look_changes_the_pictures_and_nothing_of_what_moves(simulators: None) -> None:
    actions_TA, states_TS, plain_THWC = play(None)
    seen = [plain_THWC]
    for look in (1, 2):
        other_actions_TA, other_states_TS, pictures_THWC = play(look)
        np.testing.assert_array_equal(other_actions_TA, actions_TA)
        np.testing.assert_array_equal(other_states_TS, states_TS)
        for before_THWC in seen:
            assert np.abs(pictures_THWC.astype(int) - before_THWC).mean() > 20
        seen.append(pictures_THWC)
    np.testing.assert_array_equal(play(1)[2], seen[1])


@pytest.mark.parametrize("task", ["button-press-topdown", "window-open", "door-open"])
def test_a_hand_is_seen_where_the_robot_was_and_moves_as_it_did(simulators: None, task: str) -> None:
    robot, hand = (Simulator(task, size=64, embodiment=embodiment) for embodiment in (None, "hand"))
    episodes = {simulator: record(simulator, 5) for simulator in (robot, hand)}
    shown, other = episodes[robot], episodes[hand]
    assert shown is not None and other is not None
    np.testing.assert_array_equal(other.actions_TA, shown.actions_TA)
    np.testing.assert_array_equal(other.states_TS, shown.states_TS)
    before_THWC, after_THWC = (each.frames_THWC["corner4"].astype(int) for each in (shown, other))
    # The arm is the only saturated red at the left; skin is bright, with red above green above blue.
    for frames_THWC, pixels_of_arm in ((before_THWC, 50), (after_THWC, 0)):
        left = frames_THWC[:, :, :20]
        red = (left[..., 0] > 60) & (left[..., 1:].max(-1) < 0.4 * left[..., 0])
        assert (red.sum((1, 2)) >= pixels_of_arm).all() and (pixels_of_arm or not red.any())
    skin = (after_THWC[..., 0] > 150) & (np.diff(after_THWC, axis=-1).max(-1) < -15)
    assert (skin.sum((1, 2)) >= 20).all()
    robot.close()
    hand.close()


def test_looks_alternate_in_one_process_as_they_are_alone(simulators: None) -> None:
    several = [Simulator("push", size=32, look=look) for look in (None, 1, 2, None)]
    for simulator in several:
        simulator.reset(0)
    seen = [picture(simulator) for simulator in several]
    np.testing.assert_array_equal(seen[0], seen[3])
    for simulator, before in zip(several, seen, strict=True):
        metaworld_simulator._renderer.release()
        np.testing.assert_array_equal(picture(simulator), before)
        simulator.close()


def test_a_look_keeps_goal_markers_and_what_is_moved_apart_from_the_table(simulators: None) -> None:
    plain = Simulator("push")
    untouched = plain._environment.model
    for look in range(5):
        painted = Simulator("push", look=look)
        model = painted._environment.model
        np.testing.assert_array_equal(model.site_rgba, untouched.site_rgba)
        np.testing.assert_array_equal(model.geom_rgba[:, 3], untouched.geom_rgba[:, 3])
        table, puck = model.material("table_wood").rgba[:3], model.geom("objGeom").rgba[:3]
        shown = [site for site in range(model.nsite) if model.site(site).name == "goal"]
        assert np.linalg.norm(puck - table) > 0.3
        assert all(np.linalg.norm(model.site_rgba[site, :3] - table) > 0.3 for site in shown)
        painted.close()
    plain.close()


def test_table_and_robot_look_the_same_in_every_task(simulators: None) -> None:
    colours = []
    for task in ("push", "drawer-open", "peg-insert-side"):
        simulator = Simulator(task, look=3)
        model = simulator._environment.model
        robot = [
            model.geom_rgba[geom].tolist()
            for geom in range(model.ngeom)
            if model.body(model.geom_bodyid[geom]).name in ("right_l1", "pedestal", "right_hand", "leftpad")
        ]
        colours.append((model.material("table_wood").rgba.tolist(), robot))
        simulator.close()
    assert colours[0] == colours[1] == colours[2]
