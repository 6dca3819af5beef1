"""The probe can fail: it tells a model that knows from one that ignores its codes and from one that cheats."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lapa.cli import main
from lapa.data.pairs import FramePairs, PairsConfig
from lapa.data.sampling import split_episodes
from lapa.data.spec import open_dataset
from lapa.data.video import ClipScan
from lapa.drawing import CELL, GAP, MARGIN
from lapa.errors import UserError
from lapa.files import read_json
from lapa.latent import probe as probes
from lapa.latent.metrics import Sample, draw_sample, encode, other_episodes, regression_figures, usage_figures
from lapa.latent.model import LatentAction, LatentActionModel
from lapa.latent.motion import motion
from lapa.latent.probe import probe
from lapa.latent.show import EachCode, parse_codes, probe_sheet
from lapa.presets import LATENT
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.verdicts import Verdict, judge, of_latent_actions

DEBUG = LATENT["debug"]
SIZE, REACH = 32, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("probe") / "squares"
    write_synthetic_dataset(root, episodes=64, frames=16, size=SIZE, fps=10, actions=True)
    return root


def sample_of(data: Path, num: int, horizon: float = 0.4) -> Sample:
    config = PairsConfig(size=SIZE, horizon=horizon, held_out=0, cache_gib=0, middle=True)
    return draw_sample(FramePairs([open_dataset(data)], config, split="all"), num, seed=0, actions=True)


class Fake(nn.Module):
    """The part of a latent action model that the probe uses, with pixels as its target."""

    discrete, predicts_pixels = True, True

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=SIZE, latent_length=2, codebook_size=2 * REACH + 1)
        self.anchor = nn.Parameter(torch.zeros(1))

    def codes(self, frames_BTCHW: Tensor) -> Tensor:
        return self.encode(frames_BTCHW).codes_BL

    def embed(self, codes_BL: Tensor) -> Tensor:
        return (codes_BL[..., None] - REACH).float()

    def target(self, frame_BCHW: Tensor) -> Tensor:
        return frame_BCHW.float() / 255

    def decode(self, frame_BCHW: Tensor, codes_BL: Tensor) -> Tensor:
        return self.predict(frame_BCHW, self.embed(codes_BL))


def square_in(frame_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Where the square is, bool [B, H, W], and its centre (right, down) [B, 2]."""
    ground = frame_BCHW.float().flatten(2).median(dim=2).values[:, :, None, None]
    inside_BHW = (frame_BCHW.float() - ground).abs().amax(1) > 20
    places = torch.arange(SIZE).float()
    area = inside_BHW.sum((1, 2)).clamp(min=1)
    right, down = ((inside_BHW.sum(axis) * places).sum(1) / area for axis in (1, 2))
    return inside_BHW, torch.stack([right, down], dim=1)


class Oracle(Fake):
    """Its latent action is the way the square went, in pixels, and its decoder moves the square that far."""

    def encode(self, frames_BTCHW: Tensor) -> LatentAction:
        z_BLD = (square_in(frames_BTCHW[:, 1])[1] - square_in(frames_BTCHW[:, 0])[1])[..., None]
        codes_BL = (z_BLD[..., 0].round().clamp(-REACH, REACH) + REACH).long()
        return LatentAction(codes_BL, z_BLD, self.embed(codes_BL))

    def predict(self, frame_BCHW: Tensor, quantized_BLD: Tensor) -> Tensor:
        inside_BHW, _ = square_in(frame_BCHW)
        second = []
        for frame, inside, (right, down) in zip(frame_BCHW, inside_BHW, quantized_BLD[..., 0].long(), strict=True):
            ground = frame.flatten(1).median(dim=1).values[:, None, None]
            emptied = torch.where(inside, ground, frame)
            way = (int(down), int(right))
            second.append(torch.where(inside.roll(way, (0, 1)), frame.roll(way, (1, 2)), emptied))
        return torch.stack(second).float() / 255


