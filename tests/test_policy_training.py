"""Pretraining and finetuning on made-up episodes: they learn, resume exactly, and refuse what does not fit."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from lapa import config as configs
from lapa.data.dataset import Dataset
from lapa.data.labels import MANIFEST, EpisodeLabels, Labels, Manifest, shard_path, write_shard
from lapa.data.sampling import split_episodes
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.engine.config import LoopConfig, OptimConfig
from lapa.files import read_json, write_json
from lapa.policy import finetune, pretrain
from lapa.policy.config import FinetuneConfig, FlowConfig, PretrainConfig, TinyConfig
from lapa.policy.runtime import Policy, load_policy
from lapa.policy.training import trainings_of
from lapa.sources.synthetic import DIRECTIONS, write_synthetic_dataset
from lapa.types import Observation
from vlms import make_vlm

SMALL = TinyConfig(image_size=32, vision_widths=(16, 32), width=64, layers=2, heads=2)
LAM = "0123456789abcdef"


def loop(steps: int, **changes) -> LoopConfig:
    optim = OptimConfig(lr=2e-3, betas=(0.9, 0.95), warmup_steps=5)
    return LoopConfig(**{"steps": steps, "batch_size": 16, "optim": optim, "device": "cpu", **changes})


def write_labels(folder, dataset: Dataset, lam_fingerprint: str = LAM, left_out=()):
    """Labels as a perfect latent action model would make them: the direction as two tokens of four codes."""
    episodes = {}
    for episode in dataset.episodes:
        if episode.index in left_out:
            continue
        direction = DIRECTIONS.index(episode.instruction.removeprefix("move "))
        frames_T = np.arange(episode.length - 2)
        codes_TL = np.tile([direction // 4, direction % 4], (len(frames_T), 1))
        episodes[episode.index] = EpisodeLabels(frames_T, codes_TL)
    write_shard(shard_path(folder, 0, len(dataset.episodes) - 1), episodes)
    manifest = Manifest(
        lam_fingerprint=lam_fingerprint,
        dataset_fingerprint=dataset.fingerprint,
        camera=dataset.cameras[0],
        horizon_seconds=0.2,
        horizon_frames=2,
        latent_length=2,
        codebook_size=4,
        num_rows=sum(len(labels.frame_indices_T) for labels in episodes.values()),
        num_episodes=len(episodes),
        skipped_episodes=0,
        code_usage=[[0.5, 0.5, 0.0, 0.0], [0.25] * 4],
    )
    configs.save(manifest, folder / MANIFEST)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("policy")
    write_synthetic_dataset(root / "robot", episodes=9, frames=10, actions=True)
    write_labels(root / "labels", write_synthetic_dataset(root / "videos", episodes=16, frames=10, seed=1))
    return root


def pretrain_config(root, out, **changes) -> PretrainConfig:
    fields = {"data": (root / "videos",), "labels": (root / "labels",), "tiny": SMALL, "loop": loop(40)}
    return PretrainConfig(**{**fields, "out": out, **changes})


def finetune_config(root, out, **changes) -> FinetuneConfig:
    fields = {"data": (root / "robot",), "chunk": 2, "tiny": SMALL, "loop": loop(60), "from_scratch": True}
    return FinetuneConfig(**{**fields, "out": out, **changes})


@pytest.fixture(scope="module")
def pretrained(root):
    pretrain.run(pretrain_config(root, root / "pretrained"))
    return root / "pretrained"


@pytest.fixture(scope="module")
def finetuned(root, pretrained):
    out = root / "finetuned"
    finetune.run(finetune_config(root, out, policy=pretrained, from_scratch=False, augment=True, loop=loop(3)))
    return out


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_pretraining_learns_the_labels(pretrained):
    metrics = read_json(pretrained / "metrics.json")
    assert metrics["train_loss"] < 0.6 * np.log(4), metrics
    assert {"held_out_loss", "held_out_token_accuracy"} <= metrics.keys()
    parts = load_policy(pretrained)
    assert not parts.statistics and parts.model.config.vocabulary.latent == 4
    assert parts.model.config.latent_length == 2 and parts.model.config.cameras == ("front",)
    assert read_json(pretrained / "config.json")["run"]["lam_fingerprint"] == LAM


def test_finetuning_overfits_a_few_episodes(root):
    """From frames on disk to actions in the robot's units."""
    finetune.run(finetune_config(root, root / "overfitted", held_out=0.0, loop=loop(90)))
    dataset, policy = open_dataset(root / "robot"), Policy.from_pretrained(root / "overfitted", device="cpu")
    errors, sizes = [], []
    for episode in dataset.episodes:
        frames = dataset.frames(episode.index)
        actions_TA = dataset.actions(episode.index)
        said_TKA = policy.infer([Observation({"front": frame}, episode.instruction) for frame in frames])
        errors.append(np.abs(said_TKA[:, 0] - actions_TA).mean())
        sizes.append(np.abs(actions_TA).mean())
    assert np.mean(errors) < 0.1 * np.mean(sizes), (errors, sizes)


