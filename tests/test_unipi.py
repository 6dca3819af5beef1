"""The baseline UniPi: a video model learns and is kept, a joined policy acts, and mistakes are named."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lapa import presets
from lapa.baselines import unipi, video_train
from lapa.baselines.config import InverseConfig, UniPiConfig, VideoConfig, VideoTrainConfig
from lapa.baselines.inverse import InverseDynamics, Recording
from lapa.baselines.unipi import UniPi
from lapa.baselines.video_model import VideoModel
from lapa.baselines.video_train import FutureFrames
from lapa.checksums import SUMS
from lapa.data.dataset import ActionSpace
from lapa.data.spec import open_dataset
from lapa.engine.config import LoopConfig, OptimConfig
from lapa.errors import UserError
from lapa.evaluation.config import EvaluateConfig
from lapa.evaluation.rollout import evaluate
from lapa.files import read_json, write_json
from lapa.policy.actions import ActionScale
from lapa.policy.backbones.tiny import train_tokenizer
from lapa.policy.runtime import load_actor
from lapa.sources.synthetic import DIRECTIONS, write_synthetic_dataset
from lapa.types import Observation

SMALL = VideoConfig(image_size=32, widths=(32, 64), text_width=32, horizon_seconds=0.3)
LOOP = LoopConfig(
    steps=60,
    batch_size=8,
    optim=OptimConfig(lr=3e-3, betas=(0.9, 0.95), warmup_steps=5),
    device="cpu",
    log_every=20,
    eval_every=1000,
)
# The video model is a UNet of diffusers, which only the extra `study` brings.
pytest.importorskip("diffusers")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two squares that start anywhere, and models of them.

    `squares`; a video model that has learned them, `video`; an untrained inverse dynamics model, `inverse`; the two
    joined, `policy`.
    """
    root = tmp_path_factory.mktemp("unipi")
    write_synthetic_dataset(root / "squares", episodes=2, frames=8, size=32)
    video_train.run(training(root, "video"))
    write_inverse(root / "inverse")
    unipi.run(UniPiConfig(root / "video", root / "inverse", root / "policy", sampling_steps=2))
    return root


def training(root: Path, out: str, steps: int = 60, **values: Any) -> VideoTrainConfig:
    values = {"model": SMALL, "held_out": 0.0, **values}
    return VideoTrainConfig((root / "squares",), root / out, loop=replace(LOOP, steps=steps), **values)


def write_inverse(folder: Path, size: int = 32, horizon: int = 3, camera: str = "front") -> None:
    torch.manual_seed(0)
    space = ActionSpace(("right", "down"), (False, False), "delta")
    config = InverseConfig(image_size=size, horizon_seconds=horizon / 10, vision_widths=(8, 16), width=16)
    scale = ActionScale.fit(RNG.normal(size=(50, 2)).astype(np.float32), space.binary)
    InverseDynamics(config, Recording(horizon, 10.0, camera, space), scale).save_pretrained(folder)


def observation(words: str = "move up", size: int = 48) -> Observation:
    return Observation({"front": RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)}, words)


def test_a_joined_policy_is_served(root: Path) -> None:
    pytest.importorskip("starlette", reason="needs lapa-vla[serve]")
    from lapa.serve.client import PolicyClient
    from lapa.serve.server import running

    image = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    expected_KA = UniPi.from_pretrained(root / "policy", "cpu").infer({"front": image, "instruction": "go right"})
    with running(root / "policy", device="cpu") as url, PolicyClient(url) as client:
        assert client.metadata["kind"] == "unipi" and client.metadata["statistics_key"] is None
        actions_KA = client.infer({"observation/image": image, "prompt": "go right"})
        np.testing.assert_array_equal(actions_KA, expected_KA)


def test_predicted_frames_beat_copies_of_the_current_one(root: Path) -> None:
    figures = read_json(root / "video" / "metrics.json")
    # Nothing is held out, and the names say so.
    assert figures["train_mse"] < 0.8 * figures["train_mse_copy"]
    assert (root / "video" / "samples.png").stat().st_size > 1000


