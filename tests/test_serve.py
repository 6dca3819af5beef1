"""A served policy: what its clients get, what they are refused, and that one cannot spoil it for another."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapa import cli, web
from lapa.data.dataset import ActionSpace
from lapa.errors import UserError
from lapa.policy.actions import ActionBins, KeyedSpace, Statistics
from lapa.policy.backbones import create_backbone
from lapa.policy.config import TinyConfig
from lapa.policy.execution import RecedingHorizon, TemporalEnsemble
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import Actor, Policy

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")

import uvicorn
from uvicorn.server import ServerState
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from lapa.serve.client import pack, unpack
from lapa.serve.protocols import from_json, to_json
from lapa.serve.server import read_key, running
from lapa.serve.websocket import MOST_FRAMES, BoundedWebSocket, Budget

RNG = np.random.default_rng(0)
SMALL = TinyConfig(image_size=32, vision_widths=(16, 32), width=32, layers=1, heads=2)
WORDS = "open the drawer"


def image(height: int = 48, width: int = 64) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_policy(keys: tuple[str, ...] = ("robot",), state_dim: int = 0, chunk: int = 4) -> Policy:
    """A policy with untrained weights, two cameras, and statistics of each key that differ in scale."""
    torch.manual_seed(0)
    space = ActionSpace(("lift", "gripper"), (False, True))
    raw = np.stack([np.clip(RNG.normal(size=900), -1, 1), RNG.choice([-1.0, 1.0], 900)], axis=1)
    states = ActionBins.fit(RNG.normal(size=(900, state_dim))) if state_dim else None
    statistics = {
        key: Statistics(ActionBins.fit((number + 1) * raw, binary=space.binary), states)
        for number, key in enumerate(keys)
    }
    segments = {"state": 256, "bins": 256} if state_dim else {"bins": 256}
    backbone, processor, vocabulary = create_backbone(SMALL, texts=[WORDS], num_cameras=2, segments=segments)
    config = PolicyConfig(
        vocabulary,
        ("front", "wrist"),
        SMALL,
        spaces=tuple(KeyedSpace(key, space, 5.0) for key in keys),
        action_bins=tuple(statistics[keys[0]].codec.counts_A.tolist()),
        state_bins=tuple(states.counts_A.tolist()) if states is not None else (),
        chunk=chunk,
    )
    return Policy(LatentPolicy(config, backbone).eval(), processor, statistics).to("cpu")


class Scripted(Actor):
    """Predicts the image's first value, and counts calls; fails on the value 13, waits for `open` before it answers."""

    cameras = ("front",)
    chunk = 3
    action_space = ActionSpace(("lift",), (False,))
    fps = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.open = threading.Event()
        self.open.set()

    def act(self, observations: Any) -> np.ndarray:
        self.batches.append(len(observations))
        self.open.wait(20)
        values = [int(each.images["front"][0, 0, 0]) for each in observations]
        if 13 in values:
            raise RuntimeError("thirteen")
        if 14 in values:
            return np.full((len(values), 3, 1), np.nan, np.float32)
        return np.array([[[value + 0.1 * step] for step in range(3)] for value in values], np.float32)


def of(value: int) -> dict[str, Any]:
    """An observation of Scripted."""
    return {"front": np.full((16, 16, 3), value, np.uint8), "prompt": WORDS}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


@pytest.fixture(scope="module")
def url(policy):
    with running(policy) as address:
        yield address


class Client:
    """openpi's client as its protocol has it, with nothing of ours but pack and unpack."""

    def __init__(self, url: str, **options: Any) -> None:
        self._open = contextlib.ExitStack()
        made = connect(url.replace("http", "ws"), compression=None, max_size=None, **options)
        self.socket = self._open.enter_context(made)
        self.metadata = unpack(self.socket.recv(20))

    def ask(self, message: Any) -> Any:
        self.socket.send(message if isinstance(message, str | bytes) else pack(message))
        reply = self.socket.recv(30)
        return reply if isinstance(reply, str) else unpack(reply)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()


