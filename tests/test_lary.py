"""LARYBench's probes tell models that cheat apart; clips are chosen as published; labels become files for its code."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lapa.data.labels import Labels
from lapa.data.spec import open_dataset
from lapa.files import read_json
from lapa.latent import lary
from lapa.latent.lary import Sizes, change, classification_figures, clip_frames, regression_figures
from lapa.latent.model import LatentAction, LatentActionModel
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.verdicts import judge
from test_probe import DEBUG, SIZE, Cheat, Directions, Ignorant, Oracle, lapa, mass_centre, moving_disc

STEPS = 3
SMALL = Sizes(
    regression_width=64, regression_batch=32, regression_rate=2e-3, classifier_width=16, classifier_heads=2,
    classifier_batch=16, epochs=16,
)  # fmt: skip


class Motion(Directions):
    """The motion of the disc among constants: the probe's LayerNorm would keep no length of two numbers alone."""

    def encode(self, frames_BTCHW: Tensor) -> LatentAction:
        action = super().encode(frames_BTCHW)
        constants = torch.tensor([1.0, -1.0]).repeat(7).expand(len(frames_BTCHW), 14)
        wide_BLD = torch.cat([action.quantized_BLD.flatten(1) / 4, constants], dim=1)[:, None]
        return LatentAction(action.codes_BL, wide_BLD, wide_BLD)


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, Any]]:
    """Absolute actions, the places of the disc on its way from the first frame to the second."""
    sample = moving_disc(240)
    first_B2, second_B2 = (mass_centre(sample.frames_BTCHW[:, time]).numpy() for time in (0, 1))
    share_K = np.arange(STEPS)[:, None] / STEPS
    chunks_BKA = first_B2[:, None] + (second_B2 - first_B2)[:, None] * share_K
    found = {}
    for kind in (Motion, Ignorant, Cheat):
        model: Any = kind()
        measured = regression_figures(model, sample, model.encode(sample.frames_BTCHW), chunks_BKA, SMALL)
        found[kind.__name__] = {"regression": measured}
    return found


def test_the_relative_mode_tells_the_motion_from_the_frame(figures: dict[str, dict[str, Any]]) -> None:
    absolute, relative = (
        {name: each["regression"][mode] for name, each in figures.items()} for mode in ("absolute", "relative")
    )
    # What misleads: in the absolute mode the frame is better than the motion.
    assert absolute["Cheat"]["quantized"]["mse"] < 0.5 * absolute["Motion"]["quantized"]["mse"]
    # What tells.
    assert relative["Motion"]["quantized"]["mse"] < 0.2 < 0.4 < relative["Cheat"]["quantized"]["mse"]
    assert relative["Ignorant"]["quantized"]["mse"] > 0.9
    for each in relative.values():
        assert each["shuffled"]["mse"] > 0.9 and each["first_frame"]["mse"] > 0.9
        assert each["mean"]["mse"] == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("model", "level"), [("Motion", "good"), ("Ignorant", "bad"), ("Cheat", "bad")])
def test_the_figure_of_the_verdict_tells_them_apart(figures: dict[str, dict[str, Any]], model: str, level: str) -> None:
    value = lary.relative_error_over_frames(figures[model])
    assert value is not None and judge({"relative_error_over_frames": value}).level == level


def test_the_figure_is_not_given_where_the_first_frame_tells_most_of_the_action() -> None:
    errors = {"mean": 0.8, "first_frame": 0.05, "second_frame": 0.06, "quantized": 0.1}
    scripted = {name: {"mse": mse} for name, mse in errors.items()}
    assert lary.relative_error_over_frames({"regression": {"relative": scripted}}) is None
    driven = scripted | {"first_frame": {"mse": 0.7}, "second_frame": {"mse": 0.7}}
    assert lary.relative_error_over_frames({"regression": {"relative": driven}}) == pytest.approx(0.1 / 0.7)