def test_finetuning_starts_from_the_pretrained_policy(root, pretrained, finetuned):
    before, after = load_policy(pretrained), load_policy(finetuned)
    codec = after.statistics["robot"].codec
    assert after.config.action_bins == tuple(codec.counts_A.tolist())
    assert after.processor.tokenizer.get_vocab() == before.processor.tokenizer.get_vocab()
    name = "language.model.layers.0.mlp.up_proj.weight"
    moved = (weights(finetuned)[name] - weights(pretrained)[name]).abs().mean()
    finetune.run(finetune_config(root, root / "scratch", policy=pretrained, loop=loop(3)))
    unrelated = (weights(root / "scratch")[name] - weights(pretrained)[name]).abs().mean()
    assert moved < 0.2 * unrelated, "three small steps from the pretrained weights, and far from fresh ones"
    assert load_policy(root / "scratch").model.config == replace(after.model.config, lam_fingerprint="")
    scratch, *others = trainings_of(root / "scratch")
    assert not others and trainings_of(finetuned) == [*trainings_of(pretrained), scratch]
    metrics = read_json(finetuned / "metrics.json")
    robot = open_dataset(root / "robot")
    seen, (episode,) = (split_episodes(9, 0.1, 0, split) for split in ("train", "held_out"))
    mean_A = np.concatenate([robot.actions(number) for number in seen]).mean(0)
    following_TKA = np.stack([robot.actions(episode), np.roll(robot.actions(episode), -1, axis=0)], axis=1)
    errors_TK = np.abs(following_TKA - mean_A).mean(-1)
    assert metrics["held_out_mean_action_error"] == pytest.approx((errors_TK.sum() - errors_TK[-1, 1]) / 19)
    assert {"held_out_action_error", "held_out_token_accuracy", "torch"} <= metrics.keys()


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_resumed_run_is_the_uninterrupted_one(root, tmp_path, stage):
    """Bitwise, with augmentation on."""
    module, build = (pretrain, pretrain_config) if stage == "pretrain" else (finetune, finetune_config)
    whole = build(root, tmp_path / "whole", augment=True, loop=loop(4))
    halves = replace(whole, out=tmp_path / "halves")
    module.run(whole)
    module.run(replace(halves, loop=loop(4, stop_after=2)))
    assert not (tmp_path / "halves" / "config.json").exists(), "unfinished"
    with pytest.raises(ValueError, match="--resume to go on"):
        module.run(halves)
    module.run(replace(halves, resume=True))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(one[name], other[name]) for name in one)
    module.run(replace(halves, resume=True))
    with pytest.raises(ValueError, match="already holds a finished result"):
        module.run(halves)


def test_frozen_vision_stays_as_it_was(root, pretrained, tmp_path):
    frozen = finetune_config(
        root, tmp_path / "frozen", policy=pretrained, from_scratch=False, freeze_vision=True, loop=loop(2)
    )
    finetune.run(frozen)
    before, after = weights(pretrained), weights(tmp_path / "frozen")
    vision = [name for name in before if name.startswith("tower.")]
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)
    assert not torch.equal(before["project.weight"], after["project.weight"])


