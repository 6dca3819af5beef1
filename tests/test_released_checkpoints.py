"""Released files without JAX: round trips through msgpack, slices, truncation, and pickles that run nothing."""

from __future__ import annotations

import collections
import pickle
import sys
import tracemalloc
import types
from _codecs import encode as codecs_encode
from pathlib import Path

import numpy as np
import pytest
import torch

from lapa.errors import UserError
from lapa.released import checkpoints
from lapa.released.checkpoints import open_checkpoint, require_floats, require_shapes
from released_files import arrays, leaf, msgpack, write_stream

TENSORS = {
    "transformer/wte/embedding": torch.randn(7, 5).bfloat16(),
    "transformer/h/scan_decoder/attention/wq/kernel": torch.randn(3, 4, 6),
    "transformer/ln_f/kernel": torch.randn(300).half(),
    "step": torch.tensor(12),
    "empty": torch.zeros(0, 4),
}


def record(tensor: object) -> bytes:
    return msgpack.packb((("a",), msgpack.packb(tensor)))


def same(given, expected=TENSORS) -> None:
    assert list(given) == list(expected)
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype
        assert torch.equal(given[name], tensor), name


@pytest.mark.parametrize("prefix", [(), ("params",), ("params", "params")])
def test_a_streaming_checkpoint_comes_back_bit_by_bit(tmp_path, prefix):
    write_stream(tmp_path / "params", TENSORS, prefix)
    stored = open_checkpoint(tmp_path / "params")
    same(stored)
    assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def test_one_layer_of_a_chunked_tensor_is_read_by_itself(tmp_path):
    write_stream(tmp_path / "params", TENSORS, chunk=40)
    stored = open_checkpoint(tmp_path / "params")
    same(stored)
    name = "transformer/h/scan_decoder/attention/wq/kernel"
    for layer in range(3):
        assert torch.equal(stored.read(name, layer), TENSORS[name][layer])


def test_the_optimisers_state_is_left_out_and_named(tmp_path):
    path = tmp_path / "streaming_train_state"
    write_stream(path, {"step": torch.tensor(3), "opt_state/0/mu/x": torch.ones(2)})
    weights = tmp_path / "weights"
    write_stream(weights, TENSORS, ("params", "params"))
    empty = msgpack.packb((("opt_state", "1"), msgpack.packb({})))
    path.write_bytes(path.read_bytes() + weights.read_bytes() + empty)
    stored = open_checkpoint(path)
    same(stored)
    assert stored.skipped == ("step", "opt_state/0/mu/x", "opt_state/1")


@pytest.mark.parametrize("chunk", [1 << 30, 40])
def test_a_truncated_file_is_named_as_such_wherever_it_ends(tmp_path, chunk):
    path = tmp_path / "params"
    write_stream(path, TENSORS, chunk=chunk)
    whole = path.read_bytes()
    sample = msgpack.packb((("a", "b"), msgpack.packb(leaf(torch.ones(3)))))
    ends = [*range(0, len(whole), 7), *range(len(whole) - len(sample), len(whole))]
    refused = 0
    for end in ends:
        path.write_bytes(whole[:end])
        try:
            opened = open_checkpoint(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "truncated" in str(error)
            refused += 1
        else:
            # Cut between two records, a stream is a shorter one: its missing tensors are named by the importer.
            assert len(opened) < len(TENSORS)
    assert refused >= len(ends) - len(TENSORS)


def test_what_is_no_checkpoint_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match="nothing: no such file"):
        open_checkpoint(tmp_path / "nothing")
    for name, content, complaint in [
        ("empty", b"", "truncated"),
        ("text", b"hello there", "neither a streaming checkpoint"),
        ("flax", msgpack.packb({"a": leaf(torch.ones(3))}), "neither a streaming checkpoint"),
        ("records", msgpack.packb([1, 2]), "not a streaming checkpoint"),
        ("object", record(3), "no tensor at a"),
        ("kind", record(msgpack.ExtType(7, b"")), "no tensor at a .*type 1 or 3, got 7"),
        ("dtype", record(msgpack.ExtType(1, msgpack.packb(((1,), "float8", b"1")))), "float8"),
        ("short", record(msgpack.ExtType(1, msgpack.packb(((2,), "float32", b"1234")))), "needs 8"),
        ("garbage", msgpack.packb((("a",), b"")) + b"\xc1", "byte 6: Unexpected type"),
        ("long name", msgpack.packb((("a" * 5000,), b"")) + b"\0" * 5000, "more than 4096 bytes"),
        ("twice", msgpack.packb((("a",), b"")) * 2, "a is there twice"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        b"\x92" * 5000,
        b"\x92\x91\xa1a" + b"\x81\xa1a" * 5000,
        b"\x92\xdd\xff\xff\xff\xff" + b"\xa1a" * 5000,
        b"\x92\x91\xa1a\xc6\xff\xff\xff\xff",
        *(
            record(msgpack.ExtType(1, msgpack.packb(inner)))
            for inner in (
                *(7, (1, 2), (3, "float32", b"1234"), ((1,), ["float32"], b"1234"), ((1,), "float32", 3)),
                *(((1.0,), "float32", b"1234"), ((-1, -1), "float32", b"1234"), ((1,), b"\xff" * 5000, b"1234")),
            )
        ),
        record({"__msgpack_chunked_array__": True}),
        record({"__msgpack_chunked_array__": True, "shape": {"0": 0}, "chunks": {}}),
        record({"__msgpack_chunked_array__": True, "shape": [1], "chunks": 3}),
        msgpack.packb(((), b"")),
    ],
)
def test_a_malformed_stream_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "params").write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path / "params")
    assert str(error.value).startswith(f"{tmp_path / 'params'}: ")


