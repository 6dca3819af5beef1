"""The loop: same seed, same loss; stop and resume, bitwise; many processes as one; what is not finite is named."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress, TaskID
from torch import nn

from lapa.cli import main
from lapa.engine import loop as loop_module
from lapa.engine import optim as optim_module
from lapa.engine.batches import Draw, Scattered, StepSampler
from lapa.engine.config import LoopConfig, OptimConfig
from lapa.engine.curves import panels
from lapa.engine.distributed import pick_device
from lapa.engine.loop import TrainResult, train
from lapa.engine.metrics import read_figures
from lapa.engine.optim import build_optimizer, learning_rate, set_learning_rate
from lapa.errors import UserError
from lapa.types import Losses, TrainableModel, TrainingDataset
from torchrun import torchrun

LOOP = LoopConfig(
    steps=4, batch_size=4, optim=OptimConfig(lr=1e-2, warmup_steps=2), device="cpu", log_every=1, eval_every=2
)


class Line(TrainingDataset):
    """Points of y = 2x, jittered by the draw number alone."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        index, number = draw
        x = index / 10 + 0.01 * np.random.default_rng([0, number]).standard_normal()
        return {"x": x, "y": 2 * x, "index": index}

    def describe(self, index: int) -> str:
        return f"point {index}"