class Ignorant(Fake):
    """Its codes are noise, evenly used, and its decoder does not read them."""

    def encode(self, frames_BTCHW: Tensor) -> LatentAction:
        codes_BL = frames_BTCHW.long().sum((2, 3, 4)) % self.config.codebook_size
        return LatentAction(codes_BL, self.embed(codes_BL), self.embed(codes_BL))

    def predict(self, frame_BCHW: Tensor, quantized_BLD: Tensor) -> Tensor:
        return frame_BCHW.float() / 255


class Cheat(Fake):
    """A wide continuous latent that is the second frame."""

    discrete = False

    def encode(self, frames_BTCHW: Tensor) -> LatentAction:
        z_BLD = frames_BTCHW[:, 1].flatten(1)[:, None].float() / 255
        return LatentAction(None, z_BLD, z_BLD)

    def predict(self, frame_BCHW: Tensor, quantized_BLD: Tensor) -> Tensor:
        return quantized_BLD.reshape(-1, 3, SIZE, SIZE)


@pytest.fixture(scope="module")
def figures(data: Path) -> dict[str, dict[str, Any]]:
    sample = sample_of(data, 192)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # None reaches the user, of convergence least of all.
        return {kind.__name__: probe(kind(), sample) for kind in (Oracle, Ignorant, Cheat)}


def test_an_oracle_passes_every_figure(figures: dict[str, dict[str, Any]]) -> None:
    known = figures["Oracle"]
    errors, transfer, action = known["reconstruction"], known["transfer"], known["action"]
    assert errors["mse"] < 0.15 * errors["mse_copy"]
    assert errors["mse_shuffled"] > 4.5 * errors["mse"]
    assert errors["moving_mse"] < 0.15 * errors["moving_mse_copy"]
    assert transfer["same_code"] > 0.9 > 0.3 > transfer["same_code_chance"]
    assert transfer["action_r2"] > 0.4
    assert transfer["donor_share"] < 0.3
    assert min(action["linear"][name]["r2"] for name in ("codes", "quantized", "continuous")) > 0.9
    assert min(action["mlp"][name]["r2"] for name in ("quantized", "continuous")) > 0.9
    assert action["lp_mse"] < 0.1
    assert known["information"]["known"] > 0.5
    assert known["task"]["quantized"] > 0.9
    consistency = known["consistency"]
    assert max(consistency["reversal_error"], consistency["composition_error"]) < 0.01
    assert consistency["s_pcfc"] < -0.9


def test_a_model_that_ignores_its_codes_fails_though_it_uses_all_of_them(figures: dict[str, dict[str, Any]]) -> None:
    ignorant = figures["Ignorant"]
    errors, transfer = ignorant["reconstruction"], ignorant["transfer"]
    # What misleads: all codes are used, and many nats of the action seem to be in the joint codes.
    assert ignorant["usage"]["codes_used"] == 1.0
    assert min(entry["nats"] for entry in ignorant["information"]["joint"]) > 0.5
    # What tells.
    assert errors["mse_shuffled"] == errors["mse"] == errors["mse_copy"]
    assert transfer["same_code"] == pytest.approx(transfer["same_code_chance"], abs=0.05)
    assert transfer["action_r2"] is None
    assert ignorant["action"]["linear"]["quantized"]["r2"] < 0.1
    assert ignorant["action"]["lp_mse"] > 0.9
    assert ignorant["information"]["known"] < 0.05
    assert ignorant["information"]["known_joint"] < 0.05
    assert ignorant["task"]["quantized"] < 0.3
    assert ignorant["consistency"]["reversal_error"] > 1.5