def test_the_instruction_matters(root: Path) -> None:
    model = VideoModel.from_pretrained(root / "video")
    text = model.words(["move right", "move up-right", "move right"])
    with torch.no_grad():
        text_BTD, _ = model.text(**text, given_B=torch.tensor([True, True, False]))
    assert not torch.allclose(text_BTD[0], text_BTD[1]) and not torch.allclose(text_BTD[0], text_BTD[2])
    frame = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    right, up_right, nothing = (
        model.sample(frame, [words], guidance=guidance).int()
        for words, guidance in (("move right", 1.0), ("move up-right", 1.0), ("move right", 0.0))
    )
    assert (right - up_right).abs().max() > 5 and (right - nothing).abs().max() > 5


def test_without_guidance_any_instruction_gives_the_same(root: Path) -> None:
    model = VideoModel.from_pretrained(root / "video")
    frame = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    one, other = (model.sample(frame, [words], guidance=0.0) for words in ("move right", "move up-right"))
    assert torch.equal(one, other)


def test_padding_changes_nothing(root: Path) -> None:
    model = VideoModel.from_pretrained(root / "video")
    frames = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    alone = model.sample(frames[:1], ["move right"]).int()
    together = model.sample(frames, ["move right", "move up-right " * 9]).int()
    assert (alone[0] - together[0]).abs().max() <= 1


def test_patches_are_put_together_again(root: Path) -> None:
    model = VideoModel.from_pretrained(root / "video")
    frames_BFCHW = torch.randn(2, SMALL.num_frames, 3, 32, 32)
    patches = model._patches(frames_BFCHW)
    assert patches.shape == (2, SMALL.num_frames * 3 * 16, 8, 8)
    assert torch.equal(model._frames(patches), frames_BFCHW)
    # The second patch of a row holds columns 4 to 7.
    assert torch.equal(patches[0, :16, 0, 1], frames_BFCHW[0, 0, 0, :4, 4:8].flatten())


def test_changes_have_unit_variance(root: Path) -> None:
    model = VideoModel(SMALL, train_tokenizer(["move up"]))
    frames_BTCHW = torch.from_numpy(RNG.integers(100, 120, (6, 3, 3, 32, 32), dtype=np.uint8))
    frames_BTCHW[:, 2] = frames_BTCHW[:, 0]
    model.standardise(frames_BTCHW)
    changes = (frames_BTCHW[:, 1].float() - frames_BTCHW[:, 0].float()) / 127.5
    assert float((changes / model.scale_F[0]).square().mean()) == pytest.approx(1, abs=1e-4)
    assert float(model.scale_F[1]) == pytest.approx(0.01), "where nothing changes, nothing is divided by zero"


def test_past_the_end_of_an_episode_its_last_frame_stays(root: Path) -> None:

    dataset = open_dataset(root / "squares")
    futures = FutureFrames([dataset], training(root, "unused"), "train")
    frames_THWC = dataset.frames(1)
    assert len(futures) == 16
    for frame, after in ((0, (3, 6)), (3, (6, 7)), (6, (7, 7))):
        item = futures[8 + frame]
        expected = frames_THWC[[frame, *after]].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(item["frames_TCHW"], expected)
        assert item["instruction"] == f"move {DIRECTIONS[1]}"