def test_moves_are_summed_and_targets_that_never_change_are_left_out() -> None:
    sample, model = moving_disc(48), Directions()
    encoded = model.encode(sample.frames_BTCHW)
    steady = np.repeat(np.random.default_rng(0).normal(size=(48, 1, 2)), STEPS, axis=1)
    few = replace(SMALL, epochs=1)
    assert regression_figures(model, sample, encoded, steady, few)["relative"] is None
    moves = regression_figures(model, sample, encoded, steady, few, delta=True)
    assert moves["relative"]["mean"]["mse"] == pytest.approx(moves["absolute"]["mean"]["mse"])
    assert len(moves["relative"]["quantized"]["mse_per_dimension"]) == 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lary") / "squares"
    write_synthetic_dataset(root, episodes=48, frames=20, size=SIZE, fps=10, actions=True)
    return root


def test_the_control_is_of_other_episodes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, few = list[Tensor](), replace(SMALL, epochs=1)
    monkeypatch.setattr(lary, "_regress", lambda tokens, *_: read.append(tokens) or {"mse": 1.0})
    sample, number_B = moving_disc(240), torch.arange(240.0)
    latents_BLD = number_B[:, None, None]
    encoded = LatentAction(None, latents_BLD, latents_BLD)
    chunks_BKA = np.random.default_rng(0).normal(size=(240, STEPS, 1))
    found = regression_figures(Directions(), sample, encoded, chunks_BKA, few)  # type: ignore[arg-type]
    taken_B = read[list(found["absolute"]).index("shuffled") - 1].flatten().long()
    assert (taken_B.sort().values == number_B).all()
    assert (sample.episodes_B[taken_B] != sample.episodes_B).all()

    monkeypatch.setattr(lary, "_classify", lambda tokens, *_: {"tokens": tokens})
    for seed in range(5):
        clips = classification_figures(Oracle(), open_dataset(data), None, range(16), few, most=16, seed=seed)  # type: ignore[arg-type]
        own, taken = clips["quantized"]["tokens"].flatten(1), clips["shuffled"]["tokens"].flatten(1)
        same = (taken[:, None] == own).all(-1)
        assert same.any(0).all() and not same.diagonal().any()


def test_the_classifier_reads_what_is_there_and_no_more() -> None:
    torch.manual_seed(0)
    labels_B = torch.arange(64) % 4
    test_B = torch.arange(64) >= 48
    noise_BTPD = torch.randn(64, 8, 2, 8)
    shown_BTPD = noise_BTPD + 4 * torch.nn.functional.one_hot(labels_B, 8)[:, None, None]
    known, unknown = (
        lary._classify(tokens, labels_B, test_B, SMALL, torch.device("cpu")) for tokens in (shown_BTPD, noise_BTPD)
    )
    assert min(known.values()) > 0.9 and unknown["last_accuracy"] < 0.7
    assert known["class_accuracy"] == pytest.approx(known["accuracy"])  # Classes are of one size.


def test_clips_of_a_dataset_are_classified_by_instruction(data: Path) -> None:
    dataset, model, few = open_dataset(data), Oracle(), replace(SMALL, epochs=1)
    found = classification_figures(model, dataset, None, range(16), few, most=16)  # type: ignore[arg-type]
    assert found is not None and (found["num_classes"], found["num_clips"]) == (8, 16)
    assert {"quantized", "continuous", "raw_features", "shuffled", "first_frame"} < set(found)
    # Two episodes of one instruction.
    assert classification_figures(model, dataset, None, [0, 8], few, most=48) is None  # type: ignore[arg-type]


def test_frames_of_a_clip_lie_where_it_changes() -> None:
    assert clip_frames([], 18) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert clip_frames([], 5) == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert clip_frames([0.0] * 99, 100) == [11 * index + index // 9 for index in range(9)]
    # Even change: frame i is the one whose share of the whole is nearest to (i + 0.5) / 9.
    assert clip_frames([1.0] * 90, 91) == [5, 15, 25, 35, 45, 55, 65, 75, 85]
    # All of it in one place: one frame, repeated.
    assert clip_frames([0.0] * 40 + [1.0] + [0.0] * 40, 82)[-1] == clip_frames([0.0] * 40 + [1.0] + [0.0] * 40, 82)[-2]


def test_change_is_the_structural_difference_window_by_window() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 10, 11)).astype(np.uint8)
    values = []
    for row in range(10 - 6):
        for column in range(11 - 6):
            x, y = (image[row : row + 7, column : column + 7].astype(float).ravel() for image in (first, second))
            (var_x, covariance), (_, var_y) = np.cov(x, y)
            above = (2 * x.mean() * y.mean() + 6.5025) * (2 * covariance + 58.5225)
            values.append(above / ((x.mean() ** 2 + y.mean() ** 2 + 6.5025) * (var_x + var_y + 58.5225)))
    assert change(first, second) == pytest.approx(math.sqrt(1 - np.mean(values)), abs=1e-9)
    assert change(first, first) == pytest.approx(0, abs=1e-6)


