"""Checks that clients which people run are served unchanged: `make check-clients`, each in an environment of its own.

    .venv/bin/python benchmarks/check_clients.py FOLDER openpi=PYTHON openvla=PYTHON lapa=PYTHON

openpi   openpi-client 0.1.2 of PyPI, as openpi's examples for LIBERO, DROID and ALOHA use it
openvla  requests and json_numpy of PyPI, as OpenVLA's README uses them, in both forms
lapa     lapa-client, built from packages/lapa-client

Policies of those robots are trained for a few steps on made-up data, served by `lapa serve` with a key, and must return
what `Policy.infer` returns for the same observation. A client asks for a restart of the server by printing RESTART.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, SIDE, CHUNK = "put the cup on the plate", 224, 10


@dataclass(frozen=True)
class Robot:
    """What the clients of a robot send: keys of images by camera, keys of the state by width; action dimensions."""

    images: dict[str, str]
    state: dict[str, int]
    action_dim: int
    channels_first: bool = False


ROBOTS = {
    "libero": Robot(
        {"observation/image": "front", "observation/wrist_image": "wrist"}, {"observation/state": 8}, action_dim=7
    ),
    "droid": Robot(
        {"observation/exterior_image_1_left": "exterior", "observation/wrist_image_left": "wrist"},
        {"observation/joint_position": 7, "observation/gripper_position": 1},
        action_dim=8,
    ),
    "aloha": Robot(
        {f"images/{camera}": camera for camera in ("cam_high", "cam_left_wrist", "cam_right_wrist")},
        {"state": 14},
        action_dim=14,
        channels_first=True,
    ),
    "bridge": Robot({"image": "image_0"}, {}, action_dim=7),
}
# The robots whose policy each client is checked with.
CLIENTS = {"openpi": ("libero", "droid", "aloha"), "openvla": ("bridge",), "lapa": ("libero", "aloha")}


def made_up(robot: Robot) -> dict[str, np.ndarray]:
    """Returns images [H, W, 3] and states of one observation, by the keys of the robot's clients."""
    rng = np.random.default_rng(7)
    images = {key: rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for key in robot.images}
    return {**images, **{key: rng.normal(size=width).astype(np.float32) for key, width in robot.state.items()}}


def sent(robot: Robot) -> dict[str, Any]:
    """Returns the observation as the robot's clients send it."""
    values: dict[str, Any] = made_up(robot)
    if robot.channels_first:
        values |= {key: np.ascontiguousarray(values[key].transpose(2, 0, 1)) for key in robot.images}
        values["images"] = {key.removeprefix("images/"): values.pop(key) for key in robot.images}
    return {**values, "prompt": PROMPT}


def check(what: str, holds: bool) -> None:
    """Raises SystemExit where a check fails."""
    if not holds:
        raise SystemExit(f"FAILED {what}")
    print(f"ok {what}")