def test_where_nothing_is_held_out_the_training_frames_are_decoded_once(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    dataset, config = open_dataset(root / "squares"), training(root, "unused")
    futures = FutureFrames([dataset], config, "train")
    assert video_train._held_out(config, [dataset], futures) is futures and futures.split == "train"
    assert "no episode is held out" in capsys.readouterr().err
    held_out = video_train._held_out(replace(config, held_out=0.5), [dataset], futures)
    assert held_out.split == "held_out" and len(held_out) == 8


def test_the_errors_of_a_video_model_are_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = replace(training(root, "video"), resume=True)
    video_train.run(replace(finished, json=True))
    shown = capsys.readouterr()
    assert json.loads(shown.out) == read_json(root / "video" / "metrics.json") and "next: lapa baseline" in shown.err
    video_train.run(finished)
    assert capsys.readouterr().out.startswith("training episodes: error 0.")


@pytest.mark.parametrize("lacking", ["train_mse", "train_mse_copy"])
def test_a_video_model_without_its_errors_is_refused(lacking: str, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "video", tmp_path / "video")
    figures = read_json(root / "video" / "metrics.json")
    del figures[lacking]
    write_json(tmp_path / "video" / "metrics.json", figures)
    finished = replace(training(root, "video"), out=tmp_path / "video", resume=True)
    with pytest.raises(UserError, match=rf"metrics\.json: {lacking} is missing, expected a number; copy it again"):
        video_train.run(finished)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(root: Path, tmp_path: Path) -> None:
    config = training(root, "x", steps=4, model=replace(SMALL, widths=(8, 16)))
    config = replace(config, out=tmp_path / "whole", loop=replace(config.loop, ema_decay=0.9, batch_size=2))
    video_train.run(config)
    parts = replace(config, out=tmp_path / "parts")
    video_train.run(replace(parts, loop=replace(parts.loop, stop_after=2)))
    assert not (parts.out / "config.json").exists()
    with pytest.raises(ValueError, match="no finished video model"):
        VideoModel.from_pretrained(parts.out)
    video_train.run(replace(parts, resume=True))
    whole, resumed = (VideoModel.from_pretrained(c.out).state_dict() for c in (config, parts))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_model_goes_on_with_its_sizes_horizon_and_scale(root: Path, tmp_path: Path) -> None:
    before = VideoModel.from_pretrained(root / "video")
    other = replace(SMALL, widths=(8, 16), horizon_seconds=0.1)
    video_train.run(replace(training(root, "x", 1, model=other), out=tmp_path / "after", start=root / "video"))
    after = VideoModel.from_pretrained(tmp_path / "after")
    assert after.config == before.config and torch.equal(after.scale_F, before.scale_F)
    step = (after.unet.conv_in.weight - before.unet.conv_in.weight).abs().max()
    assert 0 < step < 0.01
    write_synthetic_dataset(tmp_path / "slow", episodes=1, frames=4, size=32, fps=2)
    slow = VideoTrainConfig((tmp_path / "slow",), tmp_path / "out", start=root / "video")
    with pytest.raises(ValueError, match=r"slow: at 2 fps its frames are 0.5 s apart where the video model .* 0.3 s"):
        video_train.run(slow)
    with pytest.raises(ValueError, match=r"squares 0.3 s, slow 0.5 s; give one with --horizon-seconds"):
        video_train.run(replace(slow, data=(root / "squares", tmp_path / "slow"), start=None, model=SMALL))


def test_a_joined_policy_answers_the_same_alone_and_in_a_batch(root: Path) -> None:
    actor = load_actor(root / "policy", device="cpu")
    observations = [observation(), observation("move down-left", 32), observation("")]
    together = actor.infer(observations)
    assert together.shape == (3, 6, 2) and together.dtype == np.float32
    np.testing.assert_array_equal(actor.infer(observations), together)
    np.testing.assert_allclose(np.concatenate([actor.infer([one]) for one in observations]), together, atol=0.02)
    assert np.abs(together[0] - together[1]).max() > 0.05
    assert actor.infer([]).shape == (0, 6, 2)
    assert (actor.cameras, actor.chunk, actor.action_dim, actor.state_dim) == (("front",), 6, 2, 0)
    assert actor.action_space.names == ("right", "down")


def test_a_joined_policy_acts_step_by_step_as_any_policy(root: Path) -> None:
    actor = load_actor(root / "policy", device="cpu")
    one = observation("move up-left", 32)
    given = {"front": one.images["front"].transpose(2, 0, 1), "instruction": one.instruction}
    chunk_KA = actor.infer(given)
    assert chunk_KA.shape == (6, 2) and actor.fps == 10
    np.testing.assert_array_equal(chunk_KA, actor.infer([one])[0])
    for _ in range(2):
        steps = [actor.select_action(given) for _ in range(4)]
        np.testing.assert_array_equal(steps, chunk_KA[:4])
        actor.reset()
    with pytest.raises(UserError, match="infer takes an observation or a list of them"):
        actor.infer("front")


def test_actions_are_read_off_each_pair_of_the_plan_in_turn(root: Path) -> None:
    actor = UniPi.from_pretrained(root / "policy", device="cpu")
    observations = [observation(), observation()]
    frames_BTCHW = actor.plan(observations)
    assert frames_BTCHW.shape == (2, 3, 3, 32, 32)
    halves = [actor.inverse.predict(frames_BTCHW[:, first : first + 2]) for first in (0, 1)]
    np.testing.assert_allclose(actor.infer(observations), np.concatenate(halves, axis=1), atol=1e-5)


def test_the_folder_is_all_that_is_needed(root: Path, tmp_path: Path) -> None:
    for name in ("video", "inverse"):
        (tmp_path / name).symlink_to(root / name)
    unipi.run(UniPiConfig(tmp_path / "video", tmp_path / "inverse", tmp_path / "policy", sampling_steps=2))
    for name in ("video", "inverse"):
        (tmp_path / name).unlink()
    observations = [observation()]
    moved, before = (load_actor(folder / "policy", device="cpu") for folder in (tmp_path, root))
    np.testing.assert_array_equal(moved.infer(observations), before.infer(observations))
    assert not (tmp_path / "policy" / "video" / "training").exists()


def test_it_plays_in_a_simulator_under_its_own_fingerprint(root: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        str(root / "policy"), tmp_path / "a", env="synthetic", tasks="up,left", episodes=1, max_steps=12, videos=0
    )
    results = evaluate(config)
    assert results["overall"]["episodes"] == 2
    again = replace(config, out=tmp_path / "b")
    assert evaluate(again)["episodes"] == results["episodes"]
    unipi.run(UniPiConfig(root / "video", root / "inverse", tmp_path / "policy", sampling_steps=3))
    other = evaluate(replace(config, policy=str(tmp_path / "policy"), out=tmp_path / "c"))
    assert other["policy_fingerprint"] != results["policy_fingerprint"]


@pytest.mark.parametrize(
    ("inverse", "message"),
    [
        ({"horizon": 5}, r"video: its frames are 0.3 s apart, those of .*inverse 0.5 s \(5 frames at 10 fps\)"),
        ({"size": 48}, "predicts images of 32 px, .*inverse takes 48 px"),
    ],
)
def test_models_that_do_not_fit_together_are_refused(
    root: Path, tmp_path: Path, inverse: dict[str, Any], message: str
) -> None:
    write_inverse(tmp_path / "inverse", **inverse)
    with pytest.raises(ValueError, match=message):
        unipi.run(UniPiConfig(root / "video", tmp_path / "inverse", tmp_path / "policy"))
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("inside", ["video/policy", "inverse/a/b"])
def test_a_policy_inside_of_what_is_copied_into_it_is_refused(root: Path, tmp_path: Path, inside: str) -> None:
    shutil.copytree(root / "video", tmp_path / "video")
    shutil.copytree(root / "inverse", tmp_path / "inverse")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="which is copied into it; choose another folder"):
        unipi.run(UniPiConfig(tmp_path / "video", tmp_path / "inverse", tmp_path / inside, overwrite=True))
    assert sorted(path for path in tmp_path.rglob("*") if ".lock" not in path.name) == before


