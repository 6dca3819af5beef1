"""The campaign of faults: what it takes for a fault, and a case of each group (`make faults` tries them all)."""

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import faults
import pytest
from fault_groups.processes import MEMORY, Ended, Fault, ask, lapa

LINE = "lapa: error: x.mp4: damaged; replace it\n"
CASES = (
    *("kill hide-actions 0", "alike hide-actions 0", "convert 0", "same hide-actions", "labels: manifest.json 0"),
    *("captions outside", "data_path 0", "as it should be"),
)


def ended(status: int = 2, output: str = LINE, memory: float = 0.0) -> Ended:
    return Ended(status, output, seconds=1.0, memory=memory)


def test_a_refusal_is_one_line_and_status_2():
    assert ended(output=f"left out: 1\n{LINE}").refused() == "x.mp4: damaged; replace it"
    assert ended(0, "wrote\n").refused() is None


@pytest.mark.parametrize(
    "odd",
    [
        *(ended(1), ended(-6), ended(2, "usage: lapa\n"), ended(2, LINE + "and more\n"), ended(memory=MEMORY + 1)),
        *(ended(1, "Traceback (most recent call last)\n"), ended(0, "\x1b[2J\n"), ended(0, "terminate called\n")),
    ],
)
def test_any_other_end_is_a_fault(odd):
    with pytest.raises(Fault):
        odd.refused()


def test_a_command_and_a_function_in_a_forked_process(tmp_path: Path):
    # Forked from a new interpreter, as in the campaign: other tests leave threads here, and Ray's abort a fork's exit.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(fork_and_judge, tmp_path).result()


def fork_and_judge(tmp_path: Path) -> None:
    assert "no such" in lapa("data", "info", "nowhere", folder=tmp_path).require_refused("nowhere")
    assert ask(lambda: [1, "a"], tmp_path).answer == [1, "a"]
    assert ask(lambda: bytearray(64 << 20) and 1, tmp_path).memory > 32
    with pytest.raises(Fault, match="ZeroDivisionError"):
        ask(lambda: 1 // 0, tmp_path).refused()


def test_the_campaign_runs(tmp_path: Path):
    table = tried(tmp_path, "--group", "odd", "--case", "as it should be", "tasks as plain text")
    assert table == {"odd real data": (2, 2, 0), "all": (2, 2, 0)}


@pytest.mark.slow
def test_a_case_of_each_group_holds(tmp_path: Path):
    table = tried(tmp_path, "--case", *CASES)
    assert [*table] == [*faults.GROUPS, "all"]
    assert all(tried == held > 0 == failed for tried, held, failed in table.values())


def tried(folder: Path, *options: str) -> dict[str, tuple[int, ...]]:
    """The rows of the campaign's table by their groups: tried, held, failed."""
    script = [sys.executable, faults.__file__, "--folder", str(folder), *options]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in done.stdout.splitlines() if line[:1] == "|"]
    return {name: tuple(map(int, figures)) for name, *figures in rows[2:]}