def raised(call: Callable[[], Any]) -> str:
    """Returns class and message of the exception that a call raises; nothing where it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def restart() -> None:
    """Has the server stopped and started again on the same port."""
    print("RESTART", flush=True)
    sys.stdin.readline()


def openpi(port: int, key: str, name: str, expected_KA: np.ndarray) -> None:
    from importlib.metadata import version

    from openpi_client.action_chunk_broker import ActionChunkBroker
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    what = f"openpi-client {version('openpi-client')}, {name}:"
    observation = sent(ROBOTS[name])
    client = WebsocketClientPolicy("127.0.0.1", port, api_key=key)
    check(f"{what} metadata", client.get_server_metadata()["chunk"] == CHUNK)
    reply = client.infer(observation)
    check(f"{what} a chunk of {expected_KA.shape}", reply["actions"].shape == expected_KA.shape)
    check(f"{what} the actions of Policy.infer", np.allclose(reply["actions"], expected_KA, atol=1e-5))
    check(f"{what} server_timing", reply["server_timing"]["infer_ms"] > 0)
    broker = ActionChunkBroker(client, action_horizon=5)
    steps = [broker.infer(observation)["actions"] for _ in range(5)]
    check(f"{what} its chunk broker's five steps", np.allclose(np.stack(steps), expected_KA[:5], atol=1e-5))
    check(f"{what} a reset", client.infer({"reset": True}).get("reset") is True)
    line = raised(lambda: client.infer({"prompt": PROMPT}))
    check(f"{what} an error of one line without a traceback", "no image" in line and "Traceback" not in line)
    check(f"{what} the connection lives on", client.infer(observation)["actions"].shape == expected_KA.shape)
    for wrong in ("wrong", None):
        line = raised(lambda wrong=wrong: WebsocketClientPolicy("127.0.0.1", port, api_key=wrong))
        check(f"{what} {'a wrong' if wrong else 'no'} key is refused", "401" in line)
    restart()
    check(f"{what} the old connection ends", raised(lambda: client.infer(observation)).startswith("ConnectionClosed"))
    client = WebsocketClientPolicy("127.0.0.1", port, api_key=key)
    again = client.infer(observation)["actions"]
    check(f"{what} the same after a restart of the server", np.allclose(again, expected_KA, atol=1e-5))


def openvla(port: int, key: str, name: str, expected_KA: np.ndarray) -> None:
    from importlib.metadata import version

    import json_numpy
    import requests

    json_numpy.patch()
    url, headers = f"http://127.0.0.1:{port}/act", {"Authorization": f"Bearer {key}"}
    what = f"requests {version('requests')}, json_numpy {version('json-numpy')}, {name}:"
    plain = {"image": made_up(ROBOTS[name])["image"], "instruction": PROMPT}

    def post(payload: dict[str, Any], **options: Any) -> Any:
        return requests.post(url, json=payload, **{"headers": headers, "timeout": 30, **options})

    for label, payload in (("plain", plain), ("with unnorm_key", {**plain, "unnorm_key": "bridge"})):
        action_A = post(payload).json()
        check(f"{what} {label}: one action", action_A.shape == expected_KA[0].shape)
        check(f"{what} {label}: the first of Policy.infer", np.allclose(action_A, expected_KA[0], atol=1e-5))
    reply = post({"encoded": json.dumps(plain)}).json()
    check(f"{what} double-encoded: text back", isinstance(reply, str))
    check(f"{what} double-encoded: the same action", np.allclose(json_numpy.loads(reply), expected_KA[0], atol=1e-5))
    for label, payload in (
        ("an unknown unnorm_key", {**plain, "unnorm_key": "bridge_orig"}),
        ("no image", {"instruction": PROMPT}),
    ):
        response = post(payload)
        one_line = response.status_code == 400 and len(response.text.strip().splitlines()) == 1
        check(f"{what} {label}: HTTP 400 and one line", one_line)
    check(f"{what} a wrong key is refused", post(plain, headers={"Authorization": "Bearer wrong"}).status_code == 401)
    restart()
    check(f"{what} the same after a restart of the server", np.allclose(post(plain).json(), expected_KA[0], atol=1e-5))


def lapa(port: int, key: str, name: str, expected_KA: np.ndarray) -> None:
    from importlib.metadata import version

    from lapa_client import PolicyClient, ServerError

    what = f"lapa-client {version('lapa-client')}, {name}:"
    check(f"{what} without torch", "torch" not in sys.modules and "lapa" not in sys.modules)
    observation, url = sent(ROBOTS[name]), f"ws://127.0.0.1:{port}"
    with PolicyClient(url, api_key=key, reconnect_for=120) as client:
        check(f"{what} metadata", client.metadata["chunk"] == CHUNK and client.metadata["fps"] == 10)
        check(f"{what} the actions of Policy.infer", np.allclose(client.infer(observation), expected_KA, atol=1e-5))
        check(f"{what} server_timing", client.server_timing["infer_ms"] > 0)
        client.reset()
        line = raised(lambda: client.infer({"prompt": PROMPT}))
        check(f"{what} an error of one line", line.startswith(ServerError.__name__) and "no image" in line)
        restart()
        again = client.infer(observation)
        check(f"{what} goes on after a restart of the server", np.allclose(again, expected_KA, atol=1e-5))
    line = raised(lambda: PolicyClient(url, api_key="wrong"))
    check(f"{what} a wrong key is refused at once", line.startswith(ServerError.__name__) and "key" in line)


def make_policy(folder: Path, name: str) -> np.ndarray:
    """Trains a policy for a few steps on made-up data, and returns its actions for the made-up observation."""
    import lapa

    robot, rng, length = ROBOTS[name], np.random.default_rng(0), 24
    width = sum(robot.state.values())
    writer = lapa.DatasetWriter(
        folder / name,
        fps=10,
        cameras=dict.fromkeys(robot.images.values(), (64, 64)),
        action_names=[f"a{number}" for number in range(robot.action_dim)],
        state_names=[f"s{number}" for number in range(width)] if width else None,
    )
    for number in range(3):
        frames = {camera: rng.integers(0, 256, (length, 64, 64, 3), dtype=np.uint8) for camera in robot.images.values()}
        actions_TA = rng.normal(size=(length, robot.action_dim)).astype(np.float32)
        states = {"states": rng.normal(size=(length, width)).astype(np.float32)} if width else {}
        writer.add_episode(frames, PROMPT, actions=actions_TA, source=f"made up {number}", **states)
    writer.finish()
    command = [_lapa(), "policy", "finetune", "--preset", "debug", "--from-scratch", "--steps", "2", "--device", "cpu"]
    command += ["--data", f"{name}={folder / name}", "--cameras", *robot.images.values(), "--head", "chunk"]
    command += ["--chunk", str(CHUNK), *(["--state"] if width else []), "--out", str(folder / f"{name}-policy")]
    trained = subprocess.run(command, capture_output=True, text=True)
    if trained.returncode:
        raise SystemExit(f"FAILED {name}: {trained.stderr}")
    policy = lapa.Policy.from_pretrained(folder / f"{name}-policy", device="cpu")
    values = made_up(robot)
    observation: dict[str, Any] = {camera: values[key] for key, camera in robot.images.items()}
    if width:
        observation["state"] = np.concatenate([values[key] for key in robot.state])
    observation["instruction"] = PROMPT
    expected_KA = policy.infer(observation)
    # Otherwise a client that mixes up its keys would go unnoticed.
    for key, value in observation.items():
        changed = value[::-1] if isinstance(value, str) else np.roll(value, value.size // 2)
        other_KA = policy.infer({**observation, key: changed})
        check(f"{name}: actions depend on {key}", not np.allclose(other_KA, expected_KA, atol=1e-4))
    return expected_KA


def free_port() -> int:
    """Returns a free port below those that connections of other programs get, which may take one during a restart."""
    for port in random.sample(range(16_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise SystemExit("FAILED: no free port was found")


def start_server(folder: Path, name: str, port: int, key_file: Path) -> subprocess.Popen[bytes]:
    """Starts `lapa serve` and waits until it answers."""
    command = [_lapa(), "serve", str(folder / f"{name}-policy"), "--map", name, "--port", str(port)]
    command += ["--api-key-file", str(key_file), "--device", "cpu"]
    with (folder / f"{name}.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as response:
                if response.read() == b"OK":
                    return server
        except OSError:
            time.sleep(0.2)
    stop_server(server)
    raise SystemExit(f"FAILED {name}: the server did not start; see {log.name}")


def stop_server(server: subprocess.Popen[bytes]) -> int:
    """Ends a server as a service manager does, and returns its exit status."""
    server.send_signal(signal.SIGTERM)
    return server.wait(60)


def run_client(client: str, python: str, folder: Path, name: str, expected_KA: np.ndarray) -> None:
    """Serves a policy, runs a client in its own environment, and restarts the server when the client asks for it."""
    key_file = folder / "key.txt"
    expected = folder / f"{name}.npy"
    np.save(expected, expected_KA)
    port = free_port()
    server = start_server(folder, name, port, key_file)
    try:
        command = [python, "-u", __file__, "as", client, str(port), str(key_file), name, str(expected)]
        # The client's environment is its own: nothing of this one is on its path.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            for line in process.stdout:
                if line.strip() != "RESTART":
                    print(line, end="", flush=True)
                    continue
                status = stop_server(server)
                check(f"{client}, {name}: the server ends on SIGTERM", status == 0)
                server = start_server(folder, name, port, key_file)
                process.stdin.write("\n")
                process.stdin.flush()
        if process.returncode:
            raise SystemExit(f"FAILED {client}, {name}")
    finally:
        if server.poll() is None:
            stop_server(server)
    log = (folder / f"{name}.log").read_text()
    check(f"{client}, {name}: no key in the log", key_file.read_text().strip() not in log)
    check(f"{client}, {name}: no traceback in the log", "Traceback" not in log)


def main(folder: Path, pythons: dict[str, str]) -> None:
    """Makes the policies and runs the clients."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    key_file = folder / "key.txt"
    key_file.touch(mode=0o600)
    key_file.write_text(secrets.token_hex(32) + "\n")
    expected = {name: make_policy(folder, name) for name in ROBOTS if any(name in CLIENTS[key] for key in pythons)}
    for client, python in pythons.items():
        for name in CLIENTS[client]:
            run_client(client, python, folder, name, expected[name])
    print(f"the check passed with {', '.join(pythons)}")


def _lapa() -> str:
    return str(Path(sys.executable).parent / "lapa")


AS: dict[str, Callable[[int, str, str, np.ndarray], None]] = {"openpi": openpi, "openvla": openvla, "lapa": lapa}

if __name__ == "__main__":
    if len(sys.argv) == 7 and sys.argv[1] == "as":
        client, port, key_file, name, expected = sys.argv[2:]
        AS[client](int(port), Path(key_file).read_text().strip(), name, np.load(expected))
    elif len(sys.argv) > 2 and all(argument.partition("=")[0] in AS for argument in sys.argv[2:]):
        main(Path(sys.argv[1]), dict(argument.split("=", 1) for argument in sys.argv[2:]))
    else:
        raise SystemExit(__doc__)
