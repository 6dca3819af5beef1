"""Memory is estimated before it is taken, and compared with the available memory of the machine."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lapa.engine import memory
from lapa.engine.loop import train
from lapa.engine.memory import GIB, available_bytes, built, explained_out_of_memory, require_memory, training_bytes
from lapa.errors import UserError
from test_engine import LOOP, Line, Slope, collate

CPU = torch.device("cpu")
BILLION = 1_000_000_000


def test_processes_of_one_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    assert available_bytes(CPU) == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(CPU) == 2 * GIB


def test_training_bytes_of_the_recipes() -> None:
    full = training_bytes(7 * BILLION, 7 * BILLION)
    assert full == 7 * BILLION * (4 + 4 + 8)
    assert training_bytes(7 * BILLION, 7 * BILLION, autocast=True) == full + 7 * BILLION * 2
    assert training_bytes(7 * BILLION, 7 * BILLION, shards=8, autocast=True) == full / 8
    assert training_bytes(7 * BILLION, 7 * BILLION, ema=True) == full + 7 * BILLION * 4
    eight = training_bytes(7 * BILLION, 7 * BILLION, "bf16", "adamw8bit")
    assert eight == pytest.approx(7 * BILLION * (2 + 2 + 2), rel=0.01)
    # LoRA: frozen weights in bf16, few others in fp32.
    assert training_bytes(7 * BILLION, 10**7, "bf16") == 14 * BILLION + 10**7 * 6


def test_what_does_not_fit_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: GIB)
    require_memory(GIB, CPU, "loading it", ["a smaller model"])
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * GIB)
    with pytest.raises(
        ValueError, match=r"loading it needs 3\.5 GiB of memory, and cpu has 2\.0 GiB free; try a, b or c"
    ):
        require_memory(7 * GIB // 2, CPU, "loading it", ["a", "b", "c"])


def test_training_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 49 * 12 - 1)
    with pytest.raises(
        ValueError, match=r"training the 49 weights of the slope .*--optimizer adamw8bit.*--weights bf16"
    ):
        train(Slope(), Line(), collate, LOOP, tmp_path, run_config={}, description="slope")
    assert not (tmp_path / "training").exists()
    # Gradients and moments; the weights themselves are on the CPU already.
    monkeypatch.setattr(memory, "available_bytes", lambda device: 49 * 12)
    train(Slope(), Line(), collate, replace(LOOP, steps=1), tmp_path, run_config={}, description="slope")


def test_a_gpu_that_runs_out_says_what_helps() -> None:
    with (
        pytest.raises(ValueError, match=r"ran out \(Tried to allocate 2 GiB\); try --gradient-checkpointing, a"),
        explained_out_of_memory(["--gradient-checkpointing", "a smaller model"]),
    ):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB. GPU 0 has a total capacity")


def test_a_new_model_is_planned_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=r"a model of 10,000,000,100,000 new weights needs .* GiB of memory.*smaller"):
        built(lambda: nn.Linear(10**8, 10**5))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(0)
    model = built(lambda: nn.Linear(3, 4))
    torch.manual_seed(0)
    assert torch.equal(model.weight, nn.Linear(3, 4).weight) and not model.weight.is_meta
    # What is there already takes no more.
    monkeypatch.setattr(memory, "available_bytes", lambda device: 4)
    assert built(lambda: nn.Sequential(model))[0] is model
