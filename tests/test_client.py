"""The client: messages both ways, bounds of what is unpacked, reconnecting, and that it never loads torch."""

import base64
import contextlib
import hashlib
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("websockets", reason="the client needs websockets: pip install 'lapa-vla[serve]'")

import lapa
import lapa.serve.client
from lapa.serve.client import (
    MAX_DEPTH,
    MAX_LIST,
    PolicyClient,
    ServerBusyError,
    ServerError,
    ServerLateError,
    ServerUnreachableError,
    pack,
    unpack,
)
from policy_server import FakeServer

DTYPES = ("|b1", "|u1", "<i2", ">i4", "<i8", "<f2", "<f4", ">f4", "<f8")


def array_message(data: object = b"", dtype: object = "|u1", shape: object = (0,)) -> bytes:
    fields = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    return msgpack.packb({"image": fields})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (4, 5, 3)])
def test_arrays_come_back_as_they_were(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    back = unpack(pack({"deep": {"array": [array]}}))["deep"]["array"][0]
    assert (back.shape, back.dtype) == (shape, np.dtype(dtype).newbyteorder("="))
    assert back.dtype.isnative and back.flags.writeable and np.array_equal(back, array)


def test_other_values_come_back_as_they_were() -> None:
    sent = {"text": "推 the cup", "none": None, "yes": True, "number": 3, "list": [1, 2.5, [3]], "map": {"a": b"b"}}
    assert unpack(pack(sent)) == sent
    scalars = {"f4": np.float32(0.1), "i8": np.int64(-3), "yes": np.bool_(True), "f8": np.float64(0.1)}
    back = unpack(pack(scalars))
    assert back == scalars
    assert [type(back[name]) for name in ("f4", "i8", "yes")] == [np.float32, np.int64, np.bool_]


def test_strided_arrays_and_images_of_pil_are_sent_as_arrays() -> None:
    image_HWC = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    back = unpack(pack({"chw": image_HWC.transpose(2, 0, 1), "pil": Image.fromarray(image_HWC)}))
    assert np.array_equal(back["chw"], image_HWC.transpose(2, 0, 1))
    assert np.array_equal(back["pil"], image_HWC)


@pytest.mark.parametrize(
    "value",
    [np.array([None]), np.zeros(2, "f4,f4"), np.array("text"), np.zeros(2, complex), object(), {1, 2}, 2**70],
)
def test_what_has_no_plain_form_is_not_sent(value: object) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        pack({"image": value})


REFUSED = {
    "object dtype": (array_message(b"12345678", "|O", (1,)), "dtype"),
    "void dtype": (array_message(b"1234", "|V4", (1,)), "dtype"),
    "records": (array_message(b"12345678", "f4,f4", (1,)), "dtype"),
    "text dtype": (array_message(b"1234", "<U1", (1,)), "dtype"),
    "long dtype": (array_message(b"1", "f4," * 100_000, (1,)), "dtype"),
    "dtype of bytes": (array_message(b"1", b"|u1", (1,)), "dtype"),
    "negative shape": (array_message(b"1", shape=(-1,)), "shape"),
    "two negatives": (array_message(b"1", shape=(-1, -1)), "shape"),
    "huge shape": (array_message(b"", shape=(2**62, 2**62)), "shape"),
    "huge empty shape": (array_message(b"", shape=(0, 2**30, 2**30, 2**30)), "malformed"),
    "shape of floats": (array_message(b"1", shape=(1.0,)), "shape"),
    "shape of booleans": (array_message(b"1", shape=(True,)), "shape"),
    "no shape": (array_message(b"1", shape=None), "shape"),
    "many axes": (array_message(b"1", shape=(1,) * 60), "axes"),
    "too few bytes": (array_message(b"12", "<f4", (1,)), "2 bytes"),
    "too many bytes": (array_message(b"12345", "<f4", (1,)), "5 bytes"),
    "data of numbers": (array_message([1], shape=(1,)), "expected bytes"),
    "nothing but the mark": (msgpack.packb({b"__ndarray__": True}), "dtype"),
    "scalar of objects": (msgpack.packb({b"__npgeneric__": True, b"data": 1, b"dtype": "|O"}), "dtype"),
    "scalar of text": (msgpack.packb({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}), "number"),
    "scalar not a number": (msgpack.packb({b"__npgeneric__": True, b"data": float("nan"), b"dtype": "<i4"}), "NaN"),
    "scalar too large": (msgpack.packb({b"__npgeneric__": True, b"data": float("inf"), b"dtype": "<i4"}), "fit"),
    "a number": (msgpack.packb(1), "expected a map, got int"),
    "a list": (msgpack.packb([{}]), "expected a map, got list"),
    "only an array": (msgpack.packb({b"__npgeneric__": True, b"data": 1, b"dtype": "<f4"}), "expected a map"),
    "nothing": (b"", "malformed"),
    "cut": (array_message(b"1", shape=(1,))[:-3], "malformed"),
    "two messages": (b"\x80\x80", "malformed"),
    "no msgpack": (b"\xc1", "malformed"),
    "broken text": (b"\x81\xa1a\xa1\xff", "malformed"),
    "keys of numbers": (msgpack.packb({1: 2}), "malformed"),
    "an extension": (msgpack.packb({"a": msgpack.ExtType(5, b"1")}), "extension"),
    "a timestamp": (msgpack.packb({"a": msgpack.Timestamp(1, 2)}), "extension"),
    "lists in lists": (b"\x81\xa1a" + b"\x91" * 100_000, "malformed"),
    "deep": (msgpack.packb({"a": [[[[[[[[1]]]]]]]]}), f"deeper than {MAX_DEPTH}"),
    "a list that claims much": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "malformed"),
    "lists that claim much": (b"\x81\xa1a" + b"\xdc\x0f\xff" * 100_000, "malformed"),
    "a long list": (msgpack.packb({"a": [0] * (MAX_LIST + 1)}), "malformed"),
    "many small maps": (b"\x81\xa1a\xdc\x0f\xff" + (b"\xdc\x0f\xff" + b"\x80" * 4095) * 4095, "values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_message_is_refused_with_one_line(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as error:
        unpack(data)
    assert str(error.value).isprintable() and len(str(error.value)) < 200


def test_a_message_has_a_bound() -> None:
    data = pack({"image": np.zeros(100, np.uint8)})
    assert unpack(data, max_bytes=len(data))
    with pytest.raises(ValueError, match=f"{len(data)} bytes is larger than the bound of 99"):
        unpack(data, max_bytes=99)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda tail: array_message()[:40] + tail)))