def test_another_camera_is_reported(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_inverse(tmp_path / "inverse", camera="wrist")
    unipi.run(UniPiConfig(root / "video", tmp_path / "inverse", tmp_path / "policy"))
    assert "video model learned from the camera front; the policy takes wrist" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"observation 0 lacks the camera wrist \(it has front\)"):
        load_actor(tmp_path / "policy", device="cpu").infer([observation()])


def test_an_output_is_not_replaced_by_accident(root: Path) -> None:
    with pytest.raises(ValueError, match="already holds a finished result"):
        unipi.run(UniPiConfig(root / "video", root / "inverse", root / "policy"))
    with pytest.raises(ValueError, match="is or contains"):
        unipi.run(UniPiConfig(root / "video", root / "inverse", root / "video", overwrite=True))
    with pytest.raises(ValueError, match="already holds a finished result"):
        video_train.run(training(root, "video"))


def test_a_mistake_does_not_cost_the_model_that_was_to_be_replaced(root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = replace(training(root, "x"), out=tmp_path, camera="frnt", overwrite=True)
    with pytest.raises(ValueError, match="unknown camera 'frnt'"):
        video_train.run(config)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_folders_that_cannot_act_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match="not the config of a policy"):
        load_actor(root / "video")
    with pytest.raises(ValueError, match="not the config of a video model"):
        VideoModel.from_pretrained(root / "inverse")
    with pytest.raises(ValueError, match="no statistics of datasets; leave out --statistics-key rt1"):
        load_actor(root / "policy", statistics_key="rt1")
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="--sampling-steps must be from 1 to 1000"):
            unipi.run(UniPiConfig(root / "video", root / "inverse", root / "new", sampling_steps=steps))
    for guidance in (float("nan"), 1e300):
        with pytest.raises(ValueError, match="--guidance must be from -100 to 100"):
            unipi.run(UniPiConfig(root / "video", root / "inverse", root / "new", guidance=guidance))
    assert not (root / "new").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 10**30), ("seed", -1), ("sampling_steps", 0), ("sampling_steps", 1 << 40)]
)
def test_a_plan_that_cannot_be_drawn_is_named_when_the_policy_is_loaded(
    root: Path, tmp_path: Path, key: str, value: int
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(root / "policy", policy)
    (policy / SUMS).unlink()
    config = policy / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"policy/config\.json: (--)?{key.replace('_', '-')} must be from"):
        load_actor(policy)


