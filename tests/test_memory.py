"""What is needed is counted before it is taken, and what there is comes from the machine and its control groups."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lapa.engine import memory
from lapa.engine.loop import train
from lapa.engine.memory import GIB, available_bytes, explained_out_of_memory, require_memory, training_bytes
from test_engine import LOOP, Line, Slope, collate

CPU = torch.device("cpu")
BILLION = 1_000_000_000


def machine(root: Path, available_gib: float, groups: dict[str, str], files: dict[str, str]) -> Path:
    """A made-up /proc and /sys/fs/cgroup."""
    lines = [f"{number}:{name}:{path}" for number, (name, path) in enumerate(groups.items())]
    files = {
        "proc/meminfo": f"MemTotal:       99999999 kB\nMemAvailable:   {int(available_gib * 2**20)} kB\n",
        "proc/self/cgroup": "\n".join(lines),
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_the_machine_says_where_no_group_limits(tmp_path: Path) -> None:
    root = machine(tmp_path, 8, {"": "/"}, {"memory.max": "max\n", "memory.current": "5\n"})
    assert available_bytes(CPU, root) == 8 * GIB


def test_the_tightest_group_counts_and_pages_of_files_are_free(tmp_path: Path) -> None:
    files = {
        "job/memory.max": f"{4 * GIB}\n",
        "job/memory.current": f"{3 * GIB}\n",
        "job/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file {GIB // 2}\n",
        "job/step/memory.max": "max\n",
        "job/step/memory.current": f"{GIB}\n",
    }
    assert available_bytes(CPU, machine(tmp_path, 8, {"": "/job/step"}, files)) == 2.5 * GIB


def test_groups_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory/box/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/box/memory.usage_in_bytes": f"{GIB}\n",
        "memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 24\ntotal_active_file 0\n",
    }
    assert available_bytes(CPU, machine(tmp_path, 8, {"cpu": "/x", "memory": "/box"}, files)) == GIB + 24


def test_processes_of_one_machine_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(CPU, machine(tmp_path, 8, {}, {})) == 2 * GIB


def test_where_nothing_is_known_nothing_is_refused(tmp_path: Path) -> None:
    require_memory(1000 * GIB, CPU, "this", ["less"], available=available_bytes(CPU, tmp_path))


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


def test_what_does_not_fit_is_refused_with_both_figures() -> None:
    require_memory(GIB, CPU, "loading it", ["a smaller model"], available=GIB)
    with pytest.raises(
        ValueError, match=r"loading it needs 3\.5 GiB of memory, and cpu has 2\.0 GiB free; try a, b or c"
    ):
        require_memory(7 * GIB // 2, CPU, "loading it", ["a", "b", "c"], available=2 * GIB)


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
