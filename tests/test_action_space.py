"""What datasets declare of their actions: written, read by hand-made files too, shown, and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lapa.data.dataset import ActionSpace, Dataset, common_action_space, read_action_space
from lapa.data.info import summary
from lapa.data.lerobot import EXTRA, INFO
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.sources.synthetic import write_synthetic_dataset


def arm(root: Path, names: tuple[str, ...] | None = ("x", "gripper"), **declared) -> Dataset:
    """A dataset of one short episode."""
    writer = DatasetWriter(root, fps=10, cameras={"front": (16, 16)}, action_names=names, **declared)
    actions = None if names is None else np.zeros((3, len(names)), np.float32)
    writer.add_episode({"front": np.full((3, 16, 16, 3), 90, np.uint8)}, "wait", actions=actions)
    return writer.finish()


def test_what_is_declared_comes_back_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = arm(tmp_path / "d", binary_actions=("gripper",), control="delta")
    assert dataset.action_space == ActionSpace(("x", "gripper"), (False, True), "delta")
    assert open_dataset(dataset.root).action_space == dataset.action_space
    Console(width=200).print(summary(dataset))
    assert "2 numbers: x, gripper (binary); delta control" in capsys.readouterr().out


def test_nothing_declared_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    plain = arm(tmp_path / "plain")
    assert plain.action_space == ActionSpace(("x", "gripper"), (False, False), None)
    assert plain.extra == {}
    video = arm(tmp_path / "video", names=None, control="delta")
    assert video.action_space is None and video.extra == {}
    declared = arm(tmp_path / "declared", binary_actions=("gripper",), control="delta")
    assert declared.fingerprint == plain.fingerprint, "labels of a dataset outlive what is declared of its actions"
    assert (plain.root / INFO).read_bytes() == (declared.root / INFO).read_bytes()


def test_a_dataset_from_elsewhere_is_declared_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = arm(tmp_path / "d")
    (dataset.root / EXTRA).unlink()
    assert open_dataset(dataset.root).action_space == ActionSpace(("x", "gripper"), (False, False))
    (dataset.root / EXTRA).write_text(json.dumps({"action_space": {"binary": ["gripper"], "control": "absolute"}}))
    opened = open_dataset(dataset.root)
    assert opened.action_space == ActionSpace(("x", "gripper"), (False, True), "absolute")
    Console(width=200).print(summary(opened))
    assert "absolute control" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"binary": ["griper"]}, r"unknown binary action dimension 'griper'; did you mean 'gripper'"),
        ({"binary": "gripper"}, r"`binary` must be a list of names"),
        ({"control": "relative"}, r"unknown control 'relative'.*known: delta, absolute"),
        ({"gripper": "binary"}, r"action_space must be like"),
        (["gripper"], r"action_space must be like"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, declared: object, told: str) -> None:
    dataset = arm(tmp_path / "d")
    (dataset.root / EXTRA).write_text(json.dumps({"action_space": declared}))
    with pytest.raises(ValueError, match=rf"meta/lapa\.json: {told}"):
        _ = open_dataset(dataset.root).action_space


def test_a_mistake_in_code_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'gripper'"):
        arm(tmp_path / "d", binary_actions=("griper",))
    with pytest.raises(ValueError, match="unknown control 'position'"):
        arm(tmp_path / "d", control="position")
    with pytest.raises(ValueError, match="2 action names and 1 flags"):
        ActionSpace(("x", "y"), (True,))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["x", "gripper"], ("x", "gripper")),
        ({"motors": ["shoulder", "elbow"]}, ("shoulder", "elbow")),
        ({"left": ["a"], "right": ["b"]}, ("a", "b")),
        ({"gripper": 1, "x": 0}, ("x", "gripper")),
        (["x"], ("action_0", "action_1")),
        (None, ("action_0", "action_1")),
        ({"motors": 3}, ("action_0", "action_1")),
        ("xy", ("action_0", "action_1")),
    ],
)
def test_names_are_read_as_lerobot_writes_them(names: object, read: tuple[str, ...]) -> None:
    assert read_action_space({"shape": [2], "names": names}, {}, "here").names == read


def test_synthetic_actions_are_velocities(tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(tmp_path / "d", episodes=1, frames=3, actions=True)
    assert dataset.action_space == ActionSpace(("right", "down"), (False, False), "delta")


def test_datasets_of_one_robot_have_one_action_space(tmp_path: Path) -> None:
    first = arm(tmp_path / "a")
    second = arm(tmp_path / "b", names=("dx", "grip"), control="absolute")
    assert common_action_space([first]) == first.action_space
    assert common_action_space([first, second]) == ActionSpace(("x", "gripper"), (False, False), "absolute")


def test_what_datasets_differ_in_is_said(tmp_path: Path) -> None:
    switch = arm(tmp_path / "switch", binary_actions=("gripper",), control="delta")
    for other, told in (
        (arm(tmp_path / "wide", names=("x", "y", "gripper")), r"wide: has actions of 3 dimensions \(x, y, gripper\)"),
        (arm(tmp_path / "plain"), r"plain: declares nothing binary, .*switch gripper; correct"),
        (
            arm(tmp_path / "absolute", binary_actions=("gripper",), control="absolute"),
            r"differ in control: .*switch delta, .*absolute absolute",
        ),
        (arm(tmp_path / "video", names=None), r"video: has no actions"),
    ):
        with pytest.raises(ValueError, match=told):
            common_action_space([switch, other])
    with pytest.raises(ValueError, match="no dataset"):
        common_action_space([])
