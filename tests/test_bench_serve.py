"""The benchmark of serving: its tables, and what it reports as missed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="needs lapa-vla[serve]")

import bench_serve

LOAD = bench_serve.Load([5.0] * 500, 2.0)


@pytest.mark.parametrize(("memory", "grows"), [((400, 401, 402), False), ((400, 401, 420), True)])
def test_memory_that_grows_is_reported(monkeypatch: pytest.MonkeyPatch, memory: tuple[int, ...], grows: bool) -> None:
    left = list(memory)

    class Server:
        @property
        def mebibytes(self) -> float:
            return left.pop(0)

    monkeypatch.setattr(bench_serve, "loaded", lambda *arguments, **options: LOAD)
    missed = bench_serve.soak(bench_serve.BenchConfig(requests=1000), Server(), None, [])
    assert missed == (["the server has 19.0 MiB more after another 500 requests; 8 are allowed"] if grows else [])


@pytest.mark.parametrize("factor", [1.2, 1.8])
def test_batching_that_brings_too_little_is_reported(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    rates = {"one by one": 100.0, "batched": 100.0 * factor}

    def loaded(server: SimpleNamespace, *arguments: object, **options: object) -> bench_serve.Load:
        return bench_serve.Load([5.0] * int(rates[server.name]), 1.0)

    monkeypatch.setattr(bench_serve, "loaded", loaded)
    servers = {name: SimpleNamespace(name=name) for name in rates}
    missed = bench_serve.measure_throughput(bench_serve.BenchConfig(), servers, None, [])
    line = "batching brings 1.20 times the requests/s with 16 clients; the aim is 1.5"
    assert missed == ([] if factor > 1.5 else [line])


@pytest.mark.slow
def test_it_runs_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    config = bench_serve.BenchConfig(
        size="debug", image_size=32, clients=(1, 2), rounds=1, seconds=0.2, round_trips=5, requests=40, growth=1e6
    )
    bench_serve.main(config)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert sum(row.split("|")[2].strip() in ("one by one", "batched") for row in rows) == 4
    assert rows[-1].startswith("| 40 |")