def test_random_bytes_are_a_map_or_a_value_error(data: bytes) -> None:
    try:
        assert isinstance(unpack(data), dict)
    except ValueError as error:
        assert str(error).isprintable()


CHUNK = np.arange(6, dtype=np.float32).reshape(2, 3)
OBSERVATION = {"front": np.zeros((4, 4, 3), np.uint8), "instruction": "lift the cup", "state": [0.5, 1.0]}


def chunk(message: dict[str, Any]) -> dict[str, Any]:
    return {"actions": CHUNK, "server_timing": {"infer_ms": 1.5}}


def test_an_observation_goes_out_and_a_chunk_comes_back() -> None:
    seen: list[dict[str, Any]] = []
    with (
        FakeServer(lambda message: seen.append(message) or chunk(message)) as server,
        PolicyClient(server.url) as client,
    ):
        assert client.metadata == {"fps": 10.0, "chunk": 2}
        assert client.server_timing == {}
        actions_KA = client.infer(OBSERVATION)
        assert np.array_equal(actions_KA, CHUNK) and actions_KA.dtype == np.float32
        assert client.server_timing == {"infer_ms": 1.5}
        client.reset()
    assert np.array_equal(seen[0].pop("front"), OBSERVATION["front"])
    assert seen == [{"instruction": "lift the cup", "state": [0.5, 1.0]}, {"reset": True}]


def test_one_action_comes_back_as_it_is_sent() -> None:
    with FakeServer(lambda message: {"actions": CHUNK[0]}) as server, PolicyClient(server.url) as client:
        assert client.infer(OBSERVATION).shape == (3,)


