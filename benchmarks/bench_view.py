"""Measures how long `lapa view` takes to show a dataset of many episodes, in a headless Chromium.

    python benchmarks/bench_view.py [--episodes 100000] [--repeats 3]

The dataset is made up: metadata of all episodes, and the files of the first 16. Prints a Markdown table of seconds from
the start of the command, the fastest repeat of each. Needs lapa-vla[dev] and Chromium.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from playwright.sync_api import Page, sync_playwright

from lapa.sources.synthetic import write_synthetic_dataset

WHOLE, TEXTS = 16, 500


@dataclass(frozen=True)
class BenchConfig:
    """Measure the start of `lapa view`."""

    episodes: int = 100_000
    """Episodes of the dataset."""
    repeats: int = 3
    """How often each is measured."""


def main(config: BenchConfig) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium) as browser,
    ):
        root = write_many(Path(folder) / "many", config.episodes)
        runs = [measure(root, browser.new_page(), config.episodes) for _ in range(config.repeats)]
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, {config.episodes:,} episodes\n"
    )
    print("| what is there | seconds |\n|---|---|")
    for name in runs[0]:
        print(f"| {name} | {min(run[name] for run in runs):.2f} |")


def write_many(root: Path, episodes: int) -> Path:
    """Writes a dataset whose metadata lists this many episodes, in files of which the first one is there."""
    write_synthetic_dataset(root, episodes=WHOLE, actions=True)
    (root / "SHA256SUMS").unlink()
    (path,) = root.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(path)
    rows = np.arange(episodes) % WHOLE
    many = table.take(pa.array(rows))
    columns = {"episode_index": pa.array(np.arange(episodes))}
    columns["tasks"] = pa.array([[f"move the square, task {number % TEXTS}"] for number in range(episodes)])
    for name in many.column_names:
        if name.endswith("/file_index"):
            columns[name] = pa.array(many[name].to_numpy() + np.arange(episodes) // WHOLE * WHOLE)
    for name, column in columns.items():
        many = many.set_column(many.column_names.index(name), name, column)
    pq.write_table(many, path, row_group_size=10_000)
    return root


def measure(root: Path, page: Page, episodes: int) -> dict[str, float]:
    """Starts the command, opens its page, searches the list; seconds from the start of the command."""
    start, seconds = time.monotonic(), {}
    command = [sys.executable, "-m", "lapa", "view", str(root), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as server:
        try:
            assert server.stderr is not None
            url = next(word for line in server.stderr for word in line.split() if word.startswith("http://"))
            seconds["the server"] = time.monotonic() - start
            page.goto(url, wait_until="commit")
            page.wait_for_selector(".item")
            seconds["the first rows of the list"] = time.monotonic() - start
            until(page, "document.querySelector('#videos video')?.readyState >= 2")
            seconds["the first episode"] = time.monotonic() - start
            until(page, f"rows.index.length === {episodes}")
            seconds["all rows of the list"] = time.monotonic() - start
        finally:
            server.send_signal(signal.SIGTERM)
    page.close()
    return seconds


def until(page: Page, script: str) -> None:
    """Waits until an expression is true. Playwright's own way to wait evaluates texts, which the page forbids."""
    end = time.monotonic() + 60
    while not page.evaluate(script):
        assert time.monotonic() < end, page.inner_text("body")
        page.wait_for_timeout(10)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