def test_weights_that_are_no_floating_point_numbers_are_named(tmp_path):
    write_stream(tmp_path / "params", TENSORS)
    with pytest.raises(ValueError, match=r"(?s)step: torch.int64$"):
        require_floats(open_checkpoint(tmp_path / "params"))
    require_floats({name: tensor for name, tensor in TENSORS.items() if name != "step"})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_map_of_arrays_comes_back_bit_by_bit(tmp_path, protocol):
    numbers = {name: tensor for name, tensor in TENSORS.items() if tensor.dtype != torch.bfloat16}
    tree = arrays(numbers)
    tree["transposed"] = numbers["transformer/h/scan_decoder/attention/wq/kernel"].numpy().T
    tree["ordered"] = collections.OrderedDict(big=tree["step"].astype(">i8"))
    (tmp_path / "vqgan").write_bytes(pickle.dumps(tree, protocol=protocol))
    given = open_checkpoint(tmp_path / "vqgan")
    expected = {**numbers, "transposed": numbers["transformer/h/scan_decoder/attention/wq/kernel"].permute(2, 1, 0)}
    same(given, {**expected, "ordered/big": numbers["step"]})


def test_arrays_of_jax_and_maps_of_flax_are_read_where_neither_is_installed(tmp_path, monkeypatch):
    def stand_in(module: str, name: str):
        function = types.FunctionType((lambda *_: None).__code__, {}, name)
        function.__module__, function.__qualname__ = module, name
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            parent = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], name, function)
        return function

    array_of, map_of = stand_in("jax._src.array", "_reconstruct_array"), stand_in("flax.core.frozen_dict", "FrozenDict")

    class JaxArray:
        def __reduce__(self):
            return array_of, (*numbers.__reduce__(), {"weak_type": False})

    class FrozenDict:
        def __reduce__(self):
            return map_of, ({"kernel": JaxArray()},)

    numbers = TENSORS["transformer/ln_f/kernel"].numpy()
    (tmp_path / "vqgan").write_bytes(pickle.dumps({"conv": FrozenDict()}))
    same(open_checkpoint(tmp_path / "vqgan"), {"conv/kernel": torch.from_numpy(numbers)})


def test_a_pickle_with_anything_else_is_refused_and_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (eval, ("1 / 0",))

    path = tmp_path / "vqgan"
    path.write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(
        ValueError, match=r"vqgan: not a pickled map of arrays \(it names builtins.eval; nothing in it was run;"
    ):
        open_checkpoint(path)
    for value, complaint in [
        ({"a": 1.5}, "float where an array"),
        ([1], "list where a map"),
        ({"a": "x"}, "str where an array"),
    ]:
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match=complaint):
            open_checkpoint(path)