def test_a_model_that_passes_the_frame_through_fails_though_it_reconstructs(figures: dict[str, dict[str, Any]]) -> None:
    cheat, oracle = figures["Cheat"], figures["Oracle"]
    # What misleads: the reconstruction is perfect, depends on the latent, and comes back from a transfer.
    assert cheat["reconstruction"]["mse"] < 1e-9 < cheat["reconstruction"]["mse_shuffled"]
    assert cheat["transfer"]["latent_error"] < 1e-6
    assert cheat["transfer"]["action_r2"] > 0.99
    # What tells: the transfer shows the donor's frame, and the true action is not in the latent.
    assert cheat["transfer"]["donor_share"] > 0.99
    assert cheat["action"]["linear"]["continuous"]["r2"] < 0.5 < oracle["action"]["linear"]["continuous"]["r2"]
    assert cheat["consistency"]["s_pcfc"] > 0.99
    assert cheat["consistency"]["reversal_error"] > 3
    assert "usage" not in cheat
    assert "information" not in cheat


@pytest.mark.parametrize(("model", "level"), [("Oracle", "good"), ("Ignorant", "bad"), ("Cheat", "bad")])
def test_the_verdict_tells_them_apart(figures: dict[str, dict[str, Any]], model: str, level: str) -> None:
    assert judge(of_latent_actions(figures[model], 2 * REACH + 1)).level == level


@pytest.mark.parametrize("shift", [(5, 0), (0, -3), (-4, 2)])
def test_motion_is_what_moves_apart_from_the_camera(shift: tuple[int, int]) -> None:
    pytest.importorskip("cv2", reason="needs lapa-vla[motion]")
    rng = np.random.default_rng(0)
    scene, thing = (rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2))
    scene, thing = (np.asarray(Image.fromarray(image).resize((128, 128))) for image in (scene, thing))
    pairs = []
    for camera in ((0, 0), (3, 2)):
        first, second = scene.copy(), np.roll(scene, camera[::-1], axis=(0, 1)).copy()
        first[32:64, 64:96] = thing[:32, :32]
        x, y = 64 + camera[0] + shift[0], 32 + camera[1] + shift[1]
        second[y : y + 32, x : x + 32] = thing[:32, :32]
        pairs.append(np.stack([first, second]).transpose(0, 3, 1, 2))
    still, moved = motion(torch.from_numpy(np.stack(pairs)))["grid"].reshape(2, 4, 4, 2)
    # The thing fills the cell in the second row and the third column, and leaves a part of it.
    np.testing.assert_allclose(still[1, 2] * 128, shift, atol=1.5)
    np.testing.assert_allclose(moved[1, 2] * 128, shift, atol=1.5)
    assert np.abs(still[3] * 128).max() < 0.5 and np.abs(moved[3] * 128).max() < 0.5


class Directions(Fake):
    """Its latent action is how far the disc of `moving_disc` went, right and down."""

    def encode(self, frames_BTCHW: Tensor) -> LatentAction:
        z_BLD = torch.stack([mass_centre(frames_BTCHW[:, time]) for time in (0, 1)]).diff(dim=0)[0][..., None]
        codes_BL = z_BLD[..., 0].round().clamp(-REACH, REACH).long() + REACH
        return LatentAction(codes_BL, z_BLD, self.embed(codes_BL))


def mass_centre(frame_BCHW: Tensor) -> Tensor:
    """The mean place (right, down) of bright pixels, [B, 2]."""
    bright_BHW = (frame_BCHW.float().mean(1) > 60).float()
    places, area = torch.arange(SIZE).float(), bright_BHW.sum((1, 2))
    return torch.stack([(bright_BHW.sum(axis) * places).sum(1) / area for axis in (1, 2)], dim=1)