class Slope(TrainableModel, nn.Module):
    """Dropout draws from torch's global generator, so a resume must restore that too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        error = (self.net(batch["x"][:, None])[:, 0] - batch["y"]).square().mean()
        return Losses(error, {"mse": error.detach()})


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "x": torch.tensor([item["x"] for item in items], dtype=torch.float32),
        "y": torch.tensor([item["y"] for item in items], dtype=torch.float32),
        "index": torch.tensor([item["index"] for item in items]),
    }


def run(out: Path, loop: LoopConfig = LOOP, **options: Any) -> tuple[Slope, TrainResult]:
    torch.manual_seed(0)
    model = Slope()
    out.mkdir(exist_ok=True)
    result = train(model, Line(), collate, loop, out, run_config={"a": 1}, description="test", **options)
    return model, result


def test_the_bar_shows_the_loss_again_after_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    update = Progress.update

    def recorded(bar: Progress, task: TaskID, **changes: Any) -> None:
        update(bar, task, **changes)
        notes.append(bar.tasks[0].fields["note"])

    monkeypatch.setattr("lapa.engine.loop.progress", lambda: Progress(disable=True))
    monkeypatch.setattr(Progress, "update", recorded)
    run(tmp_path / "a", evaluate=lambda model: {"error": 1.0})
    shown = [note.split()[0] for note in notes]
    assert shown[shown.index("validation") - 1 :][:3] == ["loss", "validation", "loss"]
    assert notes[shown.index("validation") - 1] == notes[shown.index("validation") + 1]


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, {"accumulate": 2}, {"workers": 1}], ids=str)
def test_two_steps_and_a_resume_equal_four(tmp_path: Path, changes: dict) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"norm": float(weights(model).norm())}

    loop = replace(LOOP, **changes)
    whole, result = run(tmp_path / "whole", loop, evaluate=evaluate)
    assert result.finished
    _, stopped = run(tmp_path / "parts", replace(loop, stop_after=2), evaluate=evaluate)
    assert (stopped.finished, stopped.step) == (False, 2)
    resumed, _ = run(tmp_path / "parts", loop, resume=True, evaluate=evaluate)
    assert torch.equal(weights(whole), weights(resumed))
    names = ("step", "loss", "eval/norm")
    kept = [[tuple(map(row.get, names)) for row in log(tmp_path / name)] for name in ("whole", "parts")]
    assert kept[0] == kept[1] and {row[0] for row in kept[0] if row[2] is not None} == {2, 4}


def test_a_small_model_is_trained_by_one_thread_and_resumes_with_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, seen = torch.get_num_threads(), []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(torch.get_num_threads())
        return {}

    def trained(out: str, loop: LoopConfig = LOOP, **options: Any) -> set[int]:
        seen.clear()
        run(tmp_path / out, loop, evaluate=evaluate, **options)
        assert torch.get_num_threads() == 3
        return set(seen)

    torch.set_num_threads(3)
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert trained("one") == {1}
        assert "on CPU (1 thread)," in " ".join(capsys.readouterr().err.split())
        monkeypatch.setattr(loop_module, "SMALL", 1)
        assert trained("large", replace(LOOP, stop_after=3)) == {3}
        monkeypatch.setattr(loop_module, "SMALL", 1000)
        assert trained("large", resume=True) == {3}
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert trained("asked") == {3}
        assert trained("one", replace(LOOP, steps=6), resume=True) == {3}
        assert "1 threads wrote this checkpoint, 3 continue" in " ".join(capsys.readouterr().err.split())
    finally:
        torch.set_num_threads(before)


def test_same_seed_same_loss_and_another_seed_another(tmp_path: Path) -> None:
    losses = [
        [row.get("loss") for row in log_of]
        for log_of in (
            (run(tmp_path / "a"), log(tmp_path / "a"))[1],
            (run(tmp_path / "b"), log(tmp_path / "b"))[1],
            (run(tmp_path / "c", replace(LOOP, seed=1)), log(tmp_path / "c"))[1],
        )
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", replace(LOOP, stop_after=2))
    with pytest.raises(ValueError, match=r"checkpoint\.pt: was written under another config \(a was 1, is 2\)"):
        train(Slope(), Line(), collate, LOOP, tmp_path / "run", run_config={"a": 2}, description="t", resume=True)


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "training").mkdir(parents=True)
    (tmp_path / "run" / "training" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
        run(tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_names_its_samples(tmp_path: Path) -> None:
    class Broken(Slope):
        def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
            return Losses(super().forward(batch).loss * float("nan"))

    with pytest.raises(FloatingPointError, match=r"loss of step 1 is nan, with the samples: point \d; point \d"):
        train(Broken(), Line(), collate, LOOP, tmp_path, run_config={}, description="test")


def test_a_gradient_that_is_not_finite_stops_before_the_weights_take_it(tmp_path: Path) -> None:
    class Steep(Slope):
        def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
            # The square root of zero is finite, its slope is not.
            return Losses((super().forward(batch).loss * 0).sqrt())

    model = Steep()
    with pytest.raises(FloatingPointError, match="the gradient norm of step 1 is nan"):
        train(model, Line(), collate, LOOP, tmp_path, run_config={}, description="test")
    assert torch.isfinite(weights(model)).all()


def test_evaluation_is_logged_and_returned(tmp_path: Path) -> None:
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(model.training)
        return {"norm": float(weights(model).norm())}

    _, result = run(tmp_path / "run", evaluate=evaluate)
    assert seen == [False, False]
    assert result.metrics["norm"] > 0
    evaluations = [row for row in log(tmp_path / "run") if "eval/norm" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    assert {name for row in evaluations for name in row} == {"step", "seconds", "eval/norm"}


def test_prepare_runs_once_at_the_start_of_a_run(tmp_path: Path) -> None:
    calls = []
    run(tmp_path / "run", replace(LOOP, stop_after=2), prepare=calls.append)
    run(tmp_path / "run", resume=True, prepare=calls.append)
    assert len(calls) == 1


def test_bf16_weights_train_and_resume_and_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loop = replace(LOOP, weights="bf16")
    whole, _ = run(tmp_path / "whole", loop)
    assert "an update below 1/256 of its weight is lost" in " ".join(capsys.readouterr().err.split())
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.bfloat16}
    run(tmp_path / "parts", replace(loop, stop_after=2))
    resumed, _ = run(tmp_path / "parts", loop, resume=True)
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_every": 0}, "--eval-every must be at least 1, got 0"),
        ({"log_every": 0}, "--log-every must be at least 1"),
        ({"save_every_steps": 0}, "--save-every-steps must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"accumulate": 0}, "--accumulate must be at least 1"),
        ({"stop_after": 0}, "--stop-after must be at least 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"ema_decay": 2.0}, "--ema-decay must be from 0 to below 1, got 2.0"),
    ],
)
def test_values_that_cannot_be_trained_with_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoopConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0}, "--clip must be above 0, got 0"),
        ({"clip": float("nan")}, "--clip must be above 0, got nan"),
        ({"lr": float("nan")}, "--lr must be at least 0, got nan"),
        ({"weight_decay": -1}, "--weight-decay must be at least 0"),
    ],
)
def test_updates_that_teach_nothing_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimConfig(**options)


def test_options_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--weights bf16 does not go with --precision fp32"):
        run(tmp_path, replace(LOOP, weights="bf16", precision="fp32"))
    with pytest.raises(ValueError, match="--shard does not go with --ema-decay"):
        run(tmp_path, replace(LOOP, shard=True, ema_decay=0.9))
    with pytest.raises(ValueError, match="--shard does not go with --optimizer muon"):
        run(tmp_path, replace(LOOP, shard=True, optim=replace(LOOP.optim, optimizer="muon")))
    eight_bits = replace(LOOP.optim, optimizer="adamw8bit")
    with pytest.raises(ValueError, match="--shard does not go with --optimizer adamw8bit and --weights bf16 at once"):
        run(tmp_path, replace(LOOP, shard=True, weights="bf16", optim=eight_bits))


def test_weights_are_of_one_precision_frozen_ones_too(tmp_path: Path) -> None:
    model = Slope().to(torch.bfloat16)
    model.net[0].requires_grad_(False)
    model.register_buffer("angles", torch.ones(2))
    model.tokeniser = nn.Linear(1, 1, dtype=torch.float16).requires_grad_(False)
    model.full_precision = lambda: [model.tokeniser]
    kept = [torch.float16] * 2
    loop = replace(LOOP, precision="bf16", steps=1)
    train(model, Line(), collate, loop, tmp_path / "fp32", run_config={}, description="test")
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 4 + kept
    loop = replace(loop, weights="bf16")
    train(model, Line(), collate, loop, tmp_path / "bf16", run_config={}, description="test")
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 4 + kept
    assert model.angles.dtype == torch.float32


class Wide(TrainableModel, nn.Module):
    """Wide enough for moments in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    forward = Slope.forward


