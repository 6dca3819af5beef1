"""TFRecord files and the tf.train.Example messages in them, read without TensorFlow.

A record is its length (uint64, little-endian), the masked CRC32C of the length, the payload, the masked CRC32C of
the payload. Formats: https://www.tensorflow.org/tutorials/load_data/tfrecord, tensorflow/core/example/example.proto.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from lapa.errors import UserError
from lapa.files import open_binary, reading

LENGTH, CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")
HEAD_SIZE = LENGTH.size + CHECKSUM.size
FRAME_SIZE = HEAD_SIZE + CHECKSUM.size
GZIP = b"\x1f\x8b\x08"
# As tensorflow/core/lib/hash/crc32c.h.
MASK_DELTA = 0xA282EAD8
NUMBERS = {"float_list": np.float32, "int64_list": np.int64}
# Bytes of parsed records that each process keeps, of all sources together (a mixture has dozens): frames of one
# episode are mostly read together.
KEPT_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """A record: its number, its first byte, the length of its payload in bytes, and the error where it is damaged."""

    index: int
    offset: int
    length: int = 0
    error: str | None = None


def masked_crc(data: bytes) -> int:
    """Returns the checksum that a TFRecord holds."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def scan_records(path: Path) -> Iterator[Record]:
    """Yields the records of a file, by their lengths alone; payloads are skipped, and not verified.

    A record with a damaged length, or one within which the file ends, is the last: those after it cannot be found.
    """
    with reading(path), open_binary(path) as file:
        offset, size = 0, path.stat().st_size
        for index in count():
            if offset >= size:
                return
            file.seek(offset)
            head, error = file.read(HEAD_SIZE), ""
            if offset == 0 and head.startswith(GZIP):
                error = "the file is compressed (gzip), which is not read; unpack it (gunzip)"
            elif len(head) < HEAD_SIZE:
                error = "the file ends within it"
            elif masked_crc(head[: LENGTH.size]) != CHECKSUM.unpack_from(head, LENGTH.size)[0]:
                error = "CRC mismatch of its length, nothing after it can be read"
            elif offset + FRAME_SIZE + LENGTH.unpack_from(head)[0] > size:
                error = "the file ends within it"
            if error:
                yield Record(index, offset, error=error)
                return
            (length,) = LENGTH.unpack_from(head)
            yield Record(index, offset, length)
            offset += FRAME_SIZE + length


def read_record(path: Path, offset: int, length: int) -> bytes:
    """Returns the verified payload of the record at a byte offset.

    Raises UserError, which does not name the file, where it is damaged.
    """
    with reading(path), open_binary(path) as file:
        file.seek(offset)
        framed = file.read(FRAME_SIZE + length)
    head, payload = framed[: LENGTH.size], framed[HEAD_SIZE : -CHECKSUM.size]
    if len(framed) < FRAME_SIZE + length:
        raise UserError("the file ends within it")
    if LENGTH.unpack(head)[0] != length or masked_crc(head) != CHECKSUM.unpack_from(framed, LENGTH.size)[0]:
        raise UserError("another record begins here; the file has changed")
    if masked_crc(payload) != CHECKSUM.unpack(framed[-CHECKSUM.size :])[0]:
        raise UserError("CRC mismatch")
    return payload


def parse_example(payload: bytes, keys: Iterable[str]) -> dict[str, Any]:
    """Returns the values of a tf.train.Example's features: a list of bytes, or an array of float32 or int64.

    keys: the features to read; those that the message lacks are left out. Raises UserError where it is no Example.
    """
    try:
        features = _example_class().FromString(payload).features.feature
    except DecodeError:
        raise UserError("is not a tf.train.Example") from None
    values: dict[str, Any] = {}
    for key in keys:
        if key in features:
            kind = features[key].WhichOneof("kind")
            items = getattr(features[key], kind).value if kind else ()
            values[key] = np.array(items, dtype=NUMBERS[kind]) if kind in NUMBERS else list(items)
    return values


@cache
def _example_class() -> Any:
    """Makes the class of tf.train.Example, in its own pool: TensorFlow, if loaded, has registered the name."""
    kind = descriptor_pb2.FieldDescriptorProto
    one, many, message = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED, kind.TYPE_MESSAGE
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    for name, item in (("BytesList", kind.TYPE_BYTES), ("FloatList", kind.TYPE_FLOAT), ("Int64List", kind.TYPE_INT64)):
        file.message_type.add(name=name).field.add(name="value", number=1, label=many, type=item)

    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("BytesList", "FloatList", "Int64List"), 1):
        field = feature.field.add(name=name.replace("List", "_list").lower(), number=number, label=one, type=message)
        field.type_name, field.oneof_index = f".tensorflow.{name}", 0

    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    entry.field.add(name="key", number=1, label=one, type=kind.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=message, type_name=".tensorflow.Feature")
    features.field.add(
        name="feature", number=1, label=many, type=message, type_name=".tensorflow.Features.FeatureEntry"
    )
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, label=one, type=message, type_name=".tensorflow.Features")

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


class ParsedRecords:
    """The parsed records that were used last, of all sources of this process, by source and item."""

    def __init__(self) -> None:
        self._records: OrderedDict[tuple[str, str], tuple[int, Any]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> Any:
        with self._lock:
            if key not in self._records:
                return None
            self._records.move_to_end(key)
            return self._records[key][1]

    def put(self, key: tuple[str, str], record: Any, num_bytes: int) -> None:
        """Keeps a record, and drops the oldest until `KEPT_BYTES` suffice; the latest one stays."""
        with self._lock:
            self._num_bytes += num_bytes - self._records.pop(key, (0, None))[0]
            self._records[key] = (num_bytes, record)
            while len(self._records) > 1 and self._num_bytes > KEPT_BYTES:
                self._num_bytes -= self._records.popitem(last=False)[1][0]

    def clear(self) -> None:
        with self._lock:
            self._records.clear()
            self._num_bytes = 0


PARSED = ParsedRecords()