def test_a_policy_that_acts_keeps_its_bins(root, finetuned, tmp_path):
    again = finetune_config(root, tmp_path / "again", policy=finetuned, from_scratch=False, loop=loop(1), chunk=3)
    finetune.run(again)
    before, after = load_policy(finetuned), load_policy(tmp_path / "again")
    one, other = before.statistics["robot"].codec, after.statistics["robot"].codec
    np.testing.assert_array_equal(other.centres_AN, one.centres_AN)
    assert after.model.config.chunk == 3
    with pytest.raises(ValueError, match="has --num-bins 256 already"):
        finetune.run(replace(again, out=tmp_path / "no", num_bins=7))


@pytest.mark.parametrize("head", ["chunk", "flow"])
def test_a_policy_that_acts_keeps_its_head(root, tmp_path, head):
    """A step of no length from it leaves it as it is."""
    flow = FlowConfig(width=16, layers=1, heads=2, steps=2)
    first = finetune_config(root, tmp_path / "first", head=head, flow=flow, loop=loop(2))
    finetune.run(first)
    still = LoopConfig(steps=1, batch_size=16, optim=OptimConfig(lr=0.0), device="cpu")
    again = replace(first, out=tmp_path / "again", policy=first.out, from_scratch=False, loop=still)
    finetune.run(again)
    one, other = (load_file(folder / "head.safetensors") for folder in (first.out, again.out))
    assert one and all(torch.equal(one[name], other[name]) for name in one)
    if head == "flow":
        with pytest.raises(ValueError, match="its flow head was made for --chunk 2"):
            finetune.run(replace(again, out=tmp_path / "no", chunk=3))
    declared = tmp_path / "absolute"
    shutil.copytree(root / "robot", declared)
    (declared / "meta" / "lapa.json").write_text('{"action_space": {"control": "absolute"}}')
    with pytest.raises(ValueError, match="declares its actions differently"):
        finetune.run(replace(again, out=tmp_path / "no", data=(declared,)))


def test_statistics_may_be_another_datasets(root, tmp_path):
    """As of the robot's own actions, before training on guessed ones of a narrower range."""
    robot = open_dataset(root / "robot")
    narrow = DatasetWriter(
        tmp_path / "guessed", fps=robot.fps, cameras={robot.cameras[0]: (64, 64)}, action_names=["vx", "vy"]
    )
    for episode in range(2):
        narrow.add_episode({robot.cameras[0]: robot.frames(episode)}, "move up", actions=0.1 * robot.actions(episode))
    narrow.finish()
    fields = {"from_scratch": True, "head": "chunk", "held_out": 0.0, "data": (tmp_path / "guessed",)}
    config = finetune_config(root, tmp_path / "policy", loop=loop(1), statistics=(root / "robot",), **fields)
    finetune.run(config)
    (statistics,) = load_policy(tmp_path / "policy").statistics.values()
    codec = statistics.codec
    every = np.concatenate([robot.actions(episode) for episode in range(len(robot.episodes))])
    np.testing.assert_allclose(codec.low_A, np.percentile(every, 1, axis=0), rtol=1e-5)
    assert (codec.high_A > 5 * np.concatenate([0.1 * robot.actions(e) for e in range(2)]).max(0)).all()
    with pytest.raises(ValueError, match="has its own already"):
        finetune.run(replace(config, out=tmp_path / "next", from_scratch=False, policy=tmp_path / "policy"))


def test_labels_of_another_model_or_dataset_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match="made by the latent action model 0123456789abcdef, not by other"):
        Labels.open(root / "labels", lam_fingerprint="other")
    with pytest.raises(ValueError, match="labels another dataset"):
        pretrain.run(pretrain_config(root, tmp_path / "out", data=(root / "robot",)))
    with pytest.raises(ValueError, match="need as many --labels folders"):
        pretrain.run(pretrain_config(root, tmp_path / "out", data=(root / "robot", root / "videos")))
    other = write_labels(tmp_path / "labels", open_dataset(root / "robot"), lam_fingerprint="fedcba9876543210")
    both = {"data": (root / "videos", root / "robot"), "labels": (root / "labels", other)}
    with pytest.raises(ValueError, match="label all datasets with one model"):
        pretrain.run(pretrain_config(root, tmp_path / "out", **both))
    assert not (tmp_path / "out").exists(), "refused before anything was written"


