"""Checks examples/vla_eval_server.py with vla-eval's own commands: `make check-vla-eval`.

    .venv-lerobot/bin/python benchmarks/check_vla_eval.py FOLDER

None of vla-eval's benchmarks runs without a simulator of its own, so the benchmark is the made-up world of squares, as
a class of vla-eval's. A policy is trained until it acts; the server serves it in a process of its own, and `vla-eval
run` measures it over the websocket, one client and two at once. The first action must be that of `Policy.infer`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec

from lapa import Policy, envs
from lapa.sources.synthetic import DIRECTIONS

SIZE, MAX_STEPS, EPISODES = 32, 40, 4
CAMERA, LEAST_SUCCESS, STARTED = "overview", 0.5, 120
ROOT, BIN = Path(__file__).parent.parent, Path(sys.executable).parent


class Squares(StepBenchmark):
    """Eight directions. It writes the first observation and the action for it into `record`."""

    def __init__(self, record: str, send_state: bool = False) -> None:
        super().__init__()
        self.record, self.send_state = Path(record), send_state

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": name, "suite": "squares"} for name in DIRECTIONS]

    def reset(self, task: dict[str, Any]) -> Any:
        self.square = envs.make("synthetic", task["name"], size=SIZE)
        self.square.reset(envs.episode_seed(0, "evaluation", task["name"], task.get("episode_idx", 0)))
        return self.square.observe()

    def step(self, action: dict[str, Any]) -> StepResult:
        action_A = np.asarray(action["actions"])
        if not self.record.exists():
            np.savez(self.record, **self.sent, action=action_A)
        solved = self.square.step(action_A)
        return StepResult(self.square.observe(), float(solved), solved, {})

    def make_obs(self, raw_obs: Any, task: dict[str, Any]) -> dict[str, Any]:
        (image,) = raw_obs.images.values()
        self.sent = {"image": image, "state": raw_obs.state, "text": raw_obs.instruction}
        state = {"states": raw_obs.state} if self.send_state else {}
        return {"images": {CAMERA: image}, "task_description": raw_obs.instruction, **state}

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": step_result.done}

    def get_metadata(self) -> dict[str, Any]:
        return {"max_steps": MAX_STEPS}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"actions": RAW}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return {CAMERA: IMAGE_RGB, "language": LANGUAGE, "state": RAW}


def main(folder: Path) -> None:
    """Runs the check. Raises SystemExit where it fails."""
    print(f"vla-eval {version('vla-eval')}, lapa {version('lapa-vla')}, torch {version('torch')}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run("lapa", "data", "synthetic", "--actions", "--episodes", 32, "--size", SIZE, "--out", folder / "data")
    options = ["--preset", "debug", "--head", "chunk", "--chunk", 4, "--state", "--device", "cpu", "--steps", 300]
    options += ["--batch-size", 32, "--data", folder / "data", "--out", folder / "policy"]
    run("lapa", "policy", "finetune", "--from-scratch", *options)
    entry = {"benchmark": "check_vla_eval:Squares", "episodes_per_task": EPISODES}
    entry["params"] = {"record": str(folder / "first.npz")}
    config = folder / "squares.yaml"
    # JSON is YAML, too.
    config.write_text(json.dumps({"benchmarks": [entry], "render": "gpu"}))
    with served(folder) as url:
        rate = measured(config, url, folder / "one")
        first = np.load(folder / "first.npz")
        policy = Policy.from_pretrained(folder / "policy", device="cpu")
        seen = {"front": first["image"], "instruction": str(first["text"]), "state": first["state"]}
        equal = np.array_equal(policy.infer(seen)[0], first["action"])
        require(equal, f"first action {first['action']} equals that of Policy.infer")
        require(rate >= LEAST_SUCCESS, f"vla-eval: success of {rate:.0%}, at least {LEAST_SUCCESS:.0%} wanted")
        halves = [
            [*command(config, url, folder / f"shard{shard}"), f"--shard-id={shard}", "--num-shards=2"]
            for shard in range(2)
        ]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda words: run(*words), halves))
        print("ok two clients at once were served")
    print("the server passed")


def measured(config: Path, url: str, out: Path) -> float:
    """The success rate that `vla-eval run` reports."""
    run(*command(config, url, out))
    run("vla-eval", "export", *sorted(out.glob("*.sqlite")), "--output-dir", out)
    (aggregate,) = (json.loads(path.read_text()) for path in out.rglob("*.json") if "tasks" in path.read_text())
    return float(aggregate["mean_success"])


def command(config: Path, url: str, out: Path) -> list[object]:
    return ["vla-eval", "run", "-c", config, "--no-docker", "--server-url", url, "--output-dir", out]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server in a process of its own, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, ROOT / "examples/vla_eval_server.py", "--address", f"127.0.0.1:{port}"]
    words += ["--args.policy", folder / "policy", "--args.cameras", json.dumps({"front": CAMERA}), "--args.device=cpu"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        for _ in range(STARTED):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").read()
                break
            except OSError:
                require(server.poll() is None, "", (folder / "server.log").read_text())
                time.sleep(1)
        yield f"ws://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def run(*words: object) -> None:
    """Runs a command of this environment. Raises SystemExit with its output where it fails."""
    first, *rest = map(str, words)
    done = subprocess.run([BIN / first, *rest], env=environment(), capture_output=True, text=True)
    require(not done.returncode, "", f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}


def require(fine: bool, what: str, failure: str = "") -> None:
    """Prints what was found, if anything. Raises SystemExit where it is not fine."""
    if not fine:
        raise SystemExit(f"FAILED {failure or what}")
    if what:
        print(f"ok {what}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