def test_labels_become_files_that_the_benchmark_reads(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    LatentActionModel(DEBUG.model).save_pretrained(tmp_path / "lam")
    out = tmp_path / "labels"
    command = ("label", "--lam", tmp_path / "lam", "--data", data, "--out", out, "--lary")
    assert lapa(*command) == 0
    labels, dataset, horizon = Labels.open(out), open_dataset(data), 3
    with (out / "lary" / "latent_actions.csv").open() as file:
        rows = list(csv.DictReader(file))
    # As there, pairs that follow one another: of 20 frames, those that begin at 0, 3, ... 15.
    assert len(rows) == labels.manifest.num_episodes * 6
    for row in rows[:: len(rows) // 5]:
        episode, frame = int(row["episode"]), int(row["frame"])
        at = labels.codes(episode)[0].tolist().index(frame)
        latent = np.load(row["la_path"])
        np.testing.assert_array_equal(latent["tokens"].flatten(), labels.embeddings(episode)[at])
        np.testing.assert_array_equal(latent["indices"], labels.codes(episode)[1][at])
        np.testing.assert_array_equal(np.load(row["action"]), dataset.actions(episode)[frame : frame + horizon])
    # Interrupted amid the files: what is there stays, the rest is made.
    lost, kept = Path(rows[7]["la_path"]), Path(rows[8]["la_path"])
    written = kept.stat().st_mtime_ns
    lost.unlink(), (out / "lary" / "latent_actions.csv").unlink()
    assert lapa(*command, "--resume") == 0
    assert lost.exists() and kept.stat().st_mtime_ns == written and (out / "lary" / "latent_actions.csv").exists()


def test_the_benchmark_needs_actions_and_a_local_folder(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LatentActionModel(DEBUG.model).save_pretrained(tmp_path / "lam")
    write_synthetic_dataset(tmp_path / "videos", episodes=2, frames=8, size=SIZE, fps=10)
    assert lapa("label", "--lam", tmp_path / "lam", "--data", tmp_path / "videos", "--lary") == 2
    assert "has no actions" in capsys.readouterr().err
    assert lapa("label", "--lam", tmp_path / "lam", "--data", data, "--lary", "--out", "memory://labels") == 2
    assert "read local folders" in capsys.readouterr().err


def test_the_command_writes_the_figures_and_the_table(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    LatentActionModel(replace(DEBUG.model, quantizer="nsvq")).save_pretrained(tmp_path / "lam")
    monkeypatch.setitem(lary.SIZES, "lary-small", replace(SMALL, epochs=1))
    command = ("latent", "probe", tmp_path / "lam", "--data", data, "--out", tmp_path / "p", "--num-pairs", 128)
    assert lapa(*command, "--protocol", "lary-small") == 0
    assert "LARY MSE, absolute, quantised" in capsys.readouterr().out
    found = read_json(tmp_path / "p" / "probe.json")["lary"]
    assert found["relative_error_over_frames"] == pytest.approx(lary.relative_error_over_frames(found))
    assert {"published", "quantized", "continuous", "shuffled", "first_frame", "second_frame", "raw_features"} < set(
        found["regression"]["absolute"]
    )
    # Of the 16 episodes that 128 pairs pay for, those whose instruction has another.
    assert 2 <= found["classification"]["num_clips"] <= 16


def test_a_probe_that_cannot_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    LatentActionModel(DEBUG.model).save_pretrained(tmp_path / "lam")
    write_synthetic_dataset(tmp_path / "videos", episodes=2, frames=8, size=SIZE, fps=10)
    command = ("latent", "probe", tmp_path / "lam", "--data", tmp_path / "videos", "--out", tmp_path / "p")
    assert lapa(*command, "--protocol", "lary-small") == 0
    printed = capsys.readouterr().err
    assert "no regression, which needs actions" in printed and "no classification, which needs two" in printed
    assert read_json(tmp_path / "p" / "probe.json")["lary"] == {}