def test_held_out_episodes_without_a_label_do_not_stop_the_training(root, tmp_path, capsys):
    held_out = split_episodes(16, 0.1, 0, "held_out")
    labels = write_labels(tmp_path / "labels", open_dataset(root / "videos"), left_out=held_out)
    pretrain.run(pretrain_config(root, tmp_path / "out", labels=(labels,), loop=loop(1)))
    assert "none of the held-out episodes has a label" in capsys.readouterr().err
    assert "held_out_loss" in read_json(tmp_path / "out" / "metrics.json")


def test_videos_without_actions_are_no_robot_data(root, tmp_path):
    with pytest.raises(ValueError, match="has no actions"):
        finetune.run(finetune_config(root, tmp_path / "out", data=(root / "videos",)))


def test_finetuning_needs_a_policy_to_start_from(root, pretrained, tmp_path):
    with pytest.raises(ValueError, match="--policy, or --from-scratch"):
        finetune.run(finetune_config(root, tmp_path / "out", from_scratch=False))
    with pytest.raises(ValueError, match="is the policy to start from"):
        finetune.run(finetune_config(root, pretrained, policy=pretrained, overwrite=True))
    assert load_policy(pretrained)


def write_robot(path, cameras, action_dim):
    """Two still episodes of a robot with these cameras."""
    names = [f"joint_{i}" for i in range(action_dim)]
    writer = DatasetWriter(path, fps=10, cameras=dict.fromkeys(cameras, (32, 32)), action_names=names)
    for seed in range(2):
        frames = {camera: np.full((4, 32, 32, 3), 40 * seed, np.uint8) for camera in cameras}
        writer.add_episode(frames, "wait", actions=np.full((4, action_dim), seed, np.float32))
    writer.finish()
    return path


def test_another_robot_must_bring_its_cameras_and_its_own_bins(root, pretrained, finetuned, tmp_path):
    robot = write_robot(tmp_path / "other", ("top", "wrist"), action_dim=3)
    config = finetune_config(root, tmp_path / "out", data=(robot,), policy=pretrained, from_scratch=False, loop=loop(1))
    with pytest.raises(ValueError, match="has the cameras top, wrist, the policy was trained with front"):
        finetune.run(config)
    with pytest.raises(ValueError, match="the policy has 1 image slots"):
        finetune.run(replace(config, cameras=("top", "wrist")))
    with pytest.raises(ValueError, match=r"actions of 3 dimensions .*, the policy .* of 2"):
        finetune.run(replace(config, policy=finetuned, cameras=("wrist",)))
    finetune.run(replace(config, cameras=("wrist",)))
    policy = Policy.from_pretrained(tmp_path / "out", device="cpu")
    assert policy.cameras == ("wrist",) and policy.action_dim == 3


def test_two_cameras_from_scratch(tmp_path):
    robot = write_robot(tmp_path / "robot", ("top", "wrist"), action_dim=1)
    config = finetune_config(tmp_path, tmp_path / "out", cameras=("wrist", "top"), loop=loop(1))
    finetune.run(replace(config, data=(robot,)))
    assert Policy.from_pretrained(tmp_path / "out", device="cpu").cameras == ("wrist", "top")


