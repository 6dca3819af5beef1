"""What a policy says of recorded episodes: the figures are worked by hand, and the command measures what is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lapa import config as configs
from lapa.data.dataset import ActionSpace, Dataset
from lapa.data.labels import MANIFEST, EpisodeLabels, Labels, Manifest, shard_path, write_shard
from lapa.data.sampling import split_episodes
from lapa.errors import UserError
from lapa.policy import open_loop as measure
from lapa.policy.actions import ActionBins, KeyedSpace, Statistics
from lapa.policy.backbones import create_backbone, tiny
from lapa.policy.config import MeasureConfig, TinyConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.open_loop import _labelled_places, action_figures, code_figures, measure_actions
from lapa.policy.prompts import Prompts
from lapa.policy.runtime import Policy, load_policy
from lapa.policy.training import trained_episodes, trainings_of
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.types import Observation
from lapa.verdicts import judge, of_policy

SPACE = ActionSpace(("right", "gripper"), (False, False), "delta")
CHUNK = 3
SMALL = TinyConfig(image_size=32, vision_widths=(16, 32), width=32, layers=1, heads=2)


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(tmp_path_factory.mktemp("m") / "d", episodes=5, frames=8, size=32, actions=True)


@pytest.fixture(scope="module")
def labels(square: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels with a horizon of 3 frames; episode 1 has none."""
    folder = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(0)
    episodes = {number: EpisodeLabels(np.arange(5), rng.integers(0, 8, (5, 4))) for number in (0, 2, 3, 4)}
    write_shard(shard_path(folder, 0, 4), episodes)
    manifest = Manifest("lam", square.fingerprint, "front", 0.3, 3, 4, 8, 20, 4, 1, [[0.125] * 8] * 4)
    configs.save(manifest, folder / MANIFEST)
    return folder


