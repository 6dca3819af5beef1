"""Training and probing a latent action model: it learns, it resumes, and the probe can fail."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.data.dataset import Dataset
from lapa.data.pairs import FramePairs, PairsConfig
from lapa.data.sources.synthetic import write_synthetic_dataset
from lapa.engine.optim import OptimConfig
from lapa.files import read_json
from lapa.latent import train as training
from lapa.latent.model import LatentActionModel
from lapa.latent.probe import (
    ProbeConfig,
    Sample,
    code_grid,
    draw_sample,
    probe,
    reconstruction_figures,
    ridge_r2,
    usage_figures,
)
from lapa.latent.probe import run as run_probe
from lapa.presets import LATENT

DEBUG = LATENT["debug"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latent") / "squares"
    write_synthetic_dataset(root, episodes=16, frames=16, size=32, fps=10, actions=True)
    return root


def train(data: Path, out: Path, resume: bool = False, **loop: object) -> None:
    training.run(replace(DEBUG, data=(data,), out=out, loop=replace(DEBUG.loop, steps=6, **loop), resume=resume))


def sample_of(data: Path, num: int = 100) -> Sample:
    pairs = FramePairs([Dataset.open(data)], PairsConfig(size=32, horizon=0.3, held_out=0), split="all")
    return draw_sample(pairs, num, seed=0, actions=True)


def test_a_run_stopped_and_resumed_gives_the_same_model(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "whole")
    train(data, tmp_path / "parts", stop_after=3)
    assert not (tmp_path / "parts" / "config.json").exists()
    train(data, tmp_path / "parts", resume=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    model = LatentActionModel.from_pretrained(tmp_path / "parts")
    assert model.horizon == DEBUG.model.horizon_seconds
    assert read_json(tmp_path / "parts" / "metrics.json")["mse_copy"] > 0


def test_finished_output_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "lam")
    before = (tmp_path / "lam" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="already holds a finished result"):
        train(data, tmp_path / "lam")
    train(data, tmp_path / "lam", resume=True)
    assert (tmp_path / "lam" / "model.safetensors").stat().st_mtime_ns == before


def test_resuming_with_another_config_is_refused(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "lam", stop_after=3)
    with pytest.raises(ValueError, match=r"written under another config \(loop\.optim\.lr was 0\.002, is 0\.5\)"):
        train(data, tmp_path / "lam", resume=True, optim=replace(DEBUG.loop.optim, lr=0.5))


def test_collapse_is_warned_of(capsys: pytest.CaptureFixture) -> None:
    figures = {"mse": 1.0, "mse_copy": 1.0, "mse_shuffled": 1.0, "codes_used": 0.1, "perplexity": 1.0}
    training.warn_of_collapse({**figures, "joint_codes_used": 1.0}, LATENT["paper"].model)
    assert "the codebook has collapsed: every pair has the same latent action; try --quantizer fsq" in told(capsys)
    training.warn_of_collapse({**figures, "joint_codes_used": 9.0}, DEBUG.model)
    assert "the codes of another pair reconstruct as well as the right ones; train for longer" in told(capsys)
    training.warn_of_collapse({**figures, "joint_codes_used": 9.0, "mse_shuffled": 2.0}, DEBUG.model)
    assert "warning" not in told(capsys)


def told(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().err


def test_probe_writes_its_figures_and_its_picture(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "lam")
    run_probe(ProbeConfig(lam=tmp_path / "lam", data=data, num_pairs=64, num_rows=2))
    out = tmp_path / "lam" / "probe_squares"
    figures = read_json(out / "probe.json")
    assert figures["num_pairs"] == 64
    assert set(figures["linear_probe"]) >= {"codes", "quantized", "continuous", "pixel_difference"}
    assert (out / "grid.png").stat().st_size > 0
    with pytest.raises(ValueError, match="already holds a finished result"):
        run_probe(ProbeConfig(lam=tmp_path / "lam", data=data))


class Oracle(LatentActionModel):
    """Knows the truth: its codes are the action's direction, and its reconstruction is the second frame."""

    def codes(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        rows = frames_BTCHW.float().mean((2, 4)).argmax(-1).float()
        columns = frames_BTCHW.float().mean((2, 3)).argmax(-1).float()
        moved = torch.stack([(x[:, 1] - x[:, 0]).sign() for x in (rows, columns)], dim=1)
        return torch.cat([moved + 1, moved + 1], dim=1).long()

    def reconstruct(self, frames_BTCHW: torch.Tensor, codes_BL: torch.Tensor | None = None) -> torch.Tensor:
        assert codes_BL is not None
        own = (codes_BL == self.codes(frames_BTCHW)).all(1)[:, None, None, None]
        return torch.where(own, frames_BTCHW[:, 1], frames_BTCHW[:, 0]).float() / 255


def test_the_figures_tell_a_model_that_knows_from_one_that_ignores_its_codes(data: Path) -> None:
    sample = sample_of(data)
    _, known = reconstruction_figures(Oracle(DEBUG.model).eval(), sample)
    assert known["mse"] < 1e-9 < known["mse_copy"]
    assert known["mse_shuffled"] > 0.3 * known["mse_copy"]
    # An untrained model that predicts the change predicts none, whatever the code.
    _, ignorant = reconstruction_figures(LatentActionModel(DEBUG.model).eval(), sample)
    assert ignorant["mse"] == pytest.approx(ignorant["mse_copy"])
    assert ignorant["mse_shuffled"] == pytest.approx(ignorant["mse"])


def test_usage_of_a_collapsed_and_of_an_even_codebook() -> None:
    collapsed = usage_figures(torch.zeros(80, 2, dtype=torch.int64), codebook_size=8)
    assert (collapsed["codes_used"], collapsed["perplexity"], collapsed["joint_codes_used"]) == (1 / 8, 1.0, 1.0)
    even = usage_figures(torch.arange(80)[:, None].repeat(1, 2) % 8, codebook_size=8)
    assert even["codes_used"] == 1.0
    assert even["perplexity"] == pytest.approx(8.0)
    assert even["joint_perplexity"] == pytest.approx(8.0)


def test_ridge_finds_a_linear_relation_and_no_other() -> None:
    rng = np.random.default_rng(0)
    features, noise = rng.normal(size=(400, 5)), rng.normal(size=(400, 1))
    targets = np.concatenate([features[:, :1] * 2 + 3, noise, np.ones((400, 1))], axis=1)
    r2 = ridge_r2(features, targets, np.arange(400) >= 300)
    assert r2[0] > 0.99
    assert r2[1] < 0.1
    assert np.isnan(r2[2])


def test_probe_splits_by_episode(data: Path) -> None:
    figures = probe(LatentActionModel(DEBUG.model).eval(), sample_of(data, 64))
    assert figures["linear_probe"]["num_held_out_episodes"] == 3


def test_grid_has_a_cell_for_every_single_code_change(data: Path) -> None:
    sheet = code_grid(LatentActionModel(DEBUG.model).eval(), sample_of(data, 2).frames_BTCHW)
    assert sheet.size == ((3 + 4 * 8) * 34, 14 + 2 * 34)


@pytest.mark.slow
def test_training_finds_the_direction_of_motion(tmp_path: Path) -> None:
    """Minutes on a CPU: all codes in use, motion predicted, the codes read."""
    write_synthetic_dataset(tmp_path / "squares", episodes=256, frames=16, size=64, fps=10)
    tiny = LATENT["tiny"]
    loop = replace(tiny.loop, steps=1000, optim=OptimConfig(lr=1e-3, warmup_steps=100), eval_every=1000)
    model = replace(tiny.model, horizon_seconds=0.4)
    training.run(replace(tiny, data=(tmp_path / "squares",), out=tmp_path / "lam", model=model, loop=loop))
    metrics = read_json(tmp_path / "lam" / "metrics.json")
    assert metrics["codes_used"] == 1.0
    assert metrics["mse"] < 0.6 * metrics["mse_copy"]
    assert metrics["mse_shuffled"] > 1.3 * metrics["mse"]