@pytest.mark.parametrize("head", ["bins", "chunk", "flow"])
def test_every_head_finetunes_and_acts_with_the_state(root, pretrained, tmp_path, head):
    """One command for the three: from a pretrained policy to actions in the robot's units."""
    config = finetune_config(
        root,
        tmp_path / "out",
        policy=pretrained,
        from_scratch=False,
        head=head,
        chunk=3,
        state=True,
        flow=FlowConfig(width=16, layers=1, heads=2, steps=2),
        loop=loop(2),
    )
    finetune.run(config)
    dataset, policy = open_dataset(root / "robot"), Policy.from_pretrained(tmp_path / "out", device="cpu")
    assert policy.state_dim == dataset.state_dim == 2 and policy.action_space == dataset.action_space
    picture, state = dataset.frames(0, [0])[0], dataset.states(0)[0]
    actions_BKA = policy.infer([Observation({"front": picture}, "move right", state)])
    assert actions_BKA.shape == (1, 3, 2) and np.isfinite(actions_BKA).all()
    with pytest.raises(ValueError, match="it has no state; this policy reads 2 numbers"):
        policy.infer([Observation({"front": picture}, "move right")])
    assert "held_out_action_error" in read_json(tmp_path / "out" / "metrics.json")
    with pytest.raises(ValueError, match="continue with the same --head and --state"):
        finetune.run(replace(config, out=tmp_path / "other", policy=tmp_path / "out", state=False))


def test_another_preset_than_that_of_the_pretraining_is_named(root, pretrained, tmp_path, capsys):
    config = finetune_config(root, tmp_path / "out", policy=pretrained, from_scratch=False, loop=loop(1))
    finetune.run(config)
    assert "was trained with --preset" not in capsys.readouterr().err
    finetune.run(replace(config, out=tmp_path / "other", preset="base"))
    assert f"{pretrained} was trained with --preset {config.preset}; steps, learning rate" in capsys.readouterr().err


def test_latent_actions_are_kept_while_finetuning(root, pretrained, tmp_path):
    labels = write_labels(tmp_path / "labels", open_dataset(root / "robot"))
    config = finetune_config(
        root, tmp_path / "out", policy=pretrained, from_scratch=False, labels=(labels,), loop=loop(30)
    )
    finetune.run(config)
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert {"held_out_latent_token_accuracy", "held_out_token_accuracy", "held_out_action_error"} <= metrics.keys()
    assert load_policy(tmp_path / "out").config.latent_weight == config.latent_weight > 0
    finetune.run(replace(config, out=tmp_path / "without", labels=()))
    assert "held_out_latent_token_accuracy" not in read_json(tmp_path / "without" / "metrics.json")
    of_another = write_labels(tmp_path / "of_another", open_dataset(root / "robot"), lam_fingerprint="f" * 16)
    with pytest.raises(ValueError, match="learned the latent actions of the model 0123456789abcdef, the labels"):
        finetune.run(replace(config, out=tmp_path / "no", labels=(of_another,)))
    with pytest.raises(ValueError, match="has no latent actions to train on"):
        finetune.run(replace(config, out=tmp_path / "no", policy=None, from_scratch=True))


def test_pretraining_goes_on_from_a_policy(root, pretrained, finetuned, tmp_path):
    config = pretrain_config(root, tmp_path / "out", policy=pretrained, loop=loop(1), prompt="openvla", backbone="hf:x")
    pretrain.run(config)
    before, after = load_policy(pretrained), load_policy(tmp_path / "out")
    assert after.model.config.vocabulary == before.model.config.vocabulary
    assert after.model.config.prompts.default.startswith("In: What action")
    moved = [(weights(tmp_path / "out")[name] - tensor).abs().max() for name, tensor in weights(pretrained).items()]
    assert max(moved) < 0.01, "one small step away"
    with pytest.raises(ValueError, match="has robot actions already"):
        pretrain.run(replace(config, out=tmp_path / "no", policy=finetuned))
    with pytest.raises(ValueError, match="is the policy to start from"):
        pretrain.run(replace(config, out=pretrained, overwrite=True))


def test_adapters_learn_and_leave_an_ordinary_policy(root, pretrained, tmp_path):
    """With LoRA the old rows stay as they are, bit by bit, and what is saved has no adapters."""
    pytest.importorskip("peft")
    config = finetune_config(root, tmp_path / "out", policy=pretrained, from_scratch=False, lora_rank=2, loop=loop(3))
    finetune.run(config)
    before, after = weights(pretrained), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    rows = load_policy(pretrained).model.config.vocabulary.rows("latent").start
    for name in ("language.model.embed_tokens.weight", "language.lm_head.weight"):
        assert torch.equal(before[name][:rows], after[name][:rows])
    name = "language.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert Policy.from_pretrained(tmp_path / "out", device="cpu").action_dim == 2