@pytest.mark.parametrize("form", ["ws://127.0.0.1:{}", "127.0.0.1:{}", "http://127.0.0.1:{}", "ws://127.0.0.1:{}/"])
def test_addresses_have_several_forms(form: str) -> None:
    with FakeServer(chunk) as server, PolicyClient(form.format(server.port)) as client:
        assert client.infer(OBSERVATION).shape == (2, 3)


@pytest.mark.parametrize("address", ["", "ftp://host:8000", "ws://", "ws://host:port"])
def test_what_is_no_address_is_a_value_error_at_once(address: str) -> None:
    with pytest.raises(ValueError, match=r"expected ws://HOST:PORT"):
        PolicyClient(address)


def test_a_line_of_the_server_is_an_error_and_the_connection_is_kept() -> None:
    lines: list[Any] = ["unknown camera 'top'; the policy has front", "busy: 64 requests wait", "Busy", chunk({})]
    with FakeServer(lambda message: lines.pop(0)) as server, PolicyClient(server.url) as client:
        with pytest.raises(ServerError, match="unknown camera 'top'") as error:
            client.infer(OBSERVATION)
        assert not isinstance(error.value, ServerBusyError)
        for _ in range(2):
            with pytest.raises(ServerBusyError):
                client.infer(OBSERVATION)
        assert client.infer(OBSERVATION).shape == (2, 3)
        assert server.connections == 1


@pytest.mark.parametrize(
    ("reply", "words"), [({"action": CHUNK}, "sent no actions, but .'action'."), (b"\xc1", "another protocol")]
)
def test_an_answer_of_another_form_is_an_error(reply: Any, words: str) -> None:
    with (
        FakeServer(lambda message: reply) as server,
        PolicyClient(server.url) as client,
        pytest.raises(ServerError, match=words),
    ):
        client.infer(OBSERVATION)


def test_what_cannot_be_sent_is_named_and_nothing_is_sent() -> None:
    with FakeServer(chunk) as server, PolicyClient(server.url) as client:
        with pytest.raises(ValueError, match="'state' of the observation cannot be sent: arrays of dtype object"):
            client.infer({**OBSERVATION, "state": np.array([None])})
        with pytest.raises(ValueError, match="an observation is a dict"):
            client.infer([OBSERVATION])  # type: ignore[arg-type]
        assert client.infer(OBSERVATION).shape == (2, 3)


def test_a_key_is_sent_and_a_wrong_one_is_an_error_at_once() -> None:
    with FakeServer(chunk, key="secret") as server:
        # A file of one line ends with a newline.
        for key in ("secret", "secret\n"):
            with PolicyClient(server.url, api_key=key) as client:
                assert client.infer(OBSERVATION).shape == (2, 3)
        for wrong in ("wrong", None):
            with pytest.raises(ServerError, match="the key is missing or wrong"):
                PolicyClient(server.url, api_key=wrong, reconnect_for=600)


def test_a_client_waits_for_a_server_that_starts_later_and_finds_one_that_starts_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    servers: list[FakeServer] = []
    later = threading.Timer(0.5, lambda: servers.append(FakeServer(chunk, port)))
    later.start()
    with PolicyClient(f"ws://127.0.0.1:{port}", reconnect_for=60) as client:
        later.join()
        assert client.infer(OBSERVATION).shape == (2, 3)
        servers[0].stop()
        later = threading.Timer(0.5, lambda: servers.append(FakeServer(lambda message: {"actions": CHUNK[0]}, port)))
        later.start()
        assert client.infer(OBSERVATION).shape == (3,)
        later.join()
    servers[1].stop()


def test_a_server_that_is_gone_is_an_error_once_the_bound_is_over() -> None:
    with FakeServer(chunk) as server:
        client = PolicyClient(server.url, reconnect_for=0.5)
    with client:
        for call in (lambda: client.infer(OBSERVATION), client.reset):
            with pytest.raises(ServerUnreachableError, match=r"is not reached within 0.5 s"):
                call()