class WithTable(Wide):
    """With an embedding, which its loss leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 32)


@pytest.mark.parametrize(("kept", "shard"), [("fp32", False), ("fp32", True), ("bf16", False)])
def test_adamw_in_8_bits_trains_as_in_32_and_resumes(tmp_path: Path, kept: str, shard: bool) -> None:
    torchao = pytest.importorskip("torchao.optim")
    loop = replace(LOOP, optim=replace(LOOP.optim, optimizer="adamw8bit", lr=1e-3), weights=kept, shard=shard)

    def trained(name: str, loop: LoopConfig, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = Wide()
        # What it compiles is the same arithmetic, and takes 20 s a shape.
        with torch.compiler.set_stance("force_eager"):
            train(model, Line(), collate, loop, tmp_path / name, run_config={}, description="test", **options)
        return model

    whole = trained("whole", loop)
    trained("parts", replace(loop, stop_after=2))
    assert torch.equal(weights(whole), weights(trained("parts", loop, resume=True)))
    trained("adamw", replace(loop, optim=replace(loop.optim, optimizer="adamw")))
    eight, thirty_two = ([row["loss"] for row in log(tmp_path / name) if "loss" in row] for name in ("whole", "adamw"))
    assert eight == pytest.approx(thirty_two, rel=0.05)
    optimizer = build_optimizer(Wide(), loop.optim)
    assert isinstance(optimizer, torchao.AdamW8bit)


def test_adamw_in_8_bits_without_torchao_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"--optimizer adamw8bit needs torchao .* pip install"):
        build_optimizer(Slope(), OptimConfig(optimizer="adamw8bit"))


def test_muon_of_many_matrices_updates_each_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(32, 32), (48, 16), (32, 32), (16, 48), (48, 16), (32, 32), (20, 20)]
    # So that matrices of one shape are updated in two parts.
    monkeypatch.setattr(optim_module, "TOGETHER", 2 * 32 * 32)
    torch.manual_seed(0)
    start, unused = [torch.randn(shape) for shape in shapes], torch.randn(20, 20)
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    ends = []
    for kind in (torch.optim.Muon, optim_module.Muon):
        parameters = [nn.Parameter(each.clone()) for each in (*start, unused)]
        optimizer = kind(parameters, lr=0.1, weight_decay=0.5)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=False):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append([parameter.detach() for parameter in parameters])
        assert torch.equal(ends[-1].pop(), unused)
    for theirs, ours in zip(*ends, strict=True):
        # The iteration is rounded to bf16, and products of many matrices may round otherwise than those of one.
        assert (theirs - ours).abs().max() < 0.1 * 0.03


def test_muon_learns_all_directions_of_a_matrix_equally_fast_and_resumes(tmp_path: Path) -> None:
    loop = replace(LOOP, optim=replace(LOOP.optim, optimizer="muon", lr=1e-3))

    def trained(name: str, loop: LoopConfig, **options: Any) -> Wide:
        torch.manual_seed(0)
        model = Wide()
        train(model, Line(), collate, loop, tmp_path / name, run_config={}, description="test", **options)
        return model

    whole = trained("whole", loop)
    trained("parts", replace(loop, stop_after=2))
    assert torch.equal(weights(whole), weights(trained("parts", loop, resume=True)))

    model = WithTable()
    optimizer = build_optimizer(model, loop.optim)
    set_learning_rate(optimizer, 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    changes = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    directions = torch.linalg.svdvals(changes["net.1.weight"]) / 0.02
    # Five steps of Newton and Schulz bring singular values near one, not to it.
    assert directions[:-4].min() > 0.5
    assert directions.max() < 1.5
    # A first step of AdamW is the learning rate, whatever the gradient; embeddings are its too.
    for name in ("net.0.weight", "net.1.bias", "table.weight"):
        assert changes[name].abs().numpy() == pytest.approx(1e-3, rel=1e-2), name


def test_gradient_checkpointing_asks_the_model(tmp_path: Path) -> None:
    class Checkpointed(Slope):
        asked = 0

        def checkpoint_activations(self) -> None:
            self.asked += 1

    loop = replace(LOOP, gradient_checkpointing=True, steps=1)
    model = Checkpointed()
    train(model, Line(), collate, loop, tmp_path, run_config={}, description="test")
    assert model.asked == 1
    with pytest.raises(ValueError, match="--gradient-checkpointing: Slope cannot do it"):
        run(tmp_path / "run", loop)


@pytest.mark.parametrize("num", [1, 2, 3, 1000, 1024, 1025])
def test_an_order_that_is_not_stored_is_a_permutation(num: int) -> None:
    epochs = [Scattered(num, np.random.default_rng([0, epoch])) for epoch in (0, 1)]
    orders = [[epoch[place] for place in range(num)] for epoch in epochs]
    assert all(sorted(order) == list(range(num)) for order in orders)
    if num >= 1000:
        assert orders[0] != orders[1]
        # As unlike the order of the samples, and of the other epoch, as chance allows.
        for one, other in (orders, (orders[0], range(num))):
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
            assert sum(np.diff(orders[0]) == 1) < 10


def test_a_large_dataset_is_drawn_without_its_order_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapa.engine.batches.LARGE", 99)
    draws = [draw.sample for batch in StepSampler(100, 10, seed=0, first_step=0, last_step=20) for draw in batch]
    assert sorted(draws[:100]) == sorted(draws[100:]) == list(range(100))
    assert draws[:100] != draws[100:]
    later = [draw.sample for batch in StepSampler(100, 10, seed=0, first_step=13, last_step=20) for draw in batch]
    assert later == draws[130:]


def test_sampler_draws_each_sample_once_an_epoch_and_shares_it_between_processes() -> None:
    whole = [draw for batch in StepSampler(10, 4, seed=0, first_step=0, last_step=5) for draw in batch]
    assert sorted(draw.sample for draw in whole[:10]) == list(range(10))
    assert [draw.number for draw in whole] == list(range(20))
    shares = [
        list(StepSampler(10, 4, seed=0, first_step=0, last_step=5, rank=rank, world=2, accumulate=2)) for rank in (0, 1)
    ]
    assert sorted(draw for share in shares for batch in share for draw in batch) == sorted(whole)
    late = [draw for batch in StepSampler(10, 4, seed=0, first_step=3, last_step=5) for draw in batch]
    assert late == whole[12:]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="use a multiple of 3"):
        StepSampler(10, 4, seed=0, first_step=0, last_step=1, world=3)


def test_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10)
    assert learning_rate(config, 0, 100) == pytest.approx(0.1)
    assert learning_rate(config, 9, 100) == pytest.approx(1.0)
    assert learning_rate(config, 55, 100) == pytest.approx(0.55)
    assert learning_rate(config, 100, 100) == pytest.approx(0.1)
    assert learning_rate(replace(config, schedule="constant"), 99, 100) == 1.0


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", "cpu:0:0", ""])
def test_unknown_device(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown device '{name}'"):
        pick_device(name)


SCRIPT = """
import sys
from pathlib import Path
from dataclasses import replace
sys.path.insert(0, {tests!r})
import time
import torch
import test_engine as t
class Slow(t.Slope):
    def forward(self, batch):
        time.sleep({pause})
        return super().forward(batch)
