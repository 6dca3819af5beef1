"""TFDS folders as TensorFlow writes them, small: TFRecord files of tf.train.Examples, and the two JSON files."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lapa.sources.rlds.tfrecord import masked_crc

STEPS = 6


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    head = bytearray()
    while number > 127:
        head.append(number & 127 | 128)
        number >>= 7
    return bytes([*head, number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def encode_example(values: dict[str, Any]) -> bytes:
    """A tf.train.Example, written by hand: the twin of parse_example."""
    entries = []
    for key, value in values.items():
        if isinstance(value, list):
            feature = field(1, b"".join(field(1, item) for item in value))
        elif value.dtype == np.float32:
            feature = field(2, field(1, value.tobytes()))
        else:
            feature = field(3, field(1, b"".join(varint(int(item)) for item in value)))
        entries.append(field(1, field(1, key.encode()) + field(2, feature)))
    return field(1, b"".join(entries))


def frame(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc(length)) + payload + struct.pack("<I", masked_crc(payload))


def encode_image(level: int, form: str = "JPEG", size: tuple[int, int] = (48, 32)) -> bytes:
    buffer, image = io.BytesIO(), Image.new("RGB", size, (level, level, level))
    image.paste((255, 0, 0), (20, 4, 28, 12))
    image.save(buffer, form)
    return buffer.getvalue()


def episode(number: int, steps: int = STEPS) -> dict[str, Any]:
    images = {
        "steps/observation/main": [encode_image(20 * number + 10 * step) for step in range(steps)],
        "steps/observation/wrist/rgb": [encode_image(200, "PNG") for _ in range(steps)],
    }
    return {
        **images,
        "steps/language_instruction": [f"task {number % 2}".encode()] * steps,
        "steps/action": np.arange(steps * 3, dtype=np.float32) + number,
        "steps/observation/state": np.arange(steps * 2, dtype=np.float32) - number,
        "steps/is_first": np.eye(steps, dtype=np.int64)[0],
    }


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
    return {"tensor": {"shape": dimensions, "dtype": dtype, "encoding": "none"}}


def image_node(channels: int = 3) -> dict[str, Any]:
    return {"image": {"shape": {"dimensions": ["32", "48", str(channels)]}, "dtype": "uint8", "encodingFormat": "jpeg"}}


def group(**features: Any) -> dict[str, Any]:
    return {"featuresDict": {"features": features}}


FEATURES = {
    "language_instruction": {"text": {}},
    "action": tensor("float32", 3),
    "is_first": tensor("bool"),
    "observation": group(
        wrist=group(rgb=image_node(), depth=image_node(1)), main=image_node(), state=tensor("float32", 2)
    ),
}


def write_folder(
    root: Path,
    episodes: Sequence[dict[str, Any]] = tuple(episode(number) for number in range(5)),
    features: dict[str, Any] = FEATURES,
    name: str = "made_up",
    shards: int = 2,
) -> Path:
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    steps = {"sequence": {"feature": group(**features), "length": "-1"}}
    (folder / "features.json").write_text(json.dumps(group(steps=steps, episode_metadata=group(id=tensor("int32")))))
    parts = [
        episodes[number * len(episodes) // shards : (number + 1) * len(episodes) // shards] for number in range(shards)
    ]
    split = {"name": "train", "shardLengths": [str(len(part)) for part in parts]}
    info = {"name": name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for number, part in enumerate(parts):
        shard_path(folder, number, shards).write_bytes(b"".join(frame(encode_example(values)) for values in part))
    return folder


def shard_path(folder: Path, number: int = 0, shards: int = 2) -> Path:
    return folder / f"{folder.parent.name}-train.tfrecord-{number:05d}-of-{shards:05d}"
