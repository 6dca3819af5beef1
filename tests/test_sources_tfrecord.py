"""TFRecord files and tf.train.Examples: what is written is read, and no byte of any file crashes the reader."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapa.files import as_path
from lapa.sources.rlds.tfrecord import masked_crc, parse_example, read_record, scan_records
from tfds_files import encode_example, frame


@given(payloads=st.lists(st.binary(max_size=40), min_size=1, max_size=4), data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_flipped_bit_and_no_truncation_is_silent(payloads: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(frame(payload) for payload in payloads)
    assert list(_read(whole)) == payloads
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    records = list(_read(bytes(flipped)))
    assert [isinstance(record, str) for record in records].count(True) == 1
    assert all(record == payloads[index] for index, record in enumerate(records) if isinstance(record, bytes))
    end = data.draw(st.integers(0, len(whole) - 1))
    records = list(_read(whole[:end]))
    # Cut between two records, only their number shows it.
    assert any(isinstance(record, str) for record in records) or len(records) < len(payloads)


@given(values=st.dictionaries(st.text(max_size=5), st.lists(st.integers(-(1 << 63), (1 << 63) - 1)), max_size=4))
@settings(max_examples=50, deadline=None)
def test_examples_read_as_they_were_written(values: dict[str, list[int]]) -> None:
    arrays: dict[str, Any] = {key: np.array(value, np.int64) for key, value in values.items()}
    parsed = parse_example(encode_example(arrays), [*arrays, "absent!"])
    assert set(parsed) == set(arrays)
    assert all((parsed[key] == array).all() and len(parsed[key]) == len(array) for key, array in arrays.items())


def _read(content: bytes) -> Iterator[bytes | str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield from _payloads(Path(file.name))


def _payloads(path: Path) -> Iterator[bytes | str]:
    """The payload of each record of a file, or what is wrong with it."""
    for record in scan_records(path):
        if record.error is not None:
            yield record.error
            continue
        try:
            yield read_record(path, record.offset, record.length)
        except ValueError as error:
            yield str(error)


@given(values=st.dictionaries(st.text(max_size=5), st.lists(st.floats(width=32, allow_nan=False)), max_size=4))
@settings(max_examples=50, deadline=None)
def test_floats_read_as_they_were_written(values: dict[str, list[float]]) -> None:
    arrays: dict[str, Any] = {key: np.array(value, np.float32) for key, value in values.items()}
    parsed = parse_example(encode_example(arrays), list(arrays))
    assert all((parsed[key] == array).all() and len(parsed[key]) == len(array) for key, array in arrays.items())


@given(content=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_records_or_an_error(content: bytes) -> None:
    records = list(_read(content))
    assert sum(isinstance(record, str) for record in records) <= 1 or len(content) > 16
    assert bool(records) == bool(content)


@given(content=st.binary(max_size=120))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_example_or_a_value_error(content: bytes) -> None:
    try:
        parsed = parse_example(content, ["a", "steps/action"])
    except ValueError:
        return
    assert set(parsed) <= {"a", "steps/action"}


@given(payloads=st.lists(st.binary(max_size=40), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_scan_finds_the_records_that_reading_finds(payloads: list[bytes]) -> None:
    path = as_path("memory://scan/one.tfrecord")
    path.write_bytes(b"".join(map(frame, payloads)))
    scanned = list(scan_records(path))
    assert [read_record(path, record.offset, record.length) for record in scanned] == payloads
    assert [record.index for record in scanned] == list(range(len(payloads)))


def test_a_record_that_is_no_longer_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.tfrecord"
    path.write_bytes(frame(b"first") + frame(b"second"))
    _, second = scan_records(path)
    path.write_bytes(frame(b"firsts") + frame(b"second"))
    with pytest.raises(ValueError, match="another record begins here"):
        read_record(path, second.offset, second.length)
    path.write_bytes(frame(b"first"))
    with pytest.raises(ValueError, match="the file ends within it"):
        read_record(path, second.offset, second.length)
    path.unlink()
    with pytest.raises(ValueError, match="no such file"):
        read_record(path, 0, 5)


def test_a_length_beyond_all_files_is_no_reason_to_make_room_for_it(tmp_path: Path) -> None:
    length = struct.pack("<Q", 1 << 62)
    path = tmp_path / "one.tfrecord"
    path.write_bytes(length + struct.pack("<I", masked_crc(length)) + b"short")
    assert list(_payloads(path)) == ["the file ends within it"]