def moving_disc(num: int) -> Sample:
    """A textured disc near the middle that moves by up to 4 pixels in any direction."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(num):
        texture = Image.fromarray(rng.integers(100, 256, (8, 8, 3), dtype=np.uint8)).resize((SIZE, SIZE))
        down, right = np.mgrid[:SIZE, :SIZE]
        inside = np.hypot(down - SIZE / 2, right - SIZE / 2) < SIZE / 4
        first = np.where(inside[..., None], np.asarray(texture), rng.integers(0, 40, 3)).astype(np.uint8)
        # Where it begins varies too: the second frame alone does not show the motion.
        first = np.roll(first, rng.integers(-4, 5, 2), axis=(0, 1))
        second = np.roll(first, rng.integers(-4, 5, 2), axis=(0, 1))
        pairs.append(np.stack([first, second]).transpose(0, 3, 1, 2))
    return Sample(torch.from_numpy(np.stack(pairs)), np.arange(num) // 4)


def test_motion_tells_models_apart_without_actions() -> None:
    pytest.importorskip("cv2", reason="needs lapa-vla[motion]")
    sample = moving_disc(160)
    targets_BM, size = motion(sample.frames_BTCHW)["whole"], 2 * REACH + 1
    found = {
        kind.__name__: regression_figures(targets_BM, sample, kind().encode(sample.frames_BTCHW), size)["mlp"]
        for kind in (Directions, Ignorant, Cheat)
    }
    assert found["Directions"]["quantized"]["r2"] > 0.75
    assert found["Cheat"]["quantized"]["r2"] < 0.6
    assert found["Ignorant"]["quantized"]["r2"] < 0.1
    assert max(found["Directions"][name]["r2"] for name in ("shuffled", "first_frame")) < 0.1


class Blurred(Oracle):
    """Predicts features only: pictures of a quarter of the size."""

    predicts_pixels = False

    def target(self, frame_BCHW: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(super().target(frame_BCHW), 4)

    def predict(self, frame_BCHW: Tensor, quantized_BLD: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(super().predict(frame_BCHW, quantized_BLD), 4)


def test_a_model_of_features_is_measured_on_its_features(data: Path) -> None:
    sample = replace(sample_of(data, 40), actions_BA=None, tasks_B=None)
    model = Blurred()
    measured = probe(model, sample)
    assert measured["reconstruction"]["mse"] < 0.3 * measured["reconstruction"]["mse_copy"]
    assert measured["reconstruction"]["moving_share"] > 0.1
    assert "transfer" not in measured
    assert probe_sheet(model, sample, encode(model, sample.frames_BTCHW), 0.5).width == sheet_width(3)


def test_mean_frame_and_moving_pixels_by_hand(data: Path) -> None:
    sample = replace(sample_of(data, 100), actions_BA=None, tasks_B=None)
    errors = probe(Ignorant(), sample)["reconstruction"]
    first, second = (sample.frames_BTCHW.double() / 255).unbind(1)
    moving = ((second - first).abs().amax(1, keepdim=True) > 0.05).expand_as(second)
    spread = (second - second.mean(0)).square()
    assert errors["mse_mean"] == pytest.approx(float(spread.mean()))
    assert errors["moving_mse_mean"] == pytest.approx(float(spread[moving].mean()))
    assert errors["moving_mse_copy"] == pytest.approx(float((second - first).square()[moving].mean()))
    assert errors["moving_share"] == pytest.approx(float(moving.double().mean()))


def test_partners_are_of_another_episode_where_there_are_enough() -> None:
    episodes_B = np.random.default_rng(0).integers(0, 9, 200)
    for seed in range(3):
        partners_B = other_episodes(episodes_B, seed)
        assert (episodes_B[partners_B] != episodes_B).all()
        assert sorted(partners_B) == list(range(200))
    assert (other_episodes(np.zeros(5, int)) != np.arange(5)).all()


def test_usage_of_a_collapsed_and_of_an_even_codebook() -> None:
    collapsed = usage_figures(torch.zeros(80, 2, dtype=torch.int64), codebook_size=8)
    assert (collapsed["codes_used"], collapsed["perplexity"], collapsed["joint_codes_used"]) == (1 / 8, 1.0, 1.0)
    even = usage_figures(torch.arange(80)[:, None].repeat(1, 2) % 8, codebook_size=8)
    assert even["codes_used"] == 1.0
    assert even["perplexity"] == pytest.approx(8.0)
    assert even["joint_perplexity"] == pytest.approx(8.0)


@pytest.fixture(scope="module")
def lam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lams") / "fsq"
    torch.manual_seed(0)
    LatentActionModel(DEBUG.model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def continuous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lams") / "continuous"
    torch.manual_seed(0)
    LatentActionModel(replace(DEBUG.model, quantizer="continuous", horizon_seconds=0.1)).save_pretrained(folder)
    return folder


def sheet_width(columns: int) -> int:
    return 2 * MARGIN + columns * (CELL + GAP) - GAP


def lapa(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_probe_writes_its_figures_and_its_picture(data: Path, lam: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "probe"
    command = ("latent", "probe", lam, "--data", data, "--out", out, "--num-pairs", 64)
    assert lapa(*command) == 0
    assert "codes used by over 1%" in capsys.readouterr().out
    figures = read_json(out / "probe.json")
    assert figures["num_pairs"] == 64
    assert set(figures["action"]["linear"]) == {
        "codes", "quantized", "continuous", "pixel_difference", "first_frame", "shuffled"
    }  # fmt: skip
    assert Image.open(out / "grid.png").width == sheet_width(7)
    assert lapa(*command) == 2
    assert "already holds a finished result" in capsys.readouterr().err


def test_json_is_all_that_the_probe_prints_to_stdout(data: Path, lam: Path, tmp_path: Path, capsys: Any) -> None:
    assert lapa("latent", "probe", lam, "--data", data, "--out", tmp_path / "p", "--num-pairs", 32, "--json") == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert figures == read_json(tmp_path / "p" / "probe.json")
    # An untrained model: no labelling with it is suggested.
    assert figures["verdict"]["level"] == "bad" and "more videos" in figures["verdict"]["reasons"][-1]
    assert "next: lapa view" in printed.err and "lapa label" not in printed.err
    assert "was trained on" not in printed.err


@pytest.mark.parametrize("held_out", [0.25, 0.0])
def test_clips_that_the_model_was_trained_on_do_not_count(
    data: Path, tmp_path: Path, capsys: Any, held_out: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(data)
    torch.manual_seed(0)
    model = LatentActionModel(DEBUG.model)
    notes = {"dataset_fingerprints": ["another", dataset.fingerprint], "held_out": held_out, "loop": {"seed": 5}}
    model.save_pretrained(tmp_path / "lam", notes)
    model = LatentActionModel.from_pretrained(tmp_path / "lam")
    monkeypatch.setattr(probes, "verdict_of", lambda figures, model: Verdict("good", ("it is made so",)))
    assert lapa("latent", "probe", tmp_path / "lam", "--data", data, "--out", tmp_path / "p", "--num-pairs", 32) == 0
    said, verdict = capsys.readouterr().err, read_json(tmp_path / "p" / "probe.json")["verdict"]
    kept = probes.kept_from_training(model, dataset)
    config = PairsConfig(size=SIZE, horizon=0.4, held_out=held_out, cache_gib=0)
    if held_out:
        # As in the training, in which the dataset was the second.
        pairs = FramePairs([dataset], config, split="held_out", seed=6)
        assert kept.tolist() == sorted({pairs.location(index)[1] for index in range(len(pairs))})
        every = FramePairs([dataset], config, split="all")
        drawn = probes.draw_unseen([model], every, 32, 0)
        assert (len(drawn.indices), drawn.unseen, drawn.seen) == (32, 16, False)
        assert {every.location(index)[1] for index in drawn.indices} <= set(kept.tolist())
        assert "the pairs are of the 16 episodes kept from it" in said and verdict["level"] == "good"
    else:
        assert not len(kept) and "kept from it" not in said
        assert verdict == {"level": "doubtful", "reasons": ["it was trained on these clips", "it is made so"]}


def test_models_are_compared_on_what_none_was_trained_on(data: Path, lam: Path, tmp_path: Path, capsys: Any) -> None:
    dataset = open_dataset(data)
    torch.manual_seed(0)
    model, notes = LatentActionModel(DEBUG.model), {"dataset_fingerprints": [dataset.fingerprint], "held_out": 0.5}
    for name, seed in (("a", 1), ("b", 2)):
        model.save_pretrained(tmp_path / name, {**notes, "loop": {"seed": seed}})
    models = [LatentActionModel.from_pretrained(path) for path in (tmp_path / "a", lam, tmp_path / "b")]
    every = FramePairs([dataset], PairsConfig(size=SIZE, horizon=0.4, held_out=0.0, cache_gib=0), split="all")
    drawn = probes.draw_unseen(models, every, 10_000, 0)
    kept = [set(split_episodes(len(dataset), 0.5, seed, "held_out").tolist()) for seed in (1, 2)]
    assert {every.location(index)[1] for index in drawn.indices} == kept[0] & kept[1]
    assert (drawn.unseen, drawn.seen) == (len(kept[0] & kept[1]), False)

    command = ("latent", "compare", tmp_path / "a", tmp_path / "b", "--data", data, "--num-pairs", 16, "--overwrite")
    assert lapa(*command, "--out", tmp_path / "out") == 0
    assert f"of the {drawn.unseen} episodes of {dataset.name} that no model was trained on" in capsys.readouterr().err
    assert read_json(tmp_path / "out" / "compare.json")["trained_on_these_clips"] is False
    model.save_pretrained(tmp_path / "b", {**notes, "held_out": 0.0, "loop": {"seed": 2}})
    assert lapa(*command, "--out", tmp_path / "out") == 0
    assert "was trained on by some of these models" in capsys.readouterr().err
    assert read_json(tmp_path / "out" / "compare.json")["trained_on_these_clips"] is True
    model.save_pretrained(tmp_path / "b", {**notes, "loop": None})
    assert lapa(*command, "--out", tmp_path / "out") == 2
    assert "held_out or loop.seed is damaged (TypeError" in capsys.readouterr().err


def test_probe_of_a_continuous_model(data: Path, continuous: Path, tmp_path: Path) -> None:
    out = tmp_path / "probe"
    assert lapa("latent", "probe", continuous, "--data", data, "--out", out, "--num-pairs", 32) == 0
    figures = read_json(out / "probe.json")
    assert "usage" not in figures
    # One frame apart, there is none in the middle.
    assert set(figures["consistency"]) == {"reversal_error", "reversal_cosine", "offset_share"}
    assert Image.open(out / "grid.png").width == sheet_width(7)


def test_compare_gives_every_model_the_same_first_frames(
    data: Path, lam: Path, continuous: Path, tmp_path: Path, capsys: Any
) -> None:
    command = ("latent", "compare", lam, continuous, "--data", data, "--out", tmp_path / "out", "--num-pairs", 32)
    assert lapa(*command) == 0
    assert "fsq" in (told := capsys.readouterr().out)
    assert "continuous" in told
    models = read_json(tmp_path / "out" / "compare.json")["models"]
    assert set(models) == {"fsq", "continuous"}
    assert models["fsq"]["reconstruction"]["mse_copy"] > models["continuous"]["reconstruction"]["mse_copy"]
    assert lapa("latent", "compare", lam, "--data", data) == 2
    assert "two or more" in capsys.readouterr().err
    near, far = (
        FramePairs([open_dataset(data)], PairsConfig(size=SIZE, horizon=horizon, cache_gib=0), split="all")
        for horizon in (0.1, 0.5)
    )
    places = [far.location(index) for index in (0, 17, len(far) - 1)]
    assert [near.location(near.index_of(*place)) for place in places] == places


def test_show_draws_codes_and_a_rollout(lam: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "picture.png")
    out = tmp_path / "out"
    rollout = ("--rollout", "3,1,4,1", "0,0,0,0,7,7,7,7")
    assert lapa("latent", "show", lam, "--image", tmp_path / "picture.png", "--out", out, *rollout) == 0
    assert Image.open(out / "codes.png").width == sheet_width(8)
    with Image.open(out / "codes.webp") as animation:
        assert (animation.width, animation.n_frames) == (sheet_width(8), 5)
    assert Image.open(out / "rollout.png").width == sheet_width(4)
    frames = list(ClipScan(out / "rollout.mp4"))
    assert len(frames) == 4


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--codes", "1,2,3"), "3 codes; a latent action of this model has 4"),
        (("--codes", "1,2,3,8"), "codes of this model lie in 0 to 7"),
        (("--codes", "1,2,3,4,5,6,7,0"), "holds 2 latent actions"),
        (("--rollout", "a,b"), "whole numbers with commas"),
        (("--image", "missing.png"), "no such file"),
        (("--image", __file__), "no image in JPEG, PNG"),
    ],
)
def test_show_says_what_is_wrong(
    lam: Path, tmp_path: Path, options: tuple[str, str], complaint: str, capsys: Any
) -> None:
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "picture.png")
    image = () if "--image" in options else ("--image", tmp_path / "picture.png")
    assert lapa("latent", "show", lam, "--out", tmp_path / "out", *image, *options) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_show_refuses_a_continuous_model(continuous: Path, tmp_path: Path, capsys: Any) -> None:
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "any.png")
    assert lapa("latent", "show", continuous, "--image", tmp_path / "any.png") == 2
    assert "no codes" in capsys.readouterr().err


def test_latent_actions_from_text() -> None:
    assert parse_codes(("3,1", "0,0,2,2"), 2, 4).tolist() == [[3, 1], [0, 0], [2, 2]]
    assert parse_codes((), 2, 4).shape == (0, 2)


def test_of_a_large_codebook_codes_at_even_distances_are_shown(data: Path) -> None:
    model = LatentActionModel(replace(DEBUG.model, codebook_size=64)).eval()
    frame_CHW, base_L = sample_of(data, 4).frames_BTCHW[0, 0], torch.tensor([9, 1, 2, 3])
    each = EachCode(model, frame_CHW, base_L)
    assert each.codes == [0, 9, 18, 27, 36, 45, 54, 63]
    assert each.actions_NL[8:16].tolist() == [[9, code, 2, 3] for code in each.codes]
    assert [row.marked for row in each._rows(np.zeros((32, 8, 8, 3), np.uint8))] == [{1}, set(), set(), set()]


def test_an_even_codebook_of_many_codes_is_not_called_dead() -> None:
    codes_BL = torch.arange(2560)[:, None] % 256
    assert usage_figures(codes_BL, codebook_size=256)["codes_used"] == 1.0
    assert usage_figures(codes_BL // 2, codebook_size=256)["codes_used"] == 0.5


def test_motion_without_opencv_is_refused_before_any_work(
    data: Path, lam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    out = tmp_path / "probe"
    assert lapa("latent", "probe", lam, "--data", data, "--out", out, "--motion") == 2
    assert "pip install 'lapa-vla[motion]'" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("notes", [{"dataset_fingerprints": 3}, {"dataset_fingerprints": None}, {"datasets": ["x"]}])
def test_a_damaged_record_of_the_training_data_is_one_line(notes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    LatentActionModel(DEBUG.model).save_pretrained(tmp_path / "lam", notes)
    model = LatentActionModel.from_pretrained(tmp_path / "lam")
    with pytest.raises(UserError, match=r"config.json of the model: dataset_fingerprints or datasets is damaged"):
        probes.kept_from_training(model, open_dataset(data))
