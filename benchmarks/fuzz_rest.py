"""Fuzzes the REST part of `lapa serve` with schemathesis, from a description of what it takes (`make fuzz-rest`).

    python benchmarks/fuzz_rest.py --schemathesis .venv-schemathesis/bin/schemathesis --examples 1000

schemathesis is a program of an environment of its own, since it shares packages with this project in other versions.
It sends bodies that the description allows and bodies that it does not, and fails where an answer is no documented
status, has another content type, or is the server's failure (5xx). A good request must be answered before and after,
with the same actions. The frames of the websocket are fuzzed by the tests (`make test-slow`).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_policy
import numpy as np
import psutil
import torch
import tyro

from lapa.serve.protocols import from_json, to_json
from lapa.serve.server import running

NUMPY = {
    "type": "object",
    "required": ["__numpy__", "dtype", "shape"],
    "properties": {
        "__numpy__": {"type": "string"},
        "dtype": {"type": "string", "enum": ["|u1", "<f4", "<f8", "|O", "<U4", "|V8"]},
        "shape": {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
    },
}
OBSERVATION = {
    "type": "object",
    "properties": {
        "image": NUMPY,
        "instruction": {"type": "string"},
        "unnorm_key": {"type": "string"},
        "state": {"type": "array", "items": {"type": "number"}},
        "encoded": {"type": "string"},
    },
}


@dataclass(frozen=True)
class FuzzConfig:
    """Fuzz a server's REST part."""

    schemathesis: Path
    """The program."""
    examples: int = 1000
    """Bodies of each address."""
    seed: int = 0


def description() -> dict[str, Any]:
    """OpenAPI of the server."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    answers = {"200": "the actions", "400": "a bad observation", "413": "too large", "503": "busy"}
    acting = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": OBSERVATION}}},
        "responses": {
            status: {"description": words, "content": {"application/json": {}} if status == "200" else text}
            for status, words in answers.items()
        },
    }
    shown = {"responses": {"200": {"description": "as JSON", "content": {"application/json": {}}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lapa serve", "version": "1"},
        "paths": {
            "/act": {"post": acting},
            "/infer": {"post": acting},
            "/metadata": {"get": shown},
            "/status": {"get": shown},
            "/healthz": {"get": {"responses": {"200": {"description": "OK", "content": text}}}},
        },
    }


def act(url: str, image: np.ndarray) -> np.ndarray:
    """The action for a good request."""
    body = json.dumps({"image": to_json(image), "instruction": "open the drawer"}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/act", body), timeout=60) as response:
        return from_json(json.load(response))


def main(config: FuzzConfig) -> None:
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    process = psutil.Process()
    sizes = bench_policy.BenchConfig(action_dim=7, chunk=8, bins_chunk=8)
    policy = bench_policy.build("debug", sizes, torch.device("cpu"), torch.float32).policies["chunk"]
    with running(policy) as url, tempfile.TemporaryDirectory() as folder:
        before_A, memory = act(url, image), process.memory_info().rss
        path = Path(folder) / "openapi.json"
        path.write_text(json.dumps(description()))
        checks = "not_a_server_error,status_code_conformance,content_type_conformance"
        words = ["run", str(path), "--url", url, "--checks", checks, "--max-examples", str(config.examples)]
        words += [
            "--seed",
            str(config.seed),
            "--mode",
            "all",
            "--suppress-health-check",
            "all",
            "--continue-on-failure",
        ]
        done = subprocess.run([config.schemathesis.resolve(), *words], cwd=folder)
        assert np.array_equal(act(url, image), before_A), "the same observation has other actions"
        with urllib.request.urlopen(f"{url}/status", timeout=60) as response:
            status = json.load(response)
        grown = (process.memory_info().rss - memory) / 2**20
        print(f"{status['requests']} answered, {status['errors']} refused; the process has grown by {grown:.1f} MiB")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main(tyro.cli(FuzzConfig))