@pytest.fixture(scope="module")
def policies(square: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saved policies with untrained weights: one pretrained only, one that has robot actions."""
    root = tmp_path_factory.mktemp("policies")
    torch.manual_seed(0)
    actions_NA = np.concatenate([square.actions(episode) for episode in range(5)])
    space = square.action_space
    assert space is not None
    bins = ActionBins.fit(actions_NA, binary=space.binary)
    texts = [episode.instruction for episode in square.episodes]
    backbone, processor, vocabulary = create_backbone(SMALL, texts=texts, num_cameras=1, segments={"latent": 8})
    config = PolicyConfig(vocabulary, square.cameras, SMALL, latent_length=4, lam_fingerprint="lam")
    pretrained = LatentPolicy(config, backbone)
    Policy(pretrained, processor).save_pretrained(root / "pretrained", run={})
    acting = pretrained.grown(
        replace(
            pretrained.config,
            vocabulary=replace(vocabulary, bins=256),
            spaces=(KeyedSpace("robot", space),),
            action_bins=tuple(bins.counts_A.tolist()),
            chunk=CHUNK,
        )
    )
    Policy(acting, processor, {"robot": Statistics(bins)}).save_pretrained(root / "acting", run={})
    return root


class Scripted:
    """An actor that knows the dataset: says what was done, or half of it, or its mean."""

    chunk, state_dim = CHUNK, 0

    def __init__(self, dataset: Dataset, share: float, camera: str = "") -> None:
        self.cameras = (camera,) if camera else dataset.cameras
        self.share, self.dataset = share, dataset
        self.action_dim = dataset.action_dim or 0
        assert dataset.action_space is not None
        self.action_space = dataset.action_space
        self.asked = 0
        pictures = [dataset.frames(episode) for episode in range(len(dataset.lengths))]
        self._known = [picture.tobytes() for several in pictures for picture in several]
        self._places = [(e, f) for e, length in enumerate(dataset.lengths) for f in range(length)]

    def infer(self, observations: Sequence[Observation]) -> np.ndarray:
        self.asked += len(observations)
        said = []
        for observation in observations:
            episode, frame = self._places[self._known.index(observation.images[self.cameras[0]].tobytes())]
            assert observation.instruction == self.dataset.episodes[episode].instruction
            actions_TA = self.dataset.actions(episode)
            said.append(actions_TA[np.minimum(frame + np.arange(CHUNK), len(actions_TA) - 1)] * self.share)
        return np.stack(said).astype(np.float32)


def config_for(dataset: Dataset, **changes: object) -> MeasureConfig:
    return MeasureConfig(policy=Path("unused"), data=dataset.root, **changes)  # type: ignore[arg-type]


def test_action_figures_are_those_worked_by_hand() -> None:
    true_NKA = np.array([[[1.0, 1.0], [3.0, 1.0]], [[-1.0, 1.0], [9.0, 9.0]]])
    said_NKA = np.array([[[0.0, 1.0], [3.0, 0.0]], [[-2.0, 1.0], [0.0, 0.0]]])
    counted_NK = np.array([[True, True], [True, False]])
    figures = action_figures(said_NKA, true_NKA, counted_NK, np.array([1.0, 1.0]), SPACE)
    right, gripper = figures["dimensions"]["right"], figures["dimensions"]["gripper"]
    assert right["action_error"] == pytest.approx(2 / 3) and right["mean_action_error"] == pytest.approx(4 / 3)
    assert right["normalised_error"] == pytest.approx(0.5)
    # The counted values are 1, 3, -1: their squares about the mean add up to 8, the errors' to 2.
    assert right["r2"] == pytest.approx(1 - 2 / 8)
    assert gripper["action_error"] == pytest.approx(1 / 3)
    assert gripper["r2"] is None and gripper["normalised_error"] is None
    assert figures["action_error"] == pytest.approx(0.5) and figures["mean_action_error"] == pytest.approx(2 / 3)
    assert figures["normalised_error"] == pytest.approx(0.75) and figures["r2"] == pytest.approx(0.75)
    assert figures["action_error_by_step"] == pytest.approx([0.5, 0.5])
    # Of the first steps one says nothing (cosine 0), one the right way; the gripper has no direction.
    assert figures["direction"] == pytest.approx(0.5) and figures["mean_action_direction"] == pytest.approx(0.0)
    # The first steps predict 0 and -2 where 1 and -1 were recorded.
    assert figures["length"] == pytest.approx(1.0) and figures["mean_action_length"] == pytest.approx(1.0)


def test_where_nothing_moves_there_is_no_direction() -> None:
    still_NKA = np.zeros((2, 1, 2))
    figures = action_figures(still_NKA + 1, still_NKA, np.ones((2, 1), bool), np.zeros(2), SPACE)
    assert all(figures[name] is None for name in ("direction", "length", "r2", "normalised_error"))


def test_code_figures_are_those_worked_by_hand() -> None:
    true_NL = np.array([[0, 1], [0, 2], [0, 1], [3, 1]])
    said_NL = np.array([[0, 1], [0, 1], [3, 1], [3, 2]])
    figures = code_figures(said_NL, true_NL)
    assert figures["token_accuracy_per_position"] == [0.75, 0.5] and figures["token_accuracy"] == 0.625
    assert figures["most_frequent_token_per_position"] == [0.75, 0.75]
    assert figures["latent_action_accuracy"] == 0.25 and figures["most_frequent_latent_action"] == 0.5


def test_saying_what_was_done_is_perfect_and_half_of_it_is_half_wrong(square: Dataset) -> None:
    perfect = measure_actions(Scripted(square, 1.0), square, config_for(square))
    assert perfect["num_steps"] == square.num_frames and perfect["action_error"] == 0
    assert perfect["r2"] == 1 and perfect["direction"] == pytest.approx(1) and perfect["mean_action_error"] > 0
    half = measure_actions(Scripted(square, 0.5), square, config_for(square, batch_size=7))
    mean_size = np.abs(np.concatenate([square.actions(episode) for episode in range(5)])).mean()
    # Velocities are the same all episode long, so that every part of the data has the same mean size.
    assert half["action_error"] == pytest.approx(mean_size / 2, rel=1e-5)
    assert half["direction"] == pytest.approx(1) and half["length"] == pytest.approx(0.5)


def test_samples_are_spread_over_all_episodes_and_steps_cut_the_chunk(square: Dataset) -> None:
    actor = Scripted(square, 0.5)
    figures = measure_actions(actor, square, config_for(square, samples=5, steps=2))
    assert actor.asked == figures["num_steps"] == 5
    assert figures["chunk_steps"] == 2 and len(figures["action_error_by_step"]) == 2
    places = measure._spread([np.arange(8)] * 5, 5)
    assert [episode for episode, _ in places] == [0, 1, 2, 3, 4] and places[-1] == (4, 7)


def test_a_camera_of_another_name_takes_the_only_slot(square: Dataset) -> None:
    actor = Scripted(square, 1.0, camera="corner4")
    assert measure_actions(actor, square, config_for(square, samples=4))["action_error"] == 0
    with pytest.raises(ValueError, match="unknown camera 'back'"):
        measure_actions(actor, square, config_for(square, cameras=("back",)))
    actor.cameras = ("corner4", "wrist")
    with pytest.raises(ValueError, match="the policy was trained with corner4, wrist; choose with --cameras"):
        measure_actions(actor, square, config_for(square))


def test_the_command_measures_what_the_policy_says(square: Dataset, policies: Path, tmp_path: Path) -> None:
    measure.run(MeasureConfig(policies / "acting", square.root, tmp_path / "out", samples=6, device="cpu"))
    written = json.loads((tmp_path / "out" / "measure.json").read_text())
    policy = Policy.from_pretrained(policies / "acting", device="cpu")
    errors = []
    for episode, frame in measure._spread([np.arange(8)] * 5, 6):
        seen = {square.cameras[0]: square.frames(episode, [frame])[0]}
        said_KA = policy.infer([Observation(seen, square.episodes[episode].instruction)])[0]
        true_TA = square.actions(episode)[frame : frame + CHUNK]
        errors += np.abs(said_KA[: len(true_TA)] - true_TA).ravel().tolist()
    assert written["action_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert set(written["dimensions"]) == {"right", "down"} and written["torch"] == torch.__version__
    assert written["config"]["samples"] == 6 and "token_accuracy" not in written
    with pytest.raises(ValueError, match="--overwrite"):
        measure.run(MeasureConfig(policies / "acting", square.root, tmp_path / "out", device="cpu"))


@pytest.mark.parametrize(("share", "level"), [(1.0, "good"), (0.5, "doubtful"), (-1.0, "bad")])
def test_the_verdict_on_an_actor(square: Dataset, share: float, level: str) -> None:
    """One that does what was recorded, half of it, and the opposite."""
    assert judge(of_policy(measure_actions(Scripted(square, share), square, config_for(square)))).level == level


def test_episodes_that_were_trained_on_are_left_out(
    square: Dataset, policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    policy = Policy.from_pretrained(policies / "acting", device="cpu")
    run = {"dataset_fingerprints": [square.fingerprint], "held_out": 0.4, "loop": {"seed": 7}, "policy": None}
    policy.save_pretrained(tmp_path / "first", run=run)
    trained = split_episodes(5, 0.4, 7, "train")
    found, all_recorded = trained_episodes(tmp_path / "first", square)
    np.testing.assert_array_equal(found, trained)
    assert all_recorded
    # A policy that was finetuned from it on another dataset has seen them too, wherever the first is now.
    later = {**run, "dataset_fingerprints": ["other"], "policy": "gone"}
    record = {"earlier_trainings": trainings_of(tmp_path / "first")}
    policy.save_pretrained(tmp_path / "second", run={**later, **record})
    found, all_recorded = trained_episodes(tmp_path / "second", square)
    np.testing.assert_array_equal(found, trained)
    assert all_recorded and len(trainings_of(tmp_path / "second")) == 2

    config = MeasureConfig(tmp_path / "second", square.root, tmp_path / "out", device="cpu")
    counts = {"others": (2, 0), "trained": (3, 3), "all": (5, 3)}
    for episodes, expected in counts.items():
        measure.run(replace(config, episodes=episodes, overwrite=True))
        written = json.loads((tmp_path / "out" / "measure.json").read_text())
        assert (written["num_episodes"], written["num_trained_episodes"]) == expected
        assert (written["num_steps"], len(written["dimensions"])) == (8 * expected[0], 2)
        seen = f"it was trained on {expected[1]} of the {expected[0]} episodes" in written["verdict"]["reasons"]
        assert seen == (episodes != "others")
    assert "2 of 5 episodes of d, 0 of them trained on; the policy was trained on 3" in capsys.readouterr().out
    policy.save_pretrained(tmp_path / "first", run={**run, "held_out": 0.0})
    measure.run(replace(config, policy=tmp_path / "first", overwrite=True))
    assert "trained on every episode" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no record of training on its episodes"):
        measure.run(replace(config, policy=policies / "acting", episodes="trained", overwrite=True))


def test_what_is_not_recorded_of_the_training_is_said(
    square: Dataset, policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    policy = Policy.from_pretrained(policies / "acting", device="cpu")
    run = {"dataset_fingerprints": [square.fingerprint], "held_out": 0.4, "loop": {"seed": 7}}
    for began, complete in ({"policy": "p"}, False), ({"policy": "p", "from_scratch": True}, True), ({}, True):
        policy.save_pretrained(tmp_path / "old", run={**run, **began})
        found, all_recorded = trained_episodes(tmp_path / "old", square)
        assert (len(found), all_recorded) == (3, complete)
    assert trainings_of(policies / "acting") == [None]
    measure.run(MeasureConfig(policies / "acting", square.root, tmp_path / "out", device="cpu"))
    verdict = json.loads((tmp_path / "out" / "measure.json").read_text())["verdict"]
    assert verdict["level"] != "good" and "not recorded which episodes it was trained on" in verdict["reasons"]
    assert "not all of its training is recorded" in capsys.readouterr().out
    for damage in {"held_out": "x"}, {"loop": None}, {"dataset_fingerprints": 3}, {"earlier_trainings": [{}]}:
        policy.save_pretrained(tmp_path / "old", run={**run, **damage})
        with pytest.raises(UserError, match=r"config.json: what it records of its training is damaged"):
            trained_episodes(tmp_path / "old", square)


def test_labels_of_other_episodes_only_are_no_mistake_of_the_labels(
    square: Dataset, labels: Path, policies: Path, tmp_path: Path
) -> None:
    """Episode 1 has no labels."""
    opened = Labels.open(labels)
    config = MeasureConfig(policies / "pretrained", square.root, tmp_path / "out", labels=labels, device="cpu")
    with pytest.raises(UserError, match="that --episodes others chooses; use --episodes all"):
        _labelled_places(opened, square, config, np.array([1]))


def test_a_pretrained_policy_is_measured_on_labels(
    square: Dataset, labels: Path, policies: Path, tmp_path: Path
) -> None:
    config = MeasureConfig(policies / "pretrained", square.root, tmp_path / "out", labels=labels, device="cpu")
    measure.run(config)
    written = json.loads((tmp_path / "out" / "measure.json").read_text())
    assert written["num_labels"] == 20 and "action_error" not in written
    opened = Labels.open(labels)
    true_NL = np.concatenate([opened.codes(episode)[1] for episode in (0, 2, 3, 4)])
    most = [np.bincount(column).max() / 20 for column in true_NL.T]
    assert written["most_frequent_token_per_position"] == pytest.approx(most)
    policy, right = load_policy(policies / "pretrained"), []
    for episode in (0, 2, 3, 4):
        for frame, true_L in zip(*opened.codes(episode), strict=True):
            seen = {square.cameras[0]: square.frames(episode, [frame])[0]}
            said_L = policy.predict_codes([Observation(seen, square.episodes[episode].instruction)])[0]
            right.append(said_L == true_L)
    assert written["token_accuracy_per_position"] == pytest.approx(np.mean(right, axis=0))
    assert written["token_accuracy"] == pytest.approx(np.mean(right))
    both = replace(config, policy=policies / "acting", out=tmp_path / "both", samples=4)
    measure.run(both)
    written = json.loads((tmp_path / "both" / "measure.json").read_text())
    assert "token_accuracy" in written
    measure.run(replace(both, labels=None, out=tmp_path / "alone"))
    alone = json.loads((tmp_path / "alone" / "measure.json").read_text())
    assert alone["action_error"] == written["action_error"], "the policy is loaded otherwise, and acts the same"


def test_a_pretrained_policy_is_measured_under_the_prompt_of_the_dataset(
    square: Dataset, labels: Path, policies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(policies / "pretrained")
    policy.model.config = replace(policy.config, prompts=Prompts(by_dataset=((square.name, "do: {instruction}"),)))
    policy.save_pretrained(tmp_path / "policy", run={})
    prompts, padded = [], tiny.left_padded
    monkeypatch.setattr(tiny, "left_padded", lambda tokenizer, given: prompts.extend(given) or padded(tokenizer, given))
    measure.run(MeasureConfig(tmp_path / "policy", square.root, tmp_path / "out", labels=labels, device="cpu"))
    assert len(prompts) == 20 and all(prompt.startswith("do: move ") for prompt in prompts)


def test_a_policy_with_actions_is_measured_on_labels_of_videos(labels: Path, policies: Path, tmp_path: Path) -> None:
    videos = write_synthetic_dataset(tmp_path / "d", episodes=5, frames=8, size=32)
    shutil.copytree(labels, tmp_path / "labels")
    manifest = json.loads((labels / MANIFEST).read_text())
    (tmp_path / "labels" / MANIFEST).write_text(json.dumps({**manifest, "dataset_fingerprint": videos.fingerprint}))
    config = MeasureConfig(policies / "acting", videos.root, tmp_path / "out", device="cpu")
    measure.run(replace(config, labels=tmp_path / "labels"))
    written = json.loads((tmp_path / "out" / "measure.json").read_text())
    assert written["num_labels"] == 20 and "action_error" not in written
    with pytest.raises(UserError, match="has no actions to compare with"):
        measure.run(replace(config, out=tmp_path / "without"))


def test_a_mistake_does_not_cost_the_figures_that_were_to_be_replaced(
    square: Dataset, labels: Path, policies: Path, tmp_path: Path
) -> None:
    out, none = tmp_path / "out", tmp_path / "none"
    # An episode that the dataset does not have.
    write_shard(shard_path(none, 0, 9), {9: EpisodeLabels(np.arange(1), np.zeros((1, 4), int))})
    configs.save(replace(Labels.open(labels).manifest, num_rows=1), none / MANIFEST)
    out.mkdir()
    (out / "measure.json").write_text("{}")
    config = MeasureConfig(policies / "acting", square.root, out, device="cpu", overwrite=True)
    for changes, message in (
        ({"cameras": ("back",)}, "unknown camera 'back'"),
        ({"policy": policies / "pretrained", "labels": labels, "cameras": ("back",)}, "unknown camera 'back'"),
        ({"labels": none}, "holds no labelled frame"),
    ):
        with pytest.raises(ValueError, match=message):
            measure.run(replace(config, **changes))
        assert (out / "measure.json").read_text() == "{}"


def test_mistakes_are_named_before_anything_is_written(
    square: Dataset, labels: Path, policies: Path, tmp_path: Path
) -> None:
    bare = write_synthetic_dataset(tmp_path / "bare", episodes=2, frames=5, size=32)
    out = tmp_path / "out"
    for changes, message in (
        ({"policy": policies / "pretrained"}, "only pretrained"),
        ({"data": bare.root}, "has no actions to compare with"),
        ({"steps": CHUNK + 1}, f"at most that|chunks of {CHUNK}"),
        ({"samples": 0}, "--samples"),
        ({"data": bare.root, "labels": labels}, "labels another dataset"),
        ({"statistics_key": "nobody"}, "nobody"),
    ):
        config = replace(MeasureConfig(policies / "acting", square.root, out, device="cpu"), **changes)
        with pytest.raises(ValueError, match=message):
            measure.run(config)
        assert not out.exists()