torch.manual_seed(0)
model = Slow()
model.net[1].p = {dropout}
out = Path({out!r}); out.mkdir(exist_ok=True)
loop = replace(t.LOOP, steps={steps}, save_every_steps={save_every})
t.train(model, t.Line(), t.collate, loop, out, run_config={{"a": 1}}, description="test", resume=True)
torch.save(t.weights(model), out / "weights.pt")
"""


def script(tmp_path: Path, name: str, steps: int, pause: float = 0.0, dropout: float = 0.5, save_every: int = 1) -> str:
    return textwrap.dedent(SCRIPT).format(
        tests=str(Path(__file__).parent), out=str(tmp_path / name), steps=steps, pause=pause, dropout=dropout,
        save_every=save_every,
    )  # fmt: skip


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    metrics = out / "training" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        os.sched_yield()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill -9", "TERM", "INT"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, number: int) -> None:
    """A signal that can be caught leaves a checkpoint, without waiting for the next one that is due."""
    subprocess.run([sys.executable, "-c", script(tmp_path, "whole", 12)], check=True)
    save_every = 1 if number == signal.SIGKILL else 1000
    process = subprocess.Popen([sys.executable, "-c", script(tmp_path, "killed", 12, pause=0.2, save_every=save_every)])
    wait_for_step(tmp_path / "killed", 3, process)
    process.send_signal(number)
    assert process.wait() != 0
    assert (tmp_path / "killed" / "training" / "checkpoint.pt").exists()
    assert not (tmp_path / "killed" / "weights.pt").exists()
    subprocess.run([sys.executable, "-c", script(tmp_path, "killed", 12)], check=True)
    whole, resumed = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "killed"))
    assert torch.equal(whole, resumed)


def weights_of(tmp_path: Path, name: str, world: int, code: str) -> torch.Tensor:
    """Runs the script in `world` processes and returns the weights it ends with, if it ends."""
    (tmp_path / f"{name}.py").write_text(code)
    torchrun(tmp_path / f"{name}.py", processes=world)
    return torch.load(tmp_path / name / "weights.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one, two = (
        weights_of(tmp_path, name, world, script(tmp_path, name, 4, dropout=0.0))
        for name, world in (("one", 1), ("two", 2))
    )
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_two_processes_resume_each_with_its_own_noise(tmp_path: Path) -> None:
    whole = weights_of(tmp_path, "whole", 2, script(tmp_path, "whole", 4))
    stopped = script(tmp_path, "parts", 4).replace("steps=4", "steps=4, stop_after=2")
    weights_of(tmp_path, "parts", 2, stopped)
    resumed = weights_of(tmp_path, "parts", 2, script(tmp_path, "parts", 4))
    assert torch.equal(whole, resumed)


def test_a_training_draws_its_curves_and_plot_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        run(tmp_path / name)
        assert Image.open(tmp_path / name / "training" / "curves.png").width > 100
    runs = [str(tmp_path / "one"), str(tmp_path / "two" / "training")]
    for options, status, shown in (
        (runs, 0, "training curves"),
        (runs, 2, "both.png: is there already; --overwrite to replace it"),
        ([*runs, "--overwrite"], 0, "training curves"),
        ([*runs, "--out", str(tmp_path / "a.jpg")], 2, "must end in .png"),
        ([str(tmp_path)], 2, "no training run"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["plot", *options, *([] if "--out" in options else ["--out", str(tmp_path / "both.png")])])
        assert ended.value.code in (status, None if status == 0 else status)
        assert shown in capsys.readouterr().err
    assert Image.open(tmp_path / "both.png").width > 100


def test_figures_that_never_change_are_not_drawn() -> None:
    rows = [{"step": step, "loss": 1 / step, "lr": 0.1, "eval/mse": step, "eval/mse_copy": 3.0} for step in (1, 2, 3)]
    assert panels({"a": rows, "b": rows[:1]}) == {
        "training loss": {"a": [(1, 1.0), (2, 0.5), (3, 1 / 3)], "b": [(1, 1.0)]},
        "validation: mse": {"a": [(1, 1), (2, 2), (3, 3)], "b": [(1, 1)]},
        "validation: mse copy": {"a": [(1, 3.0), (2, 3.0), (3, 3.0)], "b": [(1, 3.0)]},
    }
    assert list(panels({"a": rows})) == ["training loss", "validation: mse"]
    assert panels({"a": []}) == {}


@pytest.mark.parametrize("value", ["x", None, [1], True])
def test_figures_are_numbers(value: object, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"held_out_loss": value, "torch": "2.13", "mse": 0.5}))
    assert read_figures(path, "mse", mse=float)["mse"] == 0.5
    with pytest.raises(UserError, match=r"metrics\.json: 'held_out_loss' is .*, expected a number"):
        read_figures(path, "held_out_")
    with pytest.raises(UserError, match=r"metrics\.json: mse_copy is missing"):
        read_figures(path, "mse", mse_copy=float)
