"""The client: messages both ways, bounds of what is unpacked, reconnecting, and that it never loads torch."""

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("websockets", reason="the client needs websockets: pip install 'lapa-vla[serve]'")

from lapa.serve.client import MAX_DEPTH, MAX_LIST, pack, unpack

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
