"""Datasets as others write them: LeRobot v3.0 and v2.1, and RLDS, made without lapa, so that each part can be odd.

The image of frame t of episode e has one level of grey, by which `seen` knows it again.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

EPISODES, FRAMES, FPS, SIDE = 3, 10, 10, 32
FRONT = "observation.images.front"
TASKS = ("open the drawer", "close the drawer")
GREY, STEP = 6, 8


def grey(episode: int, step: int) -> np.ndarray:
    """The image of a frame."""
    return np.full((SIDE, SIDE, 3), GREY + STEP * (FRAMES * episode + step), np.uint8)


def seen(images_THWC: np.ndarray) -> list[int]:
    """The number of each image: 10 * episode + step."""
    return [round((float(image.mean()) - GREY) / STEP) for image in images_THWC]


def write_video(path: Path, images: Sequence[np.ndarray], *, first: int = 0, aspect: Fraction | None = None) -> None:
    """Writes an mp4. first: number of its first frame in time; aspect: of its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"g": "2", "bf": "0", "crf": "5"}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, image in enumerate(images):
            pixels = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p")
            pixels.pts, pixels.time_base = number + first, Fraction(1, FPS)
            container.mux(stream.encode(pixels))
        container.mux(stream.encode())


def encoded(image: np.ndarray, form: str = "PNG", orientation: int | None = None) -> bytes:
    """An image file. orientation: its EXIF entry."""
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(image).save(buffer, form, **({"exif": exif} if orientation else {}))
    return buffer.getvalue()