def http(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """The status and the text of a response."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def as_json(observation: dict[str, Any]) -> dict[str, Any]:
    return {key: to_json(value) if isinstance(value, np.ndarray) else value for key, value in observation.items()}


def one_line(text: str) -> bool:
    return len(text.splitlines()) == 1 and "Traceback" not in text and len(text) < 1000


# What clients get.


def test_served_actions_are_those_of_infer(policy, url):
    front, wrist = image(), image(100, 40)
    expected_KA = policy.infer({"front": front, "wrist": wrist, "instruction": WORDS})
    unit = (front / np.float32(255)).astype(np.float32)
    with Client(url) as client:
        for one, other in ((front, wrist), (np.moveaxis(front, -1, 0), wrist), (unit, np.moveaxis(wrist, -1, 0))):
            message = {"front": one, "wrist": other, "prompt": WORDS}
            reply = client.ask(message)
            assert reply["actions"].dtype == np.float32
            np.testing.assert_array_equal(reply["actions"], expected_KA)
            status, text = http(f"{url}/infer", as_json(message))
            assert status == 200
            np.testing.assert_array_equal(np.array(json.loads(text)["actions"], np.float32), expected_KA)
            status, text = http(f"{url}/act", as_json(message))
            np.testing.assert_array_equal(from_json(json.loads(text)), expected_KA[0])


def test_openvlas_clients_send_one_image_and_may_encode_twice(policy, url):
    front, wrist = image(224, 224), image(64, 64)
    expected_A = policy.infer({"front": front, "wrist": wrist, "instruction": WORDS})[0]
    body = as_json({"image": front, "wrist_image": wrist, "instruction": WORDS, "unnorm_key": "robot"})
    body["wrist"] = body.pop("wrist_image")
    status, text = http(f"{url}/act", {"encoded": json.dumps(body)})
    assert status == 200 and isinstance(json.loads(text), str)
    np.testing.assert_array_equal(from_json(json.loads(json.loads(text))), expected_A)
    status, text = http(f"{url}/act", {**body, "unnorm_key": "bridge_orig"})
    assert status == 400 and "unknown unnorm_key 'bridge_orig'" in text and "robot" in text


def test_metadata_comes_first_and_describes_the_policy(policy, url):
    with Client(url) as client:
        told = client.metadata
        timing = client.ask({"front": image(), "wrist": image(), "prompt": ""})["server_timing"]
        assert "prev_total_ms" not in timing and 0 < timing["infer_ms"] <= timing["server_ms"]
        assert client.ask({"front": image(), "wrist": image()})["server_timing"]["prev_total_ms"] > 0
    assert json.loads(http(f"{url}/metadata")[1]) == told
    assert told["cameras"] == ["front", "wrist"] and told["keys"] == {"front": "front", "wrist": "wrist"}
    assert (told["chunk"], told["reply_steps"], told["action_dim"], told["fps"]) == (4, 4, 2, 5.0)
    assert told["action_names"] == ["lift", "gripper"] and told["binary"] == [False, True]
    assert told["statistics_key"] == "robot" and told["kind"] == "tiny" and told["protocol_version"] == 1


def test_the_status_shows_latencies_and_the_last_observation():
    with running(Scripted()) as url:
        assert json.loads(http(f"{url}/status")[1])["last"] is None
        with Client(url) as client:
            client.ask(of(7))
            assert "expected a binary one" in client.ask("text")
            status = json.loads(http(f"{url}/status")[1])
            assert (status["requests"], status["errors"], status["busy"], status["clients"]) == (1, 1, 0, 1)
            ((moment, total, infer, batch),) = status["latency"]
            assert abs(moment - time.time()) < 60 and total >= infer > 0 and batch == 1
            last = status["last"]
            assert last["instruction"] == WORDS and last["state"] is None
            assert last["images"]["front"].startswith("data:image/jpeg;base64,")
            np.testing.assert_allclose(last["actions"], [[7], [7.1], [7.2]], rtol=1e-5)


def test_the_page_runs_only_what_is_in_it(url):
    with urllib.request.urlopen(url) as response:
        assert response.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert http(f"{url}/healthz") == (200, "OK")
    assert http(f"{url}/nothing")[0] == 404 and http(f"{url}/act")[0] == 405
    with pytest.raises(InvalidStatus) as refused, Client(f"{url}/ws"):
        pass
    assert (refused.value.response.status_code, refused.value.response.body) == (404, b"error: the websocket is at /")


FRONT, WRIST, NUMBERS = image(), image(), RNG.normal(size=8)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (
            ("libero",),
            {"observation/image": FRONT, "observation/wrist_image": WRIST, "observation/state": NUMBERS},
        ),
        (
            ("droid",),
            {
                "observation/exterior_image_1_left": FRONT,
                "observation/wrist_image_left": WRIST,
                "observation/joint_position": NUMBERS[:7],
                "observation/gripper_position": NUMBERS[7:],
            },
        ),
        (
            ("aloha", "images/cam_left_wrist=wrist"),
            {
                "images": {
                    "cam_high": np.moveaxis(FRONT, -1, 0),
                    "cam_left_wrist": np.moveaxis(WRIST, -1, 0),
                    "cam_right_wrist": np.moveaxis(WRIST, -1, 0),
                },
                "state": NUMBERS,
            },
        ),
        (
            ("bridge", "observation/image_1=wrist"),
            {"observation/image_0": FRONT, "observation/image_1": WRIST, "observation/state": NUMBERS},
        ),
    ],
)
def test_clients_of_benchmarks_are_served_unchanged(maps, message):
    policy = make_policy(state_dim=8)
    own = {"front": FRONT, "wrist": WRIST, "state": NUMBERS, "instruction": WORDS}
    with running(policy, map=maps) as url, Client(url) as client:
        assert sorted(client.metadata["keys"].values()) == ["front", "wrist"]
        for asked in ({**message, "prompt": WORDS}, own):
            np.testing.assert_array_equal(client.ask(asked)["actions"], policy.infer(own))
        assert "shape (3,); this policy reads 8 numbers" in client.ask({**own, "state": [1, 2, 3]})
        assert "its state is not finite" in client.ask({**own, "state": [*NUMBERS[:7], np.nan]})
        assert "its state is not finite" in client.ask({**own, "state": np.array([*NUMBERS[:7], 1e300])})
        assert "no state" in client.ask({key: value for key, value in own.items() if key != "state"})


def test_a_policy_of_several_datasets_serves_each():
    policy = make_policy(("small", "large"))
    message = {"front": image(), "wrist": image(), "instruction": WORDS}
    expected = {key: actor.infer(message) for key, actor in policy.by_statistics().items()}
    assert not np.array_equal(expected["small"], expected["large"])
    with running(policy) as url, Client(url) as client:
        for key, actions_KA in expected.items():
            np.testing.assert_array_equal(client.ask({**message, "unnorm_key": key})["actions"], actions_KA)
            _, text = http(f"{url}/act", as_json({**message, "unnorm_key": key}))
            np.testing.assert_array_equal(from_json(json.loads(text)), actions_KA[0])
        assert "give unnorm_key: small, large" in client.ask(message)
        assert "did you mean 'small'" in client.ask({**message, "unnorm_key": "smal"})
        assert "unknown unnorm_key" in client.ask({**message, "unnorm_key": [1]})
    with running(policy, statistics_key="large") as url, Client(url) as client:
        np.testing.assert_array_equal(client.ask(message)["actions"], expected["large"])
    with pytest.raises(UserError, match="unknown --statistics-key 'x'"), running(policy, statistics_key="x"):
        pass


# Sessions.


@pytest.mark.parametrize("options", [{"ensemble": 0.1}, {"ensemble": -0.5, "steps_per_call": 2}])
def test_each_connection_has_an_ensemble_of_its_own(policy, options):
    def plan():
        return TemporalEnsemble(options["ensemble"], options.get("steps_per_call", 1), (False, True))

    def message():
        return {"front": image(), "wrist": image(), "prompt": WORDS}

    with running(policy, **options) as url, Client(url) as one, Client(url) as other:
        assert one.metadata["reply"] == "action" and one.metadata["reply_steps"] == 1
        literal = {one: plan(), other: plan()}
        for step in range(9):
            # They are not in step, and one begins anew.
            client = one if step % 3 else other
            if step == 5:
                assert one.ask({"reset": True}) == {"reset": True}
                literal[one].reset()
            asked = message()
            expected_A = literal[client].next(lambda asked=asked: policy.infer({**as_own(asked)}))
            np.testing.assert_array_equal(client.ask(asked)["actions"], expected_A[None])
        with Client(url) as again:
            asked = message()
            np.testing.assert_array_equal(again.ask(asked)["actions"], policy.infer(as_own(asked))[:1])
            # A reset may come with the first observation of an episode, and REST has no state.
            again.ask(message())
            np.testing.assert_array_equal(
                again.ask({**asked, "reset": True})["actions"], policy.infer(as_own(asked))[:1]
            )
            assert len(json.loads(http(f"{url}/infer", as_json(asked))[1])["actions"]) == policy.chunk


def as_own(message: dict[str, Any]) -> dict[str, Any]:
    return {"instruction" if key == "prompt" else key: value for key, value in message.items()}


def test_single_actions_ask_the_policy_once_for_a_chunk():
    actor = Scripted()
    with running(actor, reply="action", steps_per_call=2) as url, Client(url) as client:
        before, plan = len(actor.batches), RecedingHorizon(2)
        for value in (1, 2, 3, 4):
            chunk_KA = np.array([[value], [value + 0.1], [value + 0.2]], np.float32)
            np.testing.assert_allclose(client.ask(of(value))["actions"], plan.next(lambda c=chunk_KA: c)[None])
        assert len(actor.batches) - before == 2
    with running(actor, steps_per_call=2) as url, Client(url) as client:
        assert client.ask(of(1))["actions"].shape == (2, 1) and client.metadata["reply_steps"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_call": 4}, "--steps-per-call 4 is more than the policy's chunk of 3"),
        ({"steps_per_call": 3, "ensemble": 0.1}, "nothing to average"),
        ({"ensemble": float("nan")}, "--ensemble must be a finite number"),
        ({"ensemble": 0.1, "reply": "chunk"}, "leave out --reply chunk"),
        ({"map": ("libro",)}, "unknown --map 'libro'"),
        ({"statistics_key": "robot"}, "has no statistics of datasets; leave out --statistics-key"),
        ({"max_queue": 0}, "--max-queue must be at least 1"),
        ({"port": 70_000}, "--port must be at most 65535"),
        ({"host": "no.such.host.invalid"}, "no such address"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message), running(Scripted(), **options):
        pass


# Batches and the queue.


def test_concurrent_requests_are_one_batch_and_equal_those_alone(policy):
    messages = [{"front": image(), "wrist": image(), "prompt": WORDS} for _ in range(6)]
    sizes = []
    act = policy.act

    def counted(observations):
        sizes.append(len(observations))
        return act(observations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "act", counted)
        with running(policy, batch_window_ms=500, max_batch=4) as url, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(url)) for _ in messages]
            with ThreadPoolExecutor(len(messages)) as threads:
                for _ in range(3):
                    replies = list(threads.map(lambda pair: pair[0].ask(pair[1]), zip(clients, messages, strict=True)))
    assert 1 < max(sizes) <= 4
    for message, reply in zip(messages, replies, strict=True):
        np.testing.assert_allclose(reply["actions"], policy.infer(as_own(message)), atol=1e-5)


def test_one_client_alone_does_not_wait_for_others():
    """A connection that is idle does not count."""
    with running(Scripted(), batch_window_ms=60_000) as url, Client(url), Client(url) as client:
        begun = time.monotonic()
        for _ in range(3):
            client.ask(of(1))
        assert time.monotonic() - begun < 30
    with running(Scripted(), batch_window_ms=60_000) as url:
        begun = time.monotonic()
        assert http(f"{url}/infer", as_json(of(1)))[0] == 200
        assert time.monotonic() - begun < 30


def test_an_observation_on_which_the_policy_fails_does_not_spoil_the_others(capfd):
    actor = Scripted()
    with running(actor, batch_window_ms=500) as url, contextlib.ExitStack() as stack:
        values = (1, 13, 2, 14)
        clients = [stack.enter_context(Client(url)) for _ in values]
        with ThreadPoolExecutor(len(values)) as threads:
            for _ in range(2):
                replies = list(threads.map(lambda pair: pair[0].ask(of(pair[1])), zip(clients, values, strict=True)))
        assert max(actor.batches) > 1
        assert replies[0]["actions"][0, 0] == 1 and replies[2]["actions"][0, 0] == 2
        assert replies[1] == "error: the server failed (RuntimeError); its log has more"
        assert "actions that are not finite" in replies[3]
        assert clients[1].ask(of(3))["actions"][0, 0] == 3, "the connection lives on"
        assert http(f"{url}/infer", as_json(of(13))) == (500, replies[1])
    assert 'RuntimeError("thirteen")' in (log := capfd.readouterr().err) and "Traceback" in log


def test_a_full_queue_answers_busy():
    actor = Scripted()
    with running(actor, max_queue=1, max_batch=1) as url, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(url)) for _ in range(3)]
        actor.open.clear()
        with ThreadPoolExecutor(2) as threads:
            # One is being answered, one waits.
            first = threads.submit(clients[0].ask, of(1))
            wait_until(lambda: len(actor.batches) > 1)
            second = threads.submit(clients[1].ask, of(2))
            wait_until(lambda: json.loads(http(f"{url}/status")[1])["queue"] == 1)
            assert clients[2].ask(of(3)).startswith("busy: 1 requests wait already")
            assert http(f"{url}/act", as_json(of(3))) == (503, "busy: 1 requests wait already; try again")
            actor.open.set()
            assert first.result(20)["actions"][0, 0] == 1 and second.result(20)["actions"][0, 0] == 2
        assert clients[2].ask(of(3))["actions"][0, 0] == 3
        assert json.loads(http(f"{url}/status")[1])["busy"] == 2


def wait_until(true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_a_client_that_leaves_with_a_request_open_is_forgotten():
    actor = Scripted()
    with running(actor) as url, Client(url) as other:
        actor.open.clear()
        with Client(url) as gone:
            gone.socket.send(pack(of(1)))
            wait_until(lambda: len(actor.batches) > 1)
            gone.socket.socket.shutdown(socket.SHUT_RDWR)
        actor.open.set()
        assert other.ask(of(2))["actions"][0, 0] == 2
        wait_until(lambda: json.loads(http(f"{url}/status")[1])["clients"] == 1)


# What is refused.

HUGE = {b"__ndarray__": True, b"data": b"", b"dtype": "|u1", b"shape": (10_000, 10_000, 3)}
OBJECTS = {b"__ndarray__": True, b"data": b"x" * 8, b"dtype": "|O", b"shape": (1,)}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"", "malformed message"),
        (b"\xc1", "malformed message"),
        (b"\x92\x01\x02", "expected a map, got list"),
        ("text", "expected a binary one"),
        ({}, "no image of the camera front; came nothing; wanted front, instruction"),
        ({**of(1), "front": HUGE}, "does not have 0 bytes"),
        ({**of(1), "front": OBJECTS}, "an array of dtype '|O'"),
        ({**of(1), "front": np.zeros((1, 1, 3), np.uint8)}, "height and width must be 8 to 64"),
        ({**of(1), "front": np.zeros((100, 65, 3), np.uint8)}, "height and width must be 8 to 64 (--max-image)"),
        ({**of(1), "front": np.zeros((3, 8, 65), np.uint8)}, "height and width must be 8 to 64 (--max-image)"),
        ({**of(1), "front": np.zeros((16, 16), np.uint8)}, "expected an RGB image"),
        ({**of(1), "front": np.zeros((16, 16, 4), np.uint8)}, "expected an RGB image"),
        ({**of(1), "front": np.full((16, 16, 3), np.nan)}, "floats must lie in [0, 1], got nan"),
        ({**of(1), "front": np.full((16, 16, 3), 200.0)}, "floats must lie in [0, 1], got 200"),
        ({**of(1), "front": "a.png"}, "camera front: got str, expected an array"),
        ({**of(1), "prompt": "x" * 1_000_000}, "an instruction of 1000000 characters; at most 2000"),
        ({**of(1), "prompt": b"open"}, "its instruction is b'open'; give text"),
        ({**of(1), "prompt": 3}, "its instruction is 3; give text"),
        ({**of(1), "unnorm_key": "robot"}, "has no statistics of datasets; leave out unnorm_key"),
        ({**of(1), "wrist": 1}, "unknown key 'wrist'; came front, prompt, wrist"),
        ({**of(1), "state": ["a"]}, "expected numbers"),
        ({**of(1), "reset": np.zeros(2)}, "reset is array([0., 0.]); expected true or false"),
        ({"reset": "false"}, "reset is 'false'; expected true or false"),
    ],
)
def test_a_bad_message_gets_one_line_and_the_connection_lives_on(bounded, message, told):
    with Client(bounded) as client:
        reply = client.ask(message)
        assert reply.startswith("error: ") and told in reply and one_line(reply), reply
        assert client.ask(of(5))["actions"][0, 0] == 5


@pytest.fixture(scope="module")
def bounded():
    with running(Scripted(), max_image=64, max_message_mib=2) as address:
        yield address


@pytest.mark.parametrize(
    ("body", "headers", "status", "told"),
    [
        (b"{", {}, 400, "not valid JSON"),
        (b"[]", {}, 400, "expected a JSON object"),
        ({"instruction": "up"}, {}, 400, "no image of the camera front; came instruction"),
        ({"image": {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}}, {}, 400, "an array of dtype '|O'"),
        (as_json(of(1)), {"Content-Encoding": "gzip"}, 400, "compressed bodies are not read"),
        (b"x" * 3_000_000, {}, 413, "a body of 3000000 bytes; at most 2097152 (--max-message-mib)"),
    ],
)
def test_a_bad_body_gets_a_status_and_one_line(bounded, body, headers, status, told):
    for path in ("/act", "/infer"):
        found, text = http(bounded + path, body, headers)
        assert found == status and told in text and one_line(text), text
    assert http(f"{bounded}/act", as_json(of(5)))[0] == 200


def test_a_message_above_the_bound_gets_one_line_and_the_connection_lives_on(bounded):
    part = b"x" * 1_000_000
    with Client(bounded) as client:
        for message in (part * 3, "x" * 3_000_000, [part] * 3, [b"", part * 3], [part * 3, b"", part]):
            client.socket.send(message)
            assert client.socket.recv(20) == "error: a message of more than 2097152 bytes (--max-message-mib)"
            assert client.ask(of(5))["actions"][0, 0] == 5
        client.socket.send([b""] * (MOST_FRAMES + 1))
        assert client.socket.recv(20) == f"error: a message of more than {MOST_FRAMES} frames"
        packed = pack(of(6))
        client.socket.send([packed[at : at + 1] for at in range(len(packed))])
        assert unpack(client.socket.recv(20))["actions"][0, 0] == 6


def test_a_frame_is_the_same_in_whatever_pieces_it_arrives(bounded):
    with socket.create_connection(("127.0.0.1", int(bounded.rpartition(":")[2]))) as raw:
        raw.settimeout(20)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = raw.makefile("rb")
        raw.sendall(UPGRADE)
        while stream.readline().strip():
            pass
        assert unpack(read_frame(stream))["cameras"] == ["front"]
        messages = [pack(of(3)), b"x" * 100, b"x" * 2_100_000, pack(of(4))]
        sent = b"".join(frame_of(message) for message in messages)
        cuts = [*range(40), *range(40, len(sent), 50_001), len(sent)]
        for begin, end in itertools.pairwise(cuts):
            raw.sendall(sent[begin:end])
        raw.sendall(b"\x89\x80\x00\x00\x00\x00")
        assert unpack(read_frame(stream))["actions"][0, 0] == 3
        assert b"malformed message" in read_frame(stream)
        assert b"more than 2097152 bytes" in read_frame(stream)
        assert unpack(read_frame(stream))["actions"][0, 0] == 4
        raw.sendall(b"\x89\xff" + (2**40).to_bytes(8) + bytes(4))
        assert b"reserved bits" in read_frame(stream), "a ping of a terabyte ends its connection at once"


def frame_of(message: bytes) -> bytes:
    """A masked frame whose mask is zero (RFC 6455, 5.2), with the shortest form of its length."""
    for bound, mark, form in ((126, None, ""), (2**16, 126, "!H"), (2**64, 127, "!Q")):
        if len(message) < bound:
            length = bytes([0x80 | (len(message) if mark is None else mark)])
            return b"\x82" + length + (struct.pack(form, len(message)) if form else b"") + bytes(4) + message
    raise AssertionError


def read_frame(stream: Any) -> bytes:
    """The content of the next frame of a server that is no pong."""
    first, length = stream.read(2)
    if length > 125:
        length = int.from_bytes(stream.read(2 if length == 126 else 8))
    content = stream.read(length)
    return read_frame(stream) if first & 0x0F == 0xA else content


class Transport:
    is_closing = staticmethod(lambda: False)
    pause_reading = resume_reading = write = close = staticmethod(lambda *given: None)
    get_extra_info = staticmethod(lambda name: None)


def connected(app: Any, state: ServerState, budget: Budget) -> BoundedWebSocket:
    """A connection that asks for a websocket, without a socket; messages have at most 10 bytes."""
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
    config.load()
    protocol = BoundedWebSocket(config=config, server_state=state, app_state={}, most=10, budget=budget)
    protocol.connection_made(Transport())
    protocol.data_received(UPGRADE)
    return protocol


def test_a_message_of_a_client_that_is_gone_is_held_until_it_is_answered():
    async def held() -> list[int]:
        received, answered, state, budget = asyncio.Event(), asyncio.Event(), ServerState(), Budget(2**20)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            await receive()
            received.set()
            await answered.wait()

        protocol = connected(app, state, budget)
        while not protocol.handshake_complete:
            await asyncio.sleep(0)
        protocol.data_received(frame_of(b"12345") + b"\x02\x83" + bytes(7))
        await received.wait()
        found = [budget.used]
        protocol.connection_lost(None)
        found.append(budget.used)
        answered.set()
        await asyncio.gather(*state.tasks)
        return [*found, budget.used]

    # Five bytes are answered, and three are of a message that never ends.
    assert asyncio.run(held()) == [8, 5, 0]


def test_frames_of_a_refused_message_are_not_kept():
    async def of_many_frames() -> tuple[int, Any]:
        budget = Budget(2**20)
        protocol = connected(Transport, ServerState(), budget)
        await protocol.receive()
        protocol.handshake_complete = True
        part, empty = b"\x02\x8a" + bytes(14), b"\x00\x80" + bytes(4)
        protocol.data_received(part + b"\x00\x8b" + bytes(15) + 10_000 * empty)
        kept, used = len(protocol.frames), budget.used
        protocol.data_received(b"\x80\x80" + bytes(4))
        assert used == 0
        return kept, (await protocol.receive())["refused"]

    kept, refused = asyncio.run(of_many_frames())
    assert kept <= 1 and "a message of more than 10 bytes" in str(refused)


def test_of_a_body_that_declares_too_much_nothing_is_kept(monkeypatch):
    def noting(request: Any, most: int) -> Any:
        kept.append(most)
        return read_body(request, most)

    kept: list[int] = []
    read_body = web.read_body
    monkeypatch.setattr(web, "read_body", noting)
    with running(Scripted(), max_image=64, max_message_mib=1) as url:
        assert http(f"{url}/infer", b"x" * (2**20 + 1))[0] == 413
        assert http(f"{url}/infer", b"x" * 1000)[0] == 400
    assert kept == [0, 1000], "what is not taken from the bound of all messages is not held"


def test_messages_of_all_clients_have_one_bound(monkeypatch):
    monkeypatch.setattr("lapa.serve.server.MOST_HELD", 0)
    actor = Scripted()
    with running(actor, max_image=600, max_message_mib=1) as url, Client(url) as first, Client(url) as second:
        actor.open.clear()
        large = {"front": np.full((512, 512, 3), 5, np.uint8), "prompt": WORDS}
        first.socket.send(pack(large))
        wait_until(lambda: len(actor.batches) > 1)
        line = f"busy: messages of {len(pack(large))} bytes are answered already; try again"
        assert second.ask(large) == line
        body = json.dumps({**as_json(of(1)), "more": "x" * 500_000}).encode()
        assert http(f"{url}/infer", body) == (503, line)
        with Client(url) as gone:
            gone.socket.send(pack(of(2)))
            wait_until(lambda: json.loads(http(f"{url}/status")[1])["queue"] == 1)
            gone.socket.socket.shutdown(socket.SHUT_RDWR)
        actor.open.set()
        assert unpack(first.socket.recv(20))["actions"][0, 0] == 5
        assert json.loads(http(f"{url}/status")[1])["busy"] == 2
        for _ in range(2):
            assert second.ask(large)["actions"][0, 0] == 5
            assert "unknown key 'more'" in http(f"{url}/infer", body)[1]


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: \xff\r\nAuthorization: \xff\r\n\r\n",
        b"POST /act HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /act HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\ncut",
        UPGRADE + b"\x82\x05plain",
        UPGRADE + b"\xf2\x80\x00\x00\x00\x00",
        UPGRADE + b"\x81\x82\x00\x00\x00\x00\xff\xfe",
        UPGRADE + b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
        UPGRADE + b"\x80\x80\x00\x00\x00\x00",
    ],
)
def test_bytes_that_are_no_protocol_end_only_their_own_connection(bounded, capfd, sent):
    with Client(bounded) as other:
        with socket.create_connection(("127.0.0.1", int(bounded.rpartition(":")[2]))) as raw:
            raw.settimeout(20)
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while part := raw.recv(65536):
                    answer += part
        assert b"Traceback" not in answer
        assert other.ask(of(5))["actions"][0, 0] == 5
    assert "Traceback" not in capfd.readouterr().err


def test_compression_is_not_agreed_to(bounded):
    with connect(bounded.replace("http", "ws"), compression="deflate") as client:
        assert client.protocol.extensions == []


def test_pages_of_other_sites_may_not_ask(bounded):
    own = bounded.partition("://")[2]
    for headers, told in (
        ({"Origin": "https://evil.example"}, "pages of another site (https://evil.example) may not ask"),
        ({"Origin": "null"}, "pages of another site"),
        ({"Host": "evil.example"}, "is not this machine"),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, "is not this machine"),
        ({"Host": "["}, "is not this machine"),
    ):
        status, text = http(f"{bounded}/act", as_json(of(1)), headers)
        assert status == 403 and told in text and one_line(text)
        assert http(f"{bounded}/status", None, headers)[0] == 403
    with pytest.raises(InvalidStatus) as refused, connect(bounded.replace("http", "ws"), origin="https://evil.example"):
        pass
    assert refused.value.response.status_code == 403
    assert http(f"{bounded}/act", as_json(of(1)), {"Origin": f"http://{own}"})[0] == 200
    assert http(bounded.replace("127.0.0.1", "localhost") + "/healthz")[0] == 200


def test_with_a_key_nothing_but_the_page_answers_without_it(capfd):
    key = "3f9a" * 8
    with running(Scripted(), api_key=key) as url:
        body = as_json(of(1))
        for headers in ({}, {"Authorization": key}, {"Authorization": f"Api-Key {key[:-1]}"}, {"Authorization": "ü"}):
            for path in ("/act", "/infer", "/status", "/metadata", "/nothing"):
                found, text = http(url + path, None if path in ("/status", "/metadata") else body, headers)
                assert found == 401 and one_line(text) and key not in text
        for scheme in ("Api-Key", "Bearer", "api-key"):
            assert http(f"{url}/act", body, {"Authorization": f"{scheme} {key}"})[0] == 200
        assert http(f"{url}/healthz") == (200, "OK") and http(url)[0] == 200
        with pytest.raises(InvalidStatus) as refused, Client(url, additional_headers={"Authorization": "Api-Key no"}):
            pass
        assert refused.value.response.status_code == 401
        with Client(url, additional_headers={"Authorization": f"Api-Key {key}"}) as client:
            assert client.ask(of(1))["actions"][0, 0] == 1
            client.ask({**of(1), "unnorm_key": "\x1b[2Jred"})
    log = capfd.readouterr().err
    assert "connected" in log and key not in log and "\x1b" not in log


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (b"secret\n", 0o644, r"others can read the key; run: chmod 600 .*key"),
        (b"secret\n", 0o640, "others can read the key"),
        (b" \n", 0o600, "empty; write a key into it"),
        (b"two words", 0o600, "one line of ASCII without blanks"),
        (b"a\nb", 0o600, "one line of ASCII without blanks"),
        (b"x" * 5000, 0o600, "one line of ASCII without blanks"),
        ("schlüssel".encode(), 0o600, "one line of ASCII without blanks"),
    ],
)
def test_a_key_file_that_is_not_safe_is_refused(tmp_path, content, mode, told):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(UserError, match=told):
        read_key(path)


def test_a_key_is_the_line_of_its_file(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"secret\n")
    path.chmod(0o600)
    assert read_key(path) == b"secret"
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        read_key(path / "none")


# The command.


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", *arguments])
    told = capsys.readouterr().err
    assert exit_.value.code == 2
    return told.splitlines()[-1]


def test_mistakes_are_one_line(capsys, tmp_path):
    policy = make_policy()
    policy.save_pretrained(tmp_path / "acting", run={})
    pretrained = PolicyConfig(policy.config.vocabulary, ("front", "wrist"), SMALL)
    Policy(LatentPolicy(pretrained, policy.model.backbone), policy.processor).save_pretrained(
        tmp_path / "pretrained", run={}
    )
    assert "no such folder; make a policy" in failure(capsys, str(tmp_path / "none"))
    assert "only pretrained" in failure(capsys, str(tmp_path / "pretrained"), "--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told = failure(capsys, str(tmp_path / "acting"), "--port", port)
        assert f"--port {port}: cannot listen there (Address already in use); give another --port" in told
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o644)
    told = failure(capsys, str(tmp_path / "acting"), "--api-key-file", str(tmp_path / "key"))
    assert "chmod 600" in told and "secret" not in told
    told = failure(capsys, str(tmp_path / "acting"), "--port", "0", "--map", "libro")
    assert "unknown --map 'libro'; did you mean 'libero'" in told


def test_a_map_may_be_given_several_times():
    verb = cli.find_verb(["serve"])
    assert verb is not None
    for options in (["--map", "libero", "--map", "qpos=state"], ["--map=libero", "--map=qpos=state"]):
        assert cli.parse(verb, ["POLICY", *options, "--port", "0"]).map == ("libero", "qpos=state")


@pytest.mark.parametrize("missing", ["uvicorn", "starlette.applications", "websockets.sync.client", "msgpack"])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, missing):
    for name in ("server", "service", "websocket", "batching", "protocols", "client"):
        monkeypatch.delitem(sys.modules, f"lapa.serve.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "lapa.web", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"lapa serve needs {missing}; install it: pip install 'lapa-vla\[serve\]'"):
        importlib.import_module("lapa.serve.server")


# A server as a process; its policy answers an image that is not black only once a signal has come.
COMMAND = """
import threading
import numpy as np
from lapa import cli, web
from lapa.data.dataset import ActionSpace
from lapa.policy.runtime import Actor
from lapa.serve import server
stopping, say = threading.Event(), web.say
def noticed(text):
    say(text)
    if text.startswith("stopping"):
        stopping.set()
class Slow(Actor):
    cameras, chunk, fps, action_space = ("front",), 1, None, ActionSpace(("lift",), (False,))
    def act(self, observations):
        values = [int(each.images["front"][0, 0, 0]) for each in observations]
        if any(values):
            say("acting")
            assert stopping.wait(60)
        return np.array(values, np.float32)[:, None, None]
web.say = noticed
server.load_actors = lambda folder, device: {{"": Slow()}}
cli.main(["serve", {folder!r}, "--port", "0", *{options}])
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_server_once_running_requests_are_answered(tmp_path, number, status):
    options = ["--host", "0.0.0.0"] if number == signal.SIGTERM else []
    code = COMMAND.format(folder=str(tmp_path), options=options)
    environment = {**os.environ, "COLUMNS": "500", "FORCE_COLOR": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    lines: list[str] = []

    def read_until(word):
        for line in process.stderr:
            lines.append(line)
            if word in line:
                return

    try:
        read_until("curl")
        address = re.search(r"http://[\d.]+:\d+", "".join(lines))
        assert address, "".join(lines)
        with Client(address[0]) as client, ThreadPoolExecutor(1) as threads:
            reply = threads.submit(client.ask, of(9))
            read_until("acting")
            process.send_signal(number)
            assert reply.result(30)["actions"][0, 0] == 9
            with pytest.raises(ConnectionClosed):
                client.socket.recv(20)
        read_until("a line that never comes")
        assert process.wait(30) == status
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    log = "".join(lines)
    assert "served 1 requests" in log and "expects: front, instruction" in log and "Traceback" not in log
    warned = [line for line in lines if "whoever reaches 0.0.0.0" in line]
    assert bool(warned) == bool(options)
    assert not warned or "\x1b[1;33m" in warned[0], "in bold"


# Fuzz: no message ends a connection or the server, or shows a traceback.

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
NAMES = st.sampled_from(
    ["front", "observation", "images", "state", "prompt", "reset", "unnorm_key", "__numpy__", "dtype", "shape"]
)
MARKS = st.sampled_from([b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"])
ARRAYS = st.fixed_dictionaries(
    {
        b"__ndarray__": st.just(True) | SCALARS,
        b"data": st.binary() | SCALARS,
        b"dtype": st.sampled_from(["|u1", "<f4", "<f8", "|O", "|V4", "<U3", "<c8", "u1,f4"]) | SCALARS,
        b"shape": st.lists(st.integers(-2, 2**33), max_size=4) | SCALARS,
    }
)
MESSAGES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(NAMES | MARKS | st.text() | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(), inner, max_size=5),
    max_leaves=12,
)


def packed(value: Any) -> bytes:
    import msgpack

    return msgpack.packb(value, unicode_errors="surrogatepass")


FRAMES = st.binary() | st.text() | MESSAGES.map(packed)
FRAMES |= st.dictionaries(NAMES | st.text(), MESSAGES, max_size=5).map(packed)
FRAMES |= st.tuples(st.sampled_from([packed({"front": 1}), pack(of(1))]), st.integers(0, 400), st.binary()).map(
    lambda cut: cut[0][: cut[1]] + cut[2]
)
BODIES = st.binary() | JSONS.map(lambda value: json.dumps(value).encode())
BODIES |= JSONS.map(lambda value: json.dumps({"encoded": json.dumps(value)}).encode())


def fuzz(examples: int) -> None:
    """As many frames and bodies, then a good request of each kind."""
    bounds = settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    with running(Scripted()) as url, Client(url) as client:

        @bounds
        @given(FRAMES)
        def frames(frame):
            try:
                sent = frame.encode("utf-8", "replace").decode() if isinstance(frame, str) else frame
                reply = client.ask(sent)
            except ConnectionClosed as closed:
                raise AssertionError(f"{frame!r} closed the connection: {closed}") from None
            assert isinstance(reply, dict) or (one_line(reply) and reply.startswith("error: ")), reply
            assert not isinstance(reply, str) or "the server failed" not in reply, frame

        @bounds
        @given(st.sampled_from(["/act", "/infer"]), BODIES)
        def bodies(path, body):
            status, text = http(url + path, body)
            assert status in (200, 400) and (status == 200 or one_line(text)), (status, text)

        frames()
        bodies()
        assert client.ask(of(5))["actions"][0, 0] == 5
        assert http(f"{url}/act", as_json(of(5)))[0] == 200
        status = json.loads(http(f"{url}/status")[1])
        assert status["clients"] == 1 and status["queue"] == 0


def test_no_message_ends_a_connection_or_shows_a_traceback():
    fuzz(150)


@pytest.mark.slow
def test_two_thousand_messages():
    fuzz(2000)
