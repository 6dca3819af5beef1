"""The tables of docs/scale.md: computed from the results in the repository, and by hand."""

from __future__ import annotations

import re
from pathlib import Path

import bench_scale
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/scale_2-core-cpu_2026-11-30.md"


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    text = (ROOT / "docs/scale.md").read_text()
    assert bench_scale.table(bench_scale.Table(RESULTS)) in text
    for made in (bench_scale.memory_table, bench_scale.ray_table, bench_scale.store_table):
        assert made(RESULTS) in text


def test_the_table_by_hand(tmp_path: Path) -> None:
    figures = {"convert_cpu_s_per_video_s": 2.0, "bytes_per_video_s": 50_000, "plan_1000_cpu_s": 1.0}
    # Of half of the clips.
    figures |= {"journal_1000_cpu_s": 0.5, "tables_1000_cpu_s": 0.5}
    rows = "".join(f"| {name} | {value} |\n" for name, value in figures.items())
    (tmp_path / "results.md").write_text(f"| figure | value |\n|---|---|\n{rows}")
    config = bench_scale.Table(tmp_path / "results.md", base=(1e9, 1e9, 1000), gpu_flops=1e15)
    text = bench_scale.table(config)
    first = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines()}
    # 1,000 hours: 3.6 million seconds, 360,000 episodes of 10 s, 7.2 million pairs of 2 x 1e9 x 1000 operations.
    assert first["episodes"] == "360,000"
    assert first["convert, CPU hours"] == "2,000"
    assert first["storage, TB"] == "0.18"
    assert float(first["label, `base`, GPU hours"]) == pytest.approx(7.2e6 * 2e12 / 1e15 / 3600, rel=0.05)
    assert float(first["write the metadata, CPU hours of one process"]) == pytest.approx(0.2)


def test_slopes_by_hand(tmp_path: Path) -> None:
    figures: dict[str, float] = {}
    for part in ("plan", "journal", "tables", "merge", "open"):
        for clips in (1000, 3000):
            figures |= {f"{part}_{clips}_cpu_s": clips / 1000, f"{part}_{clips}_peak_mib": 100 + clips / 1000}
    for clips in (1000, 3000):
        figures |= {f"workers_{clips}_{name}_mib": 7 for name in ("rss", "uss_after_few", "uss_after_all")}
    rows = "".join(f"| {name} | {value} |\n" for name, value in figures.items())
    (tmp_path / "results.md").write_text(f"| figure | value |\n|---|---|\n{rows}")
    lines = bench_scale.memory_table(tmp_path / "results.md").splitlines()
    assert lines[0] == "| part | 1,000 clips | 3,000 clips | each clip more |"
    # A millisecond and a thousandth of a MiB for each clip, and twice as much where it was half of them.
    assert lines[2].endswith("| 100 MiB, 1.0 CPU s | 100 MiB, 3.0 CPU s | 1,000 B, 1,000 µs |")
    assert lines[3].endswith("| 2,100 B, 2,000 µs |")
    assert lines[-1].endswith("| 7.0 MiB | 7.0 MiB | |")


def test_two_digits_are_kept() -> None:
    assert [bench_scale.rounded(number) for number in (0, 0.01234, 1.26, 12.6, 126.0, 1.26e6)] == [
        "0", "0.012", "1.3", "13", "130", "1,300,000",
    ]  # fmt: skip


@pytest.mark.slow
def test_small_runs_have_all_figures(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out.md"
    bench_scale.simulate(bench_scale.Simulate(out, clips=(400, 800), frames=20, samples=512))
    bench_scale.measure(bench_scale.Measure(out, clips=2, seconds=3.0, files=3, pairs=32))
    names = {re.sub(r"_\d+_(?!ms)", "_N_", name) for name in bench_scale.read_figures(RESULTS)}
    assert {re.sub(r"_\d+_(?!ms)", "_N_", name) for name in bench_scale.read_figures(out)} >= names
    assert re.search(r"\| storage, TB \| [\d.,]+ \|", bench_scale.table(bench_scale.Table(out)))
    for made in (bench_scale.memory_table, bench_scale.ray_table, bench_scale.store_table):
        assert made(out).startswith("| ")