@dataclass
class LeRobot:
    """The parts of a LeRobot dataset, to be changed before they are written.

    numbers: of the episodes; rows: the columns of the data, a row a frame; episodes: columns of meta/episodes; first:
    frame of the videos, in time.
    """

    numbers: Sequence[int] = tuple(range(EPISODES))
    cameras: Sequence[str] = ("front",)
    info: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[Any]] = field(default_factory=dict)
    episodes: dict[str, list[Any]] = field(default_factory=dict)
    tasks: Sequence[str] | None = TASKS
    first: int = 0

    def __post_init__(self) -> None:
        count, order = len(self.numbers), range(len(self.numbers))
        steps = [(place, step) for place in order for step in range(FRAMES)]
        actions = {"dtype": "float32", "shape": [2], "names": ["dx", "dy"]}
        image = {"dtype": "video", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]}
        self.info = {
            "codebase_version": "v3.0", "robot_type": "arm", "fps": FPS, "total_episodes": count,
            "total_frames": count * FRAMES, "total_tasks": 2, "chunks_size": 1000, "splits": {"train": f"0:{count}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": {
                "action": actions, "observation.state": actions,
                **{f"observation.images.{camera}": dict(image) for camera in self.cameras},
                "timestamp": {"dtype": "float32", "shape": [1], "names": None},
                **{name: {"dtype": "int64", "shape": [1], "names": None} for name in INDICES},
            },
        }  # fmt: skip
        self.rows = {
            "action": [[place + step / 10, -step / 10] for place, step in steps],
            "observation.state": [[step / 10, 0.0] for _, step in steps],
            "timestamp": [step / FPS for _, step in steps],
            "frame_index": [step for _, step in steps],
            "episode_index": [self.numbers[place] for place, _ in steps],
            "index": list(range(len(steps))),
            "task_index": [place % 2 for place, _ in steps],
        }
        self.episodes = {
            "episode_index": list(self.numbers),
            "tasks": [[TASKS[place % 2]] for place in order],
            "length": [FRAMES] * count,
            "dataset_from_index": [FRAMES * place for place in order],
            "dataset_to_index": [FRAMES * (place + 1) for place in order],
            "data/chunk_index": [0] * count,
            "data/file_index": [0] * count,
        }
        for camera in self.cameras:
            key = f"videos/observation.images.{camera}"
            self.episodes |= {f"{key}/{name}_index": [0] * count for name in ("chunk", "file")}
            self.episodes[f"{key}/from_timestamp"] = [FRAMES * place / FPS for place in order]
            self.episodes[f"{key}/to_timestamp"] = [FRAMES * (place + 1) / FPS for place in order]

    def write(self, root: Path) -> Path:
        """Writes v3.0: one data file, one video a camera."""
        meta = root / "meta" / "episodes" / "chunk-000"
        meta.mkdir(parents=True)
        (root / "meta" / "info.json").write_text(json.dumps(self.info))
        if self.tasks is not None:
            numbered = {"task_index": list(range(len(self.tasks))), "task": list(self.tasks)}
            pq.write_table(pa.table(numbered), root / "meta" / "tasks.parquet")
        pq.write_table(pa.table(self.episodes), meta / "file-000.parquet")
        (root / "data" / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.table(self.rows), root / "data" / "chunk-000" / "file-000.parquet")
        for camera in self.cameras:
            images = [grey(place, step) for place in range(len(self.numbers)) for step in range(FRAMES)]
            folder = root / "videos" / f"observation.images.{camera}" / "chunk-000"
            write_video(folder / "file-000.mp4", images, first=self.first)
        return root

    def write_legacy(self, root: Path, line: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row) -> Path:
        """Writes v2.1: a data file and a video an episode. line: changes what is written of each episode."""
        (root / "meta").mkdir(parents=True)
        named = "chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info = {**self.info, "codebase_version": "v2.1", "data_path": f"data/{named}"}
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        (root / "meta" / "info.json").write_text(json.dumps(info))
        tasks = [{"task_index": number, "task": task} for number, task in enumerate(self.tasks or ())]
        lines = [
            line({"episode_index": number, "tasks": [TASKS[place % 2]], "length": FRAMES})
            for place, number in enumerate(self.numbers)
        ]
        for name, rows in {"tasks": tasks, "episodes": lines}.items():
            (root / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "data" / "chunk-000").mkdir(parents=True)
        for place, number in enumerate(self.numbers):
            rows = {name: values[FRAMES * place : FRAMES * (place + 1)] for name, values in self.rows.items()}
            pq.write_table(pa.table(rows), root / "data" / "chunk-000" / f"episode_{number:06d}.parquet")
            for camera in self.cameras:
                folder = root / "videos" / "chunk-000" / f"observation.images.{camera}"
                write_video(
                    folder / f"episode_{number:06d}.mp4", [grey(place, t) for t in range(FRAMES)], first=self.first
                )
        return root


INDICES = ("frame_index", "episode_index", "index", "task_index")


def rlds(
    root: Path,
    texts: Mapping[str, Callable[[int], bytes]],
    *,
    images: Callable[[int, int], bytes] = lambda episode, step: encoded(grey(episode, step), "PNG"),
    metadata: Mapping[str, bytes] | None = None,
    shards: int = 1,
    named: int = 1,
) -> Path:
    """Writes an RLDS folder. texts: the text features of a step, each from the step's number; metadata: of episodes.

    shards: files, one episode each where there are several; named: files by their names, as they are all listed.
    """
    from lapa.sources.rlds.tfrecord import masked_crc

    folder = root / "odd" / "1.0.0"
    folder.mkdir(parents=True)
    image = {"image": {"shape": {"dimensions": [str(SIDE), str(SIDE), "3"]}, "dtype": "uint8", "encodingFormat": "png"}}
    action = {"tensor": {"shape": {"dimensions": ["2"]}, "dtype": "float32", "encoding": "none"}}
    steps = _group(
        {"observation": _group({"image": image}), "action": action, **{name: {"text": {}} for name in texts}}
    )
    top = {"steps": {"sequence": {"feature": steps, "length": "-1"}}}
    if metadata is not None:
        top["episode_metadata"] = _group({name: {"text": {}} for name in metadata})
    (folder / "features.json").write_text(json.dumps(_group(top)))
    numbers = [[number for number in range(EPISODES) if number % shards == shard] for shard in range(shards)]
    split = {"name": "train", "shardLengths": [str(len(its)) for its in numbers]}
    info = {"name": "odd", "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for shard, its in enumerate(numbers):
        records = b""
        for number in its:
            values: dict[str, Any] = {
                "steps/observation/image": [images(number, step) for step in range(FRAMES)],
                "steps/action": np.arange(2 * FRAMES, dtype=np.float32) + number,
                **{f"steps/{name}": [text(step) for step in range(FRAMES)] for name, text in texts.items()},
                **{f"episode_metadata/{name}": [text] for name, text in (metadata or {}).items()},
            }
            record = _example(values)
            length = struct.pack("<Q", len(record))
            records += length + struct.pack("<I", masked_crc(length)) + record + struct.pack("<I", masked_crc(record))
        (folder / f"odd-train.tfrecord-{shard:05d}-of-{max(shards, named):05d}").write_bytes(records)
    return folder


def _group(features: Mapping[str, Any]) -> dict[str, Any]:
    return {"featuresDict": {"features": dict(features)}}


def _example(values: Mapping[str, Any]) -> bytes:
    """A tf.train.Example of lists of bytes and of float32 arrays."""
    entries = b""
    for name, value in values.items():
        texts = isinstance(value, list)
        inner = b"".join(_field(1, item) for item in value) if texts else _field(1, value.tobytes())
        entries += _field(1, _field(1, name.encode()) + _field(2, _field(1 if texts else 2, inner)))
    return _field(1, entries)


def _field(number: int, data: bytes) -> bytes:
    head, length = bytearray([number << 3 | 2]), len(data)
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes([*head, length]) + data