def test_a_missing_library_is_named_with_its_install(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'needs diffusers .*pip install "lapa-vla\[study\]"'):
        video_train.run(replace(training(root, "x"), out=tmp_path / "out"))
    with pytest.raises(ValueError, match="lapa-vla\\[study\\]"):
        load_actor(root / "policy")


@pytest.mark.parametrize(
    "change", [{"image_size": 36}, {"widths": (30, 64)}, {"text_width": 30}, {"num_frames": 0}, {"horizon_seconds": 0}]
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"multiple|above 0"):
        replace(SMALL, **change)


@pytest.mark.parametrize("part", ["video", "inverse"])
def test_a_part_that_was_changed_is_named(root: Path, tmp_path: Path, part: str) -> None:
    unipi.run(UniPiConfig(root / "video", root / "inverse", tmp_path / "policy"))
    path = tmp_path / "policy" / part / "model.safetensors"
    (path.parent / SUMS).unlink()
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, path)
    with pytest.raises(ValueError, match=rf"policy/{part}: changed since it was joined .*lapa baseline unipi"):
        load_actor(tmp_path / "policy", device="cpu")


@pytest.mark.parametrize("name", presets.VIDEO)
def test_a_preset_takes_images_of_one_size_in_all_stages(name: str) -> None:
    sizes = {
        "latent": presets.LATENT[name].model.image_size,
        "policy": presets.BACKBONES[name].image_size,
        "inverse": presets.INVERSE[name].model.image_size,
        "video": presets.VIDEO[name].model.image_size,
    }
    assert len(set(sizes.values())) == 1, sizes


def test_a_spoilt_folder_is_named(root: Path, tmp_path: Path) -> None:
    unipi.run(UniPiConfig(root / "video", root / "inverse", tmp_path / "policy"))
    config = tmp_path / "policy" / "video" / "config.json"
    (config.parent / SUMS).unlink()
    written = json.loads(config.read_text())
    written["video"]["widths"] = [16, 32]
    config.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"video/model.safetensors: does not fit"):
        load_actor(tmp_path / "policy")