def test_a_server_that_fails_at_each_request_is_an_error_once_the_bound_is_over() -> None:
    def fail(message: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    with FakeServer(fail) as server, PolicyClient(server.url, reconnect_for=1) as client:
        with pytest.raises(ServerUnreachableError, match="is not reached within 1 s"):
            client.infer(OBSERVATION)
        assert 2 <= server.connections <= 20


def test_a_message_above_the_servers_bound_is_an_error_at_once() -> None:
    with FakeServer(chunk) as server, PolicyClient(server.url, reconnect_for=600) as client:
        with pytest.raises(ServerError, match="refuses a message"):
            client.infer({"front": np.zeros((1024, 1024, 3), np.uint8)})
        assert client.infer(OBSERVATION).shape == (2, 3)


def test_a_late_answer_is_an_error_and_is_not_taken_for_that_of_the_next_request() -> None:
    late = threading.Event()

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if message["number"] == 0:
            late.wait(60)
        return {"actions": np.array([message["number"]])}

    with FakeServer(answer) as server, PolicyClient(server.url) as client:
        client.timeout = 0.5
        with pytest.raises(ServerLateError, match=r"has not answered within 0.5 s"):
            client.infer({"number": 0})
        client.timeout = 60
        late.set()
        assert client.infer({"number": 1}) == [1]


def test_threads_share_a_client() -> None:
    with FakeServer(lambda message: {"actions": message["state"]}) as server, PolicyClient(server.url) as client:
        results: dict[int, list[float]] = {number: [] for number in range(4)}

        def work(number: int) -> None:
            for _ in range(20):
                results[number].append(client.infer({"state": np.array([number])})[0])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {number: [number] * 20 for number in range(4)}
        assert server.connections == 1


def test_closing_ends_a_call_of_another_thread() -> None:
    asked, answered = threading.Event(), threading.Event()
    errors: list[Exception] = []

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        answered.wait(60)
        return chunk(message)

    def call() -> None:
        try:
            client.infer(OBSERVATION)
        except ServerUnreachableError as error:
            errors.append(error)

    with FakeServer(answer) as server:
        client = PolicyClient(server.url, timeout=60)
        thread = threading.Thread(target=call)
        thread.start()
        assert asked.wait(60)
        client.close()
        thread.join(60)
        answered.set()
        assert [str(error) for error in errors] == [f"this client of {server.url} is closed"]
        client.close()
        with pytest.raises(ServerUnreachableError, match="is closed"):
            client.infer(OBSERVATION)


@contextlib.contextmanager
def deaf_server() -> Iterator[int]:
    """A server that greets and then reads nothing, as a machine whose network is gone."""

    def greet() -> None:
        connection, _ = listener.accept()
        request = connection.recv(65536).decode()
        key = re.search(r"Sec-WebSocket-Key: (\S+)", request)[1]  # type: ignore[index]
        accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()
        head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        connection.sendall(f"{head}Sec-WebSocket-Accept: {accept}\r\n\r\n".encode() + b"\x82\x01\x80")
        done.wait(60)
        connection.close()

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=greet)
        thread.start()
        yield listener.getsockname()[1]
        done.set()
        thread.join()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT")
def test_a_send_that_nobody_reads_ends() -> None:
    with deaf_server() as port:
        client = PolicyClient(f"ws://127.0.0.1:{port}", timeout=2, reconnect_for=0.1)
        began = time.monotonic()
        with pytest.raises((ServerUnreachableError, ServerLateError)):
            client.infer({"front": np.zeros(60 * 2**20, np.uint8)})
        assert time.monotonic() - began < 45
        client.close()


def test_the_client_loads_neither_torch_nor_the_rest_of_lapa() -> None:
    script = (
        "import sys; from lapa.serve.client import PolicyClient; "
        "found = {name for name in sys.modules if name.split('.')[0] in ('lapa', 'torch', 'transformers', 'PIL')}; "
        "rest = found - {'lapa', 'lapa.on_import', 'lapa.serve', 'lapa.serve.client'}; "
        "sys.exit(str(rest) if rest else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_clients_distribution_has_the_version_of_lapa_and_three_dependencies() -> None:
    package = Path(__file__).parent.parent / "packages/lapa-client"
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["version"] == lapa.__version__
    assert [re.split("[><=]", line)[0] for line in project["dependencies"]] == ["numpy", "msgpack", "websockets"]
    # hatch_build.py adds the client by this path.
    assert (package.parents[1] / "src/lapa/serve/client.py").samefile(lapa.serve.client.__file__)
