"""Policies of several datasets: shares of the draws, exact resumes, statistics of each by its name."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lapa.data.sampling import split_episodes
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.data.writer import DatasetWriter
from lapa.evaluation.config import EvaluateConfig
from lapa.evaluation.rollout import evaluate
from lapa.files import read_json, write_json
from lapa.policy import finetune, pretrain, training
from lapa.policy import open_loop as measure
from lapa.policy.actions import ActionBins
from lapa.policy.config import FinetuneConfig, MeasureConfig
from lapa.policy.runtime import Policy, load_policy
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.types import Observation
from test_policy_training import finetune_config, loop, pretrain_config, weights, write_labels, write_robot


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    write_synthetic_dataset(root / "robot", episodes=4, frames=10, actions=True)
    write_labels(root / "labels", write_synthetic_dataset(root / "videos", episodes=8, frames=10, seed=1))
    return root


@pytest.fixture(scope="module")
def two_robots(root, tmp_path_factory):
    """Two robots of two dimensions that differ in scale, in names, in control and in which dimension is binary."""
    folder = tmp_path_factory.mktemp("robots")
    robot = open_dataset(root / "robot")
    for name, camera, scale, binary in (("wide", "top", 100.0, []), ("narrow", "side", 0.1, ["grip"])):
        writer = DatasetWriter(
            folder / name, fps=10, cameras={camera: (64, 64)}, action_names=["reach", "grip"], state_names=["x", "y"]
        )
        for episode in range(4):
            actions_TA = scale * robot.actions(episode)
            if binary:
                actions_TA[:, 1] = scale * (np.arange(len(actions_TA)) % 2)
            states_TS = scale * robot.states(episode)
            writer.add_episode({camera: robot.frames(episode)}, "move up", actions=actions_TA, states=states_TS)
        writer.finish()
        control = "delta" if binary else "absolute"
        declared = f'{{"action_space": {{"binary": {binary}, "control": "{control}"}}}}'.replace("'", '"')
        (folder / name / "meta" / "lapa.json").write_text(declared)
    return folder


def robots_config(two_robots, out, **changes) -> FinetuneConfig:
    data = (f"big={two_robots / 'wide'}:1.0", f"small={two_robots / 'narrow'}:3.0")
    fields = {"data": data, "loop": loop(2), "state": True, "mix_by": "equal"}
    return finetune_config(two_robots, out, **{**fields, **changes})


@pytest.mark.parametrize("head", ["bins", "chunk"])
def test_each_dataset_has_statistics_of_its_own_and_a_robot_acts_by_one(two_robots, tmp_path, capsys, head):
    config = robots_config(two_robots, tmp_path / "out", head=head)
    finetune.run(config)
    told = " ".join(capsys.readouterr().err.split())
    figures = read_json(config.out / "metrics.json")
    assert figures["held_out_action_error_small"] <= 0.2 * figures["held_out_action_error_big"], "each in its own units"
    assert "held_out_action_error" not in figures
    assert "datasets differ in control" in told and "--statistics-key big" in told and "75.0%" in told
    parts = load_policy(config.out)
    assert set(parts.statistics) == {"big", "small"}
    wide, narrow = (open_dataset(two_robots / name) for name in ("wide", "narrow"))
    observation = Observation({"top": wide.frames(0, [0])[0]}, "move up", wide.states(0)[0])
    for key, dataset in {"big": wide, "small": narrow}.items():
        policy = Policy.from_pretrained(config.out, device="cpu", statistics_key=key)
        assert policy.action_space == dataset.action_space
        actions_KA = policy.infer([observation])[0]
        low_A, high_A = dataset.all_actions().min(0), dataset.all_actions().max(0)
        assert ((low_A - 1e-5 <= actions_KA) & (actions_KA <= high_A + 1e-5)).all()
        training = [e for e in range(4) if e in split_episodes(4, 0.1, key == "small", "train")]
        rows_NA = np.concatenate([dataset.actions(episode) for episode in training])
        literal = ActionBins.fit(rows_NA, 256, dataset.action_space.binary)
        if head == "bins":
            np.testing.assert_array_equal(policy.statistics[key].codec.centres_AN, literal.centres_AN)
            assert policy.model.config.action_bins == tuple(literal.counts_A.tolist())
            states_NS = np.concatenate([dataset.states(episode) for episode in training])
            np.testing.assert_array_equal(policy.statistics[key].states.low_A, states_NS.min(0))
    assert set(policy.infer([observation])[0, :, 1].round(3)) <= {0.0, np.float32(0.1)}, "the binary dimension"
    measured = MeasureConfig(config.out, str(two_robots / "narrow"), tmp_path / "measured", device="cpu", samples=9)
    evaluated = EvaluateConfig(str(config.out), tmp_path / "results", env="synthetic", tasks="up", episodes=1)
    for refused in (
        lambda: Policy.from_pretrained(config.out, device="cpu"),
        lambda: measure.run(measured),
        lambda: evaluate(evaluated),
    ):
        with pytest.raises(ValueError, match=r"out: has statistics of several .*--statistics-key: big, small"):
            refused()
    measure.run(replace(measured, statistics_key="small"))
    figures = read_json(measured.out / "measure.json")
    assert figures["action_error"] <= 0.1 * np.abs(wide.all_actions()).max()
    # What to do next: no rollouts with a policy that is bad.
    assert ("--statistics-key small" in capsys.readouterr().err) == (figures["verdict"]["level"] != "bad")
    with pytest.raises(ValueError, match="needs the cameras top, synthetic has front"):
        evaluate(replace(evaluated, statistics_key="small"))
    with pytest.raises(ValueError, match="unknown --statistics-key 'smal'; did you mean 'small'"):
        Policy.from_pretrained(config.out, device="cpu", statistics_key="smal")


def test_samples_are_said_in_the_statistics_of_their_dataset(two_robots, tmp_path):
    config = robots_config(two_robots, tmp_path / "out", loop=loop(1))
    finetune.run(config)
    parts = load_policy(config.out)
    datasets = [open_dataset(spec) for spec in config.data]
    steps = EpisodeSteps(datasets, 32, chunk=2, state=True)
    indices = [0, len(steps) - 3]
    batch = parts.collate([steps[index] for index in indices])
    for row, dataset, episode, frame in ((0, datasets[0], 0, 0), (1, datasets[1], 3, 7)):
        of, vocabulary = parts.statistics[dataset.name], parts.model.config.vocabulary
        actions_KA = of.codec.encode(dataset.actions(episode)[frame : frame + 2])
        assert (vocabulary.codes("bins", batch["action_BKA"][row]).numpy() == actions_KA).all()
        state_S = of.states.encode(dataset.states(episode)[frame])
        assert (vocabulary.codes("state", batch["state_BS"][row]).numpy() == state_S).all()


def test_a_small_dataset_is_looked_at_beside_a_large_one_and_figures_go_by_the_shares(
    two_robots, tmp_path, monkeypatch
):
    wide = open_dataset(two_robots / "wide")
    writer = DatasetWriter(tmp_path / "long", fps=10, cameras={"top": (64, 64)}, action_names=["reach", "grip"])
    frames_THWC, actions_TA = np.tile(wide.frames(0), (61, 1, 1, 1)), np.tile(wide.actions(0), (61, 1))
    writer.add_episode({"top": frames_THWC}, "move up", actions=actions_TA)
    writer.finish()
    data = (f"big={tmp_path / 'long'}:3", f"small={two_robots / 'narrow'}:1")
    config = robots_config(two_robots, tmp_path / "out", data=data, state=False, loop=loop(1))
    finetune.run(config)
    parts = load_policy(config.out)

    def steps_of(*specs):
        return EpisodeSteps([open_dataset(spec) for spec in specs], 32, chunk=2, mix_by="equal")

    @torch.no_grad()
    def figures_of(*specs):
        return training.held_out_figures(parts, steps_of(*specs), steps_of(*specs))(parts.model)

    monkeypatch.setattr(training, "EVALUATION_STEPS", 6)
    monkeypatch.setattr(training, "LEAST_STEPS", 1)
    both = figures_of(*data)
    assert training.evaluated_steps(steps_of(*data)) == [(0.75, [0, 304, 609]), (0.25, [610, 630, 649])]
    monkeypatch.setattr(training, "EVALUATION_STEPS", 3)
    big, small = (figures_of(spec) for spec in data)
    assert both["held_out_loss"] == pytest.approx(0.75 * big["held_out_loss"] + 0.25 * small["held_out_loss"], rel=1e-4)
    for name, alone in {"big": big, "small": small}.items():
        assert both[f"held_out_action_error_{name}"] == alone[f"held_out_action_error_{name}"]


def test_a_robot_reads_the_prompt_of_its_statistics_key(two_robots, tmp_path):
    write_json(tmp_path / "prompts.json", {"big": "openvla", "small": "Do {instruction}"})
    config = robots_config(two_robots, tmp_path / "out", loop=loop(1), prompt=str(tmp_path / "prompts.json"))
    finetune.run(config)
    for key, prompt in {"small": "Do it", "big": "In: What action should the robot take to it?\nOut:"}.items():
        policy = Policy.from_pretrained(config.out, device="cpu", statistics_key=key)
        assert policy.config.prompts.text("it") == prompt


def test_datasets_without_a_common_camera_are_refused_with_the_mend(two_robots, tmp_path):
    """Where they have several each; where each has one, there is no doubt."""
    robot = open_dataset(two_robots / "wide")
    folders = []
    for name in ("a", "b"):
        cameras = {f"{name}{number}": (64, 64) for number in range(2)}
        writer = DatasetWriter(tmp_path / name, fps=10, cameras=cameras, action_names=["reach", "grip"])
        writer.add_episode(dict.fromkeys(cameras, robot.frames(0)), "move up", actions=robot.actions(0))
        folders.append(writer.finish().root)
    config = robots_config(two_robots, tmp_path / "out", data=tuple(map(str, folders)), state=False, loop=loop(1))
    with pytest.raises(ValueError, match=r"no camera in common \(a: a0, a1; b: b0, b1\).*camera=NAME"):
        finetune.run(config)
    single = tuple(f"lerobot:{folder},camera={folder.name}0" for folder in folders)
    finetune.run(replace(config, data=single))


def test_a_mixture_of_robots_resumes_exactly(two_robots, tmp_path):
    whole = robots_config(two_robots, tmp_path / "whole", loop=loop(4), augment=True)
    parts = replace(whole, out=tmp_path / "parts")
    finetune.run(whole)
    finetune.run(replace(parts, loop=loop(4, stop_after=2)))
    finetune.run(replace(parts, resume=True))
    one, other = weights(whole.out), weights(parts.out)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_policy_of_several_datasets_goes_on_by_their_names(two_robots, tmp_path):
    first = robots_config(two_robots, tmp_path / "first", loop=loop(1))
    finetune.run(first)
    again = replace(first, out=tmp_path / "again", policy=first.out, from_scratch=False, data=first.data[1:])
    finetune.run(again)
    before, after = load_policy(first.out), load_policy(again.out)
    assert set(after.statistics) == {"big", "small"} and after.model.config.spaces == before.model.config.spaces
    for name, (data, message) in {
        "unknown": ((str(two_robots / "narrow"),), r"unknown dataset with statistics 'narrow'.*--data NAME="),
        "wrong": ((f"big={two_robots / 'narrow'}",), "declares its actions differently"),
    }.items():
        with pytest.raises(ValueError, match=message):
            finetune.run(replace(again, out=tmp_path / name, data=data))
    with pytest.raises(ValueError, match=r"--pool-statistics: the policy .* has its own already"):
        finetune.run(replace(again, out=tmp_path / "no", pool_statistics=True))


def test_statistics_may_be_pooled_and_datasets_of_one_name_are_refused(root, two_robots, tmp_path):
    twice = (str(root / "robot"), f"{root / 'robot'}:2")
    config = finetune_config(root, tmp_path / "out", data=twice, loop=loop(1))
    with pytest.raises(ValueError, match=r"has the name 'robot' of another one.*--data NAME="):
        finetune.run(config)
    finetune.run(replace(config, pool_statistics=True))
    assert list(load_policy(config.out).statistics) == ["pooled"]
    assert Policy.from_pretrained(config.out, device="cpu").action_dim == 2
    with pytest.raises(ValueError, match=r"unknown --statistics-key .*known: pooled"):
        Policy.from_pretrained(config.out, device="cpu", statistics_key="robot")
    pooled = robots_config(two_robots, tmp_path / "no", pool_statistics=True)
    with pytest.raises(ValueError, match="declares grip binary"):
        finetune.run(pooled)
    wider = write_robot(tmp_path / "wider", ("top",), action_dim=3)
    with pytest.raises(ValueError, match="differ in the width of their actions"):
        finetune.run(replace(pooled, pool_statistics=False, state=False, data=(*pooled.data, str(wider))))


def test_pretraining_on_a_mixture_resumes_exactly(root, tmp_path):
    labels = write_labels(tmp_path / "labels", open_dataset(root / "robot"))
    data = (f"{root / 'videos'}:1", f"{root / 'robot'}:0.25")
    whole = pretrain_config(root, tmp_path / "whole", data=data, labels=(root / "labels", labels), loop=loop(4))
    parts = replace(whole, out=tmp_path / "parts")
    pretrain.run(whole)
    pretrain.run(replace(parts, loop=loop(4, stop_after=2)))
    pretrain.run(replace(parts, resume=True))
    one, other = weights(whole.out), weights(parts.out)
    assert all(torch.equal(one[name], other[name]) for name in one)
