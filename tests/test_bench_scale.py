"""The table of docs/scale.md: computed from the results in the repository, and by hand."""

from __future__ import annotations

import re
from pathlib import Path

import bench_scale
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/scale_2-core-cpu_2026-11-29.md"


def test_the_table_of_the_documentation_is_that_of_the_results() -> None:
    assert bench_scale.table(bench_scale.Table(RESULTS)) in (ROOT / "docs/scale.md").read_text()


def test_the_table_by_hand(tmp_path: Path) -> None:
    names = ["convert_cpu_s_per_video_s", "bytes_per_video_s"]
    names += ["journal_cpu_s_per_episode", "tables_cpu_s_per_episode"]
    rows = zip(names, (2.0, 50_000, 0.001, 0.001), strict=True)
    (tmp_path / "results.md").write_text(
        "| figure | value |\n|---|---|\n" + "".join(f"| {n} | {v} |\n" for n, v in rows)
    )
    config = bench_scale.Table(tmp_path / "results.md", base=(1e9, 1e9, 1000), gpu_flops=1e15)
    text = bench_scale.table(config)
    first = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines()}
    # 1,000 hours: 3.6 million seconds, 360,000 episodes of 10 s, 7.2 million pairs of 2 x 1e9 x 1000 operations.
    assert first["episodes"] == "360,000"
    assert first["convert, CPU hours"] == "2,000"
    assert first["storage, TB"] == "0.18"
    assert float(first["label, `base`, GPU hours"]) == pytest.approx(7.2e6 * 2e12 / 1e15 / 3600, rel=0.05)
    assert float(first["write the metadata, CPU hours of one process"]) == pytest.approx(0.2)


def test_two_digits_are_kept() -> None:
    assert [bench_scale.rounded(number) for number in (0, 0.01234, 1.26, 12.6, 126.0, 1.26e6)] == [
        "0", "0.012", "1.3", "13", "130", "1,300,000",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_small_measurement_has_all_figures(tmp_path: Path) -> None:
    config = bench_scale.Measure(tmp_path / "out.md", clips=2, seconds=3.0, files=3, pairs=32, episodes=20)
    bench_scale.measure(config)
    assert bench_scale.read_figures(tmp_path / "out.md").keys() >= bench_scale.read_figures(RESULTS).keys()
    assert re.search(r"\| storage, TB \| [\d.,]+ \|", bench_scale.table(bench_scale.Table(tmp_path / "out.md")))
