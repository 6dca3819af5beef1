"""Two processes with half of the model each train as one with all of it, and their checkpoint fits any number."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lapa.cli import end_process
from lapa.engine.config import LoopConfig
from lapa.engine.loop import TrainResult, train
from lapa.types import Losses, TrainableModel
from test_engine import LOOP, Line, collate, log
from torchrun import torchrun

SHARD = replace(LOOP, shard=True, save_every_steps=1)
RUNS = {
    "averaged": LOOP,
    "sharded": SHARD,
    "accumulated": replace(SHARD, accumulate=2),
    "bf16": replace(SHARD, precision="bf16"),
    "parts": replace(SHARD, stop_after=2),
}


class Block(nn.Module):
    """A frozen matrix beside trained ones, and an axis that does not divide into two."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.trained = nn.Linear(16, 17)
        self.out = nn.Linear(17, 16)
        self.register_buffer("offset", torch.ones(16))

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD + self.out(self.trained(self.frozen(x_BD + self.offset)).relu())


class Tower(TrainableModel, nn.Module):
    """Blocks between a table and a head that are one, as in language models. `held`: what it held at evaluations."""

    sharded_methods = ("predict",)
    held: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 10, bias=False)
        nn.init.normal_(self.head.weight, std=0.3)
        self.table.weight = self.head.weight

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        x_BD = self.table(batch["index"])
        for block in self.blocks:
            x_BD = block(x_BD)
        return self.head(x_BD)

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        return self.logits(batch).argmax(-1)

    def forward(self, batch: dict[str, Tensor]) -> Losses:
        loss = nn.functional.cross_entropy(self.logits(batch).float(), (batch["index"] + 1) % 10)
        return Losses(loss, {"entropy": loss.detach()})


class Spare(Tower):
    """With a weight that no step reaches, and one in another precision that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.blocks[0].frozen.to(torch.bfloat16)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().logits(batch)


def evaluate(model: nn.Module) -> dict[str, float]:
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    model.held.append(sum(part.numel() for part in parts))
    batch = {"index": torch.arange(10)}
    return {"right": float((model.predict(batch) == (batch["index"] + 1) % 10).float().mean())}


def run(out: Path, loop: LoopConfig, *, cls: type[Tower] = Tower, **options: Any) -> tuple[Tower, TrainResult]:
    torch.manual_seed(0)
    model = cls()
    cls.held.clear()
    out.mkdir(exist_ok=True, parents=True)
    options = {"run_config": {"a": 1}, "description": "tower", "evaluate": evaluate, **options}
    return model, train(model, Line(), collate, loop, out, **options)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in log(out) if "loss" in row]


def assert_same(model: nn.Module, other: nn.Module | dict[str, Tensor], **tolerance: float) -> None:
    state = other.state_dict() if isinstance(other, nn.Module) else other
    torch.testing.assert_close(model.state_dict(), state, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have trained each of RUNS, and gone on with the last."""
    out = tmp_path_factory.mktemp("two")
    torchrun(__file__, out)
    return out


