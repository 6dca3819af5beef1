"""Verdicts: each is good, doubtful and bad where it should be, on figures made so, and their thresholds are documented.

Verdicts on models made by hand are tested where those models are: test_probe, test_policy_open_loop.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapa import cli
from lapa.data.sampling import split_episodes
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.latent.train import suggestions, summary, verdict_of
from lapa.policy.training import verdict_of as verdict_of_policy
from lapa.presets import FINETUNE, LATENT
from lapa.study.report import verdict_of as verdict_of_study
from lapa.study.results import Setting
from lapa.study.statistics import Cell, Estimate, Group
from lapa.verdicts import THRESHOLDS, Level, Verdict, judge, of_latent_actions, of_policy, suggested

METRICS = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
# The validation split of a model that reads its codes.
SOUND = {"mse": 1.0, "mse_copy": 4.0, "mse_shuffled": 3.0, "codes_used": 1.0, "perplexity": 6.0}
# Share of the episodes in the validation split of the policies that are trained here.
HELD_OUT = 0.2


@pytest.mark.parametrize("name", THRESHOLDS)
def test_between_its_thresholds_a_figure_is_doubtful(name: str) -> None:
    threshold = THRESHOLDS[name]
    assert threshold.level(threshold.good) == "good"
    assert threshold.level(threshold.bad) == "bad"
    assert threshold.level((threshold.good + threshold.bad) / 2) == "doubtful"
    beyond = threshold.good - threshold.bad
    assert threshold.level(threshold.good + beyond) == "good" and threshold.level(threshold.bad - beyond) == "bad"


@pytest.mark.parametrize("name", THRESHOLDS)
def test_every_threshold_is_documented(name: str) -> None:
    threshold = THRESHOLDS[name]
    assert f"| `{name}` | {threshold.good:g} | {threshold.bad:g} |" in METRICS


@pytest.mark.parametrize(
    ("changes", "level", "why"),
    [
        ({}, "good", "another pair's latent action gives 3.00 times the error"),
        ({"mse_copy": 1.25}, "doubtful", "the error is 0.80 of that of copying the first frame (good: at most 0.6)"),
        ({"mse_copy": 0.9}, "bad", "the error is 1.11 of that of copying"),
        ({"mse_shuffled": 1.3}, "doubtful", "gives 1.30 times the error"),
        ({"mse_shuffled": 1.0}, "bad", "gives 1.00 times the error"),
        ({"codes_used": 0.3}, "doubtful", "30% of the codes are used"),
        ({"perplexity": 1.1}, "bad", "perplexity of 1.1"),
    ],
)
def test_a_latent_action_model(changes: dict[str, float], level: str, why: str) -> None:
    figures = {**SOUND, **changes}
    verdict = verdict_of({"reconstruction": figures, "usage": figures}, LATENT["tiny"].model)
    assert verdict.level == level
    assert str(verdict).startswith(f"verdict: {level}: ") and why in str(verdict)
    assert ("try --augment, more videos" in str(verdict)) == (level != "good")
    assert f"error {figures['mse']:.5f}" in summary(figures)


@pytest.mark.parametrize(("error", "level"), [(0.1, "good"), (0.5, "doubtful"), (1.2, "bad")])
def test_a_finetuned_policy(error: float, level: str) -> None:
    one = {"held_out_action_error": error, "held_out_mean_action_error": 1.0, "held_out_loss": 3.0}
    assert verdict_of_policy(one).level == level
    # Of several datasets, each in its own units.
    two = {
        **{"held_out_action_error_a": 50 * error, "held_out_mean_action_error_a": 50.0},
        **{"held_out_action_error_b": error, "held_out_mean_action_error_b": 1.0},
    }
    assert verdict_of_policy(two).level == level


@pytest.mark.parametrize("scale", [{}, {"held_out_mean_action_error": 0.0}])
def test_an_action_error_without_a_scale_is_not_judged(scale: dict[str, float]) -> None:
    """Of a version before 0.2, and of actions that never change; of two datasets, the other is judged."""
    verdict = verdict_of_policy({"held_out_action_error": 0.1, **scale})
    assert verdict.level == "doubtful" and "nothing was measured that has a threshold" in str(verdict)
    both = {"held_out_action_error_a": 9.0, "held_out_action_error_b": 0.1, "held_out_mean_action_error_b": 1.0}
    assert verdict_of_policy(both).level == "good"


def test_a_codebook_of_two_can_be_good() -> None:
    model = replace(LATENT["tiny"].model, codebook_size=2)
    for perplexity, level in ((2.0, "good"), (1.3, "doubtful"), (1.0, "bad")):
        figures = {**SOUND, "perplexity": perplexity}
        assert verdict_of({"reconstruction": figures, "usage": figures}, model).level == level


@pytest.mark.parametrize(("shuffled", "level"), [(0.5, "good"), (0.0, "bad")])
def test_an_error_of_zero_is_judged(shuffled: float, level: str) -> None:
    errors = {"mse": 0.0, "mse_copy": 1.0, "mse_shuffled": shuffled}
    assert judge(of_latent_actions({"reconstruction": errors}, codebook_size=8)).level == level


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("perplexity", 1.96, "1.9 (good: at least 2)"),
        ("perplexity", 1.51, "1.6 (good: at least 2)"),
        ("error_over_copying", 0.602, "0.61 of"),
        ("error_over_copying", 0.998, "0.99 of"),
        ("codes_used", 0.499, "49% of"),
    ],
)
def test_a_rounded_figure_is_on_its_side_of_the_thresholds(name: str, value: float, shown: str) -> None:
    assert shown in str(judge({name: value}))


def test_without_a_validation_split_a_policy_is_doubtful() -> None:
    verdict = verdict_of_policy({"train_loss": 0.1})
    assert verdict.level == "doubtful" and "no episode is in the validation split" in str(verdict)


@pytest.mark.parametrize(("accuracy", "level"), [(0.9, "good"), (0.6, "doubtful"), (0.5, "bad")])
def test_a_latent_policy(accuracy: float, level: str) -> None:
    assert judge(of_policy({"token_accuracy": accuracy, "most_frequent_token": 0.5})).level == level


def test_what_was_trained_on_is_not_good() -> None:
    good, bad = judge({"normalised_error": 0.1}), judge({"normalised_error": 1.5})
    assert good.level == "good" and good.at_best_doubtful("trained on them").level == "doubtful"
    assert bad.at_best_doubtful("trained on them").level == "bad"
    assert judge({}).level == "doubtful"


@pytest.mark.parametrize(
    ("level", "commands"), [("good", ["go on"]), ("doubtful", ["look 'at it'", "go on"]), ("bad", ["look 'at it'"])]
)
def test_a_bad_model_is_looked_at_and_not_used(level: Level, commands: list[str]) -> None:
    verdict = Verdict(level, ("it is made so",))
    assert suggested(verdict, ["go", "on"], ["look", "at it"]) == commands
    assert suggested(verdict, [], ["look", "at it"]) == commands[: level != "good"]
    # The same after the training of a latent action model, its probe and the finetuning of a policy.
    model = LATENT["tiny"].model
    labels = [command for command in suggestions(Path("LAM"), "DATA", model, verdict, True) if "lapa label" in command]
    assert labels == ["lapa label --lam LAM --data DATA --out LABELS"] * (level != "bad")
    continuous = replace(model, quantizer="continuous", targets="features", vision_tower="TOWER")
    assert suggestions(Path("LAM"), "DATA", continuous, verdict, False) == []


def group(*, low: float, high: float, num_seeds: int = 3, demonstrations: int = 2) -> Group:
    """A group of a study in which LAPA minus scratch has this interval."""
    difference = Estimate((low + high) / 2, low, high, num_seeds)
    seeds = tuple(range(num_seeds))
    lapa = Cell("lapa", seeds, 900, Estimate(0.4, 0.3, 0.5, num_seeds), {}, {"scratch": difference}, None, None)
    return Group(Setting("in-domain", 30, demonstrations), {"lapa": lapa})


def test_a_study() -> None:
    good = verdict_of_study([group(low=0.07, high=0.42)])
    assert good.level == "good" and "lapa is 24.5 points above scratch" in str(good)
    doubtful = verdict_of_study([group(low=0.07, high=0.42), group(low=-0.1, high=0.2, demonstrations=5)])
    assert doubtful.level == "doubtful" and "5 labelled episodes" in str(doubtful)
    one_seed = verdict_of_study([group(low=0.07, high=0.42, num_seeds=1)])
    assert one_seed.level == "doubtful" and "fewer than 3 seeds" in str(one_seed)
    assert verdict_of_study([group(low=-0.3, high=-0.1)]).level == "bad"
    assert verdict_of_study([]).level == "doubtful"
    careful = verdict_of_study([group(low=0.07, high=0.42)], ["preset debug: these numbers measure nothing"])
    assert careful.level == "doubtful" and careful.reasons[0].startswith("preset debug")
    paired = group(low=0.07, high=0.42)
    lapa = paired.cells["lapa"]
    for low, level in ((0.1, "good"), (-0.1, "doubtful")):
        versus = {**lapa.versus, "captions": Estimate(0.2, low, 0.3, 3)}
        controlled = verdict_of_study([replace(paired, cells={"lapa": replace(lapa, versus=versus)})])
        assert controlled.level == level and ("lapa and captions" in str(controlled)) == (level == "doubtful")
    lacking = verdict_of_study([group(low=0.07, high=0.42), Group(Setting("cross-task", 30, 2), {})])
    assert lacking.level == "doubtful" and "lack of lapa or scratch: cross-task" in str(lacking)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy pretrained on made-up videos, `latent_policy`, and episodes of the same world: `robot` and `others`."""
    root = tmp_path_factory.mktemp("world")
    small = ["--preset", "debug"]
    command("data synthetic", "--episodes", "16", "--out", root / "videos")
    command("latent train", *small, "--data", root / "videos", "--out", root / "lam")
    command("label", "--lam", root / "lam", "--data", root / "videos", "--out", root / "labels")
    labels = ["--labels", root / "labels"]
    command("policy pretrain", *small, "--data", root / "videos", *labels, "--out", root / "latent_policy")
    for seed, (name, episodes) in enumerate({"robot": 24, "others": 8}.items(), start=1):
        command("data synthetic", "--actions", "--episodes", episodes, "--seed", seed, "--out", root / name)
    return root