def test_a_prompt_is_kept_or_replaced_as_told(root, pretrained, tmp_path, capsys):
    config = finetune_config(root, tmp_path / "out", policy=pretrained, from_scratch=False, loop=loop(1))
    finetune.run(config)
    assert load_policy(config.out).model.config.prompts == load_policy(pretrained).model.config.prompts
    other = replace(config, out=tmp_path / "other", prompt="openvla")
    finetune.run(other)
    assert load_policy(other.out).model.config.prompts.default.startswith("In: What action")
    prompts = tmp_path / "prompts.json"
    write_json(prompts, {"robbot": "paper"})
    with pytest.raises(ValueError, match="unknown dataset 'robbot'; did you mean 'robot'"):
        finetune.run(replace(config, out=tmp_path / "no", prompt=str(prompts)))
    write_json(prompts, {"robot": "paper"})
    own = replace(config, out=tmp_path / "own", prompt=str(prompts))
    finetune.run(own)
    assert Policy.from_pretrained(own.out, device="cpu").config.prompts.default.startswith("<s> You are")
    with pytest.raises(ValueError, match="unknown --statistics-key 'rt1'"):
        Policy.from_pretrained(own.out, device="cpu", statistics_key="rt1")


def test_the_weight_of_text_needs_text(root, tmp_path):
    with pytest.raises(ValueError, match="backbones that put text around a latent action"):
        pretrain.run(pretrain_config(root, tmp_path / "out", text_weight=0.01))


@pytest.mark.parametrize("options", [{"freeze_vision": True}, {"lora_rank": 2}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_saved_in_bf16_trains_in_part(root, tmp_path, options, precision):
    """As the models of the hub are saved; SmolVLM's own code casts by what its first weight is in."""
    make_vlm("smolvlm", tmp_path / "vlm")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "vlm")
    config = pretrain_config(root, tmp_path / "out", backbone=f"hf:{tmp_path / 'vlm'}", **options)
    pretrain.run(replace(config, loop=loop(1, precision=precision)))
    after = load_policy(tmp_path / "out").model
    assert {parameter.dtype for parameter in after.parameters()} == {torch.float32}
    before = dict(model.named_parameters())
    moved = {
        name: not torch.equal(parameter, before[name].float())
        for name, parameter in after.backbone.language.named_parameters()
        if before[name].shape == parameter.shape
    }
    vision = [yes for name, yes in moved.items() if ".vision_model." in name]
    connector = [yes for name, yes in moved.items() if ".connector." in name]
    layers = [yes for name, yes in moved.items() if ".text_model.layers." in name and "proj" in name]
    assert any(connector), "what brings the pictures to the language model's width goes on learning"
    assert any(vision) != options.get("freeze_vision", False)
    assert any(layers)


def test_an_unknown_backbone_is_refused(root, tmp_path):
    for backbone, message in {"llama": "expected tiny, or hf:FOLDER", "lwm": "import LWM-Chat-1M or LAPA-7B"}.items():
        with pytest.raises(ValueError, match=message):
            pretrain.run(pretrain_config(root, tmp_path / "out", backbone=backbone))


def test_rows_for_bins_that_came_without_bins_are_used(root, pretrained, tmp_path):
    """As an imported policy has them, whose authors released the rows and not the bins."""
    parts = load_policy(pretrained)
    vocabulary = replace(parts.model.config.vocabulary, bins=7)
    model = parts.model.grown(replace(parts.model.config, vocabulary=vocabulary))
    Policy(model, parts.processor).save_pretrained(tmp_path / "imported", run={})
    config = finetune_config(root, tmp_path / "out", policy=tmp_path / "imported", from_scratch=False, loop=loop(1))
    finetune.run(config)
    after = load_policy(tmp_path / "out").model.config
    assert after.vocabulary.bins == 7 and max(after.action_bins) <= 7