def in_each_process(out: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, loop in RUNS.items():
        model, _ = run(out / name, loop)
        if rank == 0:
            torch.save(model.state_dict(), out / name / "model.pt")
    held = run(out / "sharded-again", SHARD)[0].held
    (out / f"held-{rank}.json").write_text(json.dumps(held))
    resumed, _ = run(out / "parts", SHARD, resume=True)
    on_meta = {parameter.device.type for parameter in resumed.parameters()}
    (out / f"devices-{rank}.json").write_text(json.dumps(sorted(on_meta)))
    run(out / "left", replace(SHARD, stop_after=2))
    if rank == 0:
        torch.save(resumed.state_dict(), out / "resumed.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["averaged", "sharded", "accumulated"])
def test_two_processes_have_the_losses_of_one_at_each_step(two: Path, tmp_path: Path, name: str) -> None:
    one, _ = run(tmp_path / "one", LOOP)
    assert losses(two / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert_same(one, torch.load(two / name / "model.pt"), rtol=1e-4, atol=1e-6)
    figures = [[row["eval/right"] for row in log(out) if "eval/right" in row] for out in (two / name, tmp_path / "one")]
    assert figures[0] == figures[1]


def test_bf16_trains_close_to_fp32(two: Path) -> None:
    assert losses(two / "bf16") == pytest.approx(losses(two / "sharded"), rel=0.02)
    assert losses(two / "bf16") != losses(two / "sharded")
    assert torch.load(two / "bf16" / "model.pt")["head.weight"].dtype == torch.float32


def test_each_process_holds_about_half(two: Path) -> None:
    whole = sum(parameter.numel() for parameter in Tower().parameters())
    held = [json.loads((two / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    assert len(held[0]) == len(held[1]) == 2
    for first, second in zip(*held, strict=True):
        assert first + second == whole
        assert 0.45 < first / whole < 0.55


def test_a_resume_of_two_processes_equals_going_through(two: Path) -> None:
    assert losses(two / "parts") == losses(two / "sharded")
    whole, resumed = torch.load(two / "sharded" / "model.pt"), torch.load(two / "resumed.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_only_the_main_process_ends_with_the_model(two: Path) -> None:
    assert [json.loads((two / f"devices-{rank}.json").read_text()) for rank in (0, 1)] == [["cpu"], ["meta"]]


def test_one_process_goes_on_where_two_stopped(two: Path) -> None:
    model, result = run(two / "left", SHARD, resume=True)
    assert result.finished
    assert losses(two / "left") == pytest.approx(losses(two / "sharded"), rel=1e-5)
    assert_same(model, torch.load(two / "sharded" / "model.pt"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", ["fp32", "bf16"])
@pytest.mark.parametrize("cls", [Tower, Spare])
def test_two_steps_and_a_resume_equal_four(tmp_path: Path, cls: type[Tower], kept: Any) -> None:
    loop = replace(SHARD, weights=kept)
    whole, _ = run(tmp_path / "whole", loop, cls=cls)
    run(tmp_path / "parts", replace(loop, stop_after=2), cls=cls)
    resumed, _ = run(tmp_path / "parts", loop, cls=cls, resume=True)
    assert_same(whole, resumed)
    assert [path.name for path in (tmp_path / "parts" / "training" / "checkpoint").glob("step-*")] == ["step-4"]


def test_the_gathered_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model, _ = run(tmp_path / "run", SHARD)
    plain = Tower()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    for module, like in zip(model.modules(), plain.modules(), strict=True):
        assert {name: len(value) for name, value in vars(module).items() if "hooks" in name} == {
            name: len(value) for name, value in vars(like).items() if "hooks" in name
        }
    assert model.table.weight is model.head.weight
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert "predict" not in vars(model)
    again, _ = run(tmp_path / "again", SHARD)
    assert_same(model, again)
    model(collate([Line()[(1, 0)]])).loss.backward()


def test_a_checkpoint_whose_writing_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: Any) -> None:
    run(tmp_path / "run", replace(SHARD, stop_after=2))
    monkeypatch.setattr("lapa.engine.sharding.write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        run(tmp_path / "run", SHARD, resume=True)
    monkeypatch.undo()
    _, result = run(tmp_path / "run", SHARD, resume=True)
    assert result.finished


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "sharded", replace(SHARD, stop_after=2))
    with pytest.raises(ValueError, match=r"latest\.json: was written with --shard"):
        run(tmp_path / "sharded", replace(SHARD, shard=False), resume=True)
    run(tmp_path / "whole", replace(LOOP, stop_after=2))
    with pytest.raises(ValueError, match=r"checkpoint\.pt: was written without --shard"):
        run(tmp_path / "whole", SHARD, resume=True)


def test_a_checkpoint_of_another_config_and_a_broken_one_are_refused(tmp_path: Path) -> None:
    run(tmp_path, replace(SHARD, stop_after=2))
    with pytest.raises(ValueError, match=r"written under another config \(a was 1, is 2\)"):
        run(tmp_path, SHARD, resume=True, run_config={"a": 2})
    for path in (tmp_path / "training" / "checkpoint" / "step-2").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"SHA256SUMS: damaged|its SHA-256 is not that in SHA256SUMS"):
        run(tmp_path, SHARD, resume=True)


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    class Scalar(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="cannot shard the parameter 'scale'"):
        run(tmp_path, SHARD, cls=Scalar)


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    class Broken(Tower):
        def forward(self, batch: dict[str, Tensor]) -> Losses:
            # The square root of zero is finite, its slope is not.
            return Losses((super().forward(batch).loss * 0).sqrt())

    with pytest.raises(FloatingPointError, match="the gradient norm of step 1 is nan, with the samples: point"):
        run(tmp_path, SHARD, cls=Broken)


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
    end_process(0)