class Call:
    """Pickles as a call."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __reduce__(self):
        return self.parts


def test_a_hostile_pickle_is_refused_at_once_with_its_name(tmp_path):
    itself: dict = {}
    itself["a"] = itself
    doubled: dict = {"x": np.zeros(1)}
    for _ in range(40):
        doubled = {"a": doubled, "b": doubled}
    deep = sys.getrecursionlimit()
    one = np.zeros(10_000)
    reduced = one.__reduce__()

    def described(*state: object) -> bytes:
        return pickle.dumps({"a": Call(*reduced[:2], state)})

    contents = {
        "the same map in two places": [pickle.dumps(itself), pickle.dumps(doubled)],
        "a call of __builtin__.bytes": [
            b"\x80\x02}(X\x01\x00\x00\x00ac__builtin__\nbytes\n\x8a\x05\x00\x00\x00\x00\x40\x85Ru."
        ],
        "a call of _codecs.encode": [pickle.dumps({"a": Call(codecs_encode, ("x", "nope"))}, protocol=2)],
        "a state for collections.OrderedDict": [b"\x80\x02}(X\x01\x00\x00\x00accollections\nOrderedDict\n}bu."],
        "not of numbers": [
            pickle.dumps({"a": array})
            for array in (np.array([{}], dtype=object), np.array(["x"]), np.zeros(2, dtype=[("x", "f4")]))
        ],
        "keys are not all text": [pickle.dumps({("a",): np.zeros(1)})],
        "a name of more than 4096 letters": [pickle.dumps({"a" * 3000: {"b" * 2000: np.zeros(1)}})],
        "recursion": [b"\x80\x02" + b"}X\x01\x00\x00\x00a" * deep + b"}" + b"s" * deep + b"."],
        # One buffer under many names, more numbers than bytes, and a place in the memo beyond what the file can fill.
        "24,000,000 bytes of arrays in a file of": [pickle.dumps({str(number): one for number in range(300)})],
        "whose bytes are not the 8,000,000,000,000 that it needs": [described(1, (10**12,), one.dtype, False, b"")],
        "whose shape is not of whole numbers": [described(1, (-1, -1), one.dtype, False, b"12345678")],
        "memo entry 2,147,483,647": [b"\x80\x02}r\xff\xff\xff\x7f."],
    }
    for complaint, files in contents.items():
        for content in files:
            (tmp_path / "vqgan").write_bytes(content)
            with pytest.raises(ValueError, match=rf"vqgan: .*{complaint}") as error:
                open_checkpoint(tmp_path / "vqgan")
            assert len(str(error.value).splitlines()) == 1


def test_a_truncated_pickle_is_named_as_such(tmp_path):
    path = tmp_path / "vqgan"
    whole = pickle.dumps(arrays({"a/b": torch.ones(50, 3), "c": torch.ones(3)}))
    for end in range(2, len(whole), 5):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="truncated"):
            open_checkpoint(path)


def test_names_and_shapes_are_known_without_reading_a_tensor(tmp_path, monkeypatch):
    write_stream(tmp_path / "params", TENSORS)
    monkeypatch.setattr(checkpoints, "_read_into", lambda *_: pytest.fail("read a tensor"))
    stored = open_checkpoint(tmp_path / "params")
    assert "step" in stored and "steps" not in stored and len(stored) == len(TENSORS)
    shapes = checkpoints.shapes_of(stored)
    with pytest.raises(ValueError, match="step: not a name of a test"):
        require_shapes("a test", shapes, {name: shape for name, shape in shapes.items() if name != "step"})


def test_a_large_tensor_is_indexed_without_being_read(tmp_path, monkeypatch):
    """One of 1 GiB, a hole in the file: opening takes memory for its header, reading for one row."""
    rows, data = 2**14, 2**30
    described = b"\x93" + msgpack.packb((rows, rows)) + msgpack.packb("float32") + b"\xc6" + data.to_bytes(4, "big")
    extension = b"\xc9" + (len(described) + data).to_bytes(4, "big") + b"\x01" + described
    with (tmp_path / "params").open("wb") as file:
        file.write(b"\x92" + msgpack.packb(("a",)) + b"\xc6" + (len(extension) + data).to_bytes(4, "big") + extension)
        file.truncate(file.tell() + data)
    lengths, read_into = [], checkpoints._read_into

    def noted(file, pieces, start, raw):
        lengths.append(len(raw))
        read_into(file, pieces, start, raw)

    monkeypatch.setattr(checkpoints, "_read_into", noted)
    tracemalloc.start()
    try:
        stored = open_checkpoint(tmp_path / "params")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert stored.shapes == {"a": (rows, rows)} and not stored.read("a", rows - 1).any()
    assert lengths == [4 * rows]


def test_a_pickle_that_has_one_text_built_again_and_again_is_refused(tmp_path: Path) -> None:
    """A few bytes for each call, and each a copy of the text: 2 GB of a file of 1 MB, were they built."""
    text, latin1 = b"x" * 1_000_000, b"X\x06\x00\x00\x00latin1"
    head = b"\x80\x02X" + len(text).to_bytes(4, "little") + text + b"q\x010c_codecs\nencode\nq\x020]("
    path = tmp_path / "vqgan"
    path.write_bytes(head + 2000 * (b"h\x02(h\x01" + latin1 + b"tR") + b"e.")
    with pytest.raises(UserError, match="would fill much more memory than its"):
        open_checkpoint(path)
    entries = b"}q\x01(" + b"".join(b"X\x04\x00\x00\x00%04dN" % n for n in range(5000)) + b"u0"
    call = b"h\x02h\x01\x85R"
    path.write_bytes(b"\x80\x02" + entries + b"cflax.core.frozen_dict\nFrozenDict\nq\x020](" + 5000 * call + b"e.")
    with pytest.raises(UserError, match="would fill much more memory than its"):
        open_checkpoint(path)


@pytest.mark.parametrize("shape", [(10**30,), (2,) * 100, (-1, 4), (1 << 62, 1 << 62), (0,) * 65])
def test_a_shape_beyond_its_bytes_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = pickle.dumps({"a": np.zeros((3, 7), np.uint8)}, protocol=2)
    plain, other = pickle.dumps((3, 7), protocol=2)[2:-1], pickle.dumps(shape, protocol=2)[2:-1]
    plain, other = (code[: code.index(b"q")] if b"q" in code else code for code in (plain, other))
    assert plain in array
    (tmp_path / "vqgan").write_bytes(array.replace(plain, other))
    with pytest.raises(UserError, match="not a pickled map of arrays"):
        open_checkpoint(tmp_path / "vqgan")