def command(name: str, *options: object) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*name.split(), *map(str, options)])
    assert exit_.value.code == 0


def judged(capsys: pytest.CaptureFixture, name: str, *options: object) -> tuple[Verdict, str]:
    """The verdict of a command, as `--json` has it, and what the command suggests."""
    capsys.readouterr()
    command(name, *options, "--json")
    shown = capsys.readouterr()
    verdict: dict[str, Any] = json.loads(shown.out)["verdict"]
    return Verdict(verdict["level"], tuple(verdict["reasons"])), shown.err


def finetune(capsys: pytest.CaptureFixture, world: Path, data: Path, out: Path) -> tuple[Verdict, str]:
    start = ["--preset", "debug", "--policy", world / "latent_policy", "--head", "chunk", "--steps", 120]
    return judged(capsys, "policy finetune", *start, "--data", data, "--held-out", HELD_OUT, "--out", out)


@pytest.mark.slow
def test_a_whole_run_on_true_actions_is_good(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    verdict, suggestions = finetune(capsys, world, world / "robot", tmp_path / "policy")
    assert verdict.level == "good" and "of that of always the mean action" in str(verdict)
    assert "next: lapa evaluate" in suggestions and "next: lapa policy measure" not in suggestions
    verdict, suggestions = judged(capsys, "policy measure", tmp_path / "policy", "--data", world / "others")
    assert verdict.level == "good" and "next: lapa evaluate" in suggestions


@pytest.mark.slow
def test_a_whole_run_on_reversed_actions_is_bad(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It learns the opposite of the validation split's actions, which are the true ones."""
    reversed_in_training(world / "robot", tmp_path / "reversed")
    verdict, suggestions = finetune(capsys, world, tmp_path / "reversed", tmp_path / "policy")
    assert verdict.level == "bad" and "of that of always the mean action (good: at most 0.35)" in str(verdict)
    assert "try more episodes, or more steps" in str(verdict)
    assert "next: lapa policy measure" in suggestions and "next: lapa evaluate" not in suggestions
    verdict, suggestions = judged(capsys, "policy measure", tmp_path / "policy", "--data", world / "others")
    assert verdict.level == "bad" and "next: lapa evaluate" not in suggestions


def reversed_in_training(source: Path, out: Path) -> None:
    """Writes the dataset again, with the opposite actions in the episodes that `finetune` trains on."""
    dataset = open_dataset(source)
    assert dataset.action_space is not None
    names, camera = dataset.action_space.names, dataset.cameras[0]
    cameras = {camera: dataset.image_shape(camera)}
    writer = DatasetWriter(out, fps=dataset.fps, cameras=cameras, action_names=names, control="delta")
    validation = split_episodes(len(dataset), HELD_OUT, FINETUNE["debug"].loop.seed, "held_out")
    for number, episode in enumerate(dataset.episodes):
        sign = 1 if number in validation else -1
        actions_TA = sign * dataset.actions(number)
        writer.add_episode({camera: dataset.frames(number)}, episode.instruction, actions=actions_TA)
    writer.finish()
