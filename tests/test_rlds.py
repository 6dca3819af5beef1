"""`lapa data rlds`: TFRecord framing and checksums, layouts of features, damaged and missing files, interruptions."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lapa.data import writer
from lapa.data.dataset import Dataset
from lapa.data.lerobot import INFO
from lapa.data.sources.rlds import RldsConfig, run
from lapa.data.sources.tfrecord import masked_crc, parse_example, read_records

SHARED = Path(os.environ.get("LAPA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
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


def encode_picture(level: int, form: str = "JPEG", size: tuple[int, int] = (48, 32)) -> bytes:
    buffer, picture = io.BytesIO(), Image.new("RGB", size, (level, level, level))
    picture.paste((255, 0, 0), (20, 4, 28, 12))
    picture.save(buffer, form)
    return buffer.getvalue()


def episode(number: int, steps: int = STEPS) -> dict[str, Any]:
    pictures = {
        "steps/observation/main": [encode_picture(20 * number + 10 * step) for step in range(steps)],
        "steps/observation/wrist/rgb": [encode_picture(200, "PNG") for _ in range(steps)],
    }
    return {
        **pictures,
        "steps/language_instruction": [f"task {number % 2}".encode()] * steps,
        "steps/action": np.arange(steps * 3, dtype=np.float32) + number,
        "steps/observation/state": np.arange(steps * 2, dtype=np.float32) - number,
        "steps/is_first": np.eye(steps, dtype=np.int64)[0],
    }


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
    return {"tensor": {"shape": dimensions, "dtype": dtype, "encoding": "none"}}


def picture(channels: int = 3) -> dict[str, Any]:
    return {"image": {"shape": {"dimensions": ["32", "48", str(channels)]}, "dtype": "uint8", "encodingFormat": "jpeg"}}


def group(**features: Any) -> dict[str, Any]:
    return {"featuresDict": {"features": features}}


FEATURES = {
    "language_instruction": {"text": {}},
    "action": tensor("float32", 3),
    "is_first": tensor("bool"),
    "observation": group(wrist=group(rgb=picture(), depth=picture(1)), main=picture(), state=tensor("float32", 2)),
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
    (folder / "dataset_info.json").write_text(json.dumps({"name": name, "fileFormat": "tfrecord", "splits": [split]}))
    for number, part in enumerate(parts):
        shard_path(folder, number, shards).write_bytes(b"".join(frame(encode_example(values)) for values in part))
    return folder


def shard_path(folder: Path, number: int = 0, shards: int = 2) -> Path:
    return folder / f"{folder.parent.name}-train.tfrecord-{number:05d}-of-{shards:05d}"


def convert(folder: Path, **options: Any) -> Dataset:
    out = options.pop("out", folder.parent.parent / "dataset")
    run(RldsConfig(folder, out, **{"size": 32, "fps": 5.0, **options}))
    return Dataset.open(out)


def test_checksums_are_those_of_the_format() -> None:
    # CRC32C of nine digits is 0xE3069283 (RFC 3720 and every catalogue); masked as TensorFlow does.
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_a_folder_becomes_a_dataset(tmp_path: Path) -> None:
    dataset = convert(write_folder(tmp_path))
    assert dataset.cameras == ("main", "wrist_rgb")
    assert [item.instruction for item in dataset.episodes] == ["task 0", "task 1", "task 0", "task 1", "task 0"]
    assert dataset.episodes[3].source == "made_up-train.tfrecord-00001-of-00002:1"
    assert (dataset.fps, dataset.num_frames, dataset.action_dim, dataset.state_dim) == (5.0, 5 * STEPS, 3, 2)
    assert (dataset.actions(2) == np.arange(STEPS * 3).reshape(STEPS, 3) + 2).all()
    assert (dataset.states(2) == np.arange(STEPS * 2).reshape(STEPS, 2) - 2).all()
    levels = dataset.frames(2, camera="main")[:, 16:].mean(axis=(1, 2, 3))
    assert np.abs(levels - (40 + 10 * np.arange(STEPS))).max() < 6
    assert dataset.image_shape("wrist_rgb") == (32, 32)


def test_one_camera_without_actions(tmp_path: Path) -> None:
    dataset = convert(write_folder(tmp_path), camera=("wrist_rgb",), actions=False, limit=3)
    assert (dataset.cameras, dataset.action_dim, dataset.state_dim) == (("wrist_rgb",), None, None)
    assert len(dataset.episodes) == 3


def test_an_action_of_several_features(tmp_path: Path) -> None:
    features = {
        "observation": group(image=picture(), natural_language_instruction=tensor("string")),
        "action": group(world_vector=tensor("float32", 3), open_gripper=tensor("bool")),
    }
    values = {
        "steps/observation/image": [encode_picture(30)] * STEPS,
        "steps/observation/natural_language_instruction": [b"lift", b"drop", b"drop"] * 2,
        "steps/action/world_vector": np.arange(STEPS * 3, dtype=np.float32),
        "steps/action/open_gripper": np.ones(STEPS, np.int64),
    }
    folder = write_folder(tmp_path, [values], features, shards=1)
    with pytest.raises(
        ValueError, match=r"no step feature 'action'.*action/world_vector, action/open_gripper.*--action"
    ):
        convert(folder)
    dataset = convert(folder, action_keys=("action/world_vector", "action/open_gripper"))
    assert dataset.features["action"]["names"] == [
        "world_vector_0",
        "world_vector_1",
        "world_vector_2",
        "open_gripper_0",
    ]
    assert (dataset.actions(0)[1] == [3, 4, 5, 1]).all()
    assert (dataset.state_dim, dataset.episodes[0].instruction) == (None, "lift")


def test_the_rate_of_a_dataset_that_is_known(tmp_path: Path) -> None:
    assert convert(write_folder(tmp_path, name="bridge_dataset"), fps=None).fps == 5
    with pytest.raises(ValueError, match="control rate of made_up is not known; give it as --fps"):
        convert(write_folder(tmp_path), fps=None, out=tmp_path / "other")


def test_what_is_known_of_a_datasets_actions_is_declared(tmp_path: Path) -> None:
    features, values = dict(FEATURES), episode(0)
    features["action"], features["other"] = tensor("float32", 7), tensor("float32", 7)
    values["steps/action"] = values["steps/other"] = np.zeros(STEPS * 7, np.float32)
    folder = write_folder(tmp_path, [values], features, name="bridge_orig", shards=1)
    space = convert(folder).action_space
    assert space is not None
    assert (space.names[6], space.binary, space.control) == ("gripper", (False,) * 6 + (True,), "delta")
    space = convert(folder, action_keys=("other",), out=tmp_path / "other").action_space
    assert space is not None and not any(space.binary) and space.control is None, "of other features nothing is known"
    features["action"] = group(
        world_vector=tensor("float32", 3),
        rotation_delta=tensor("float32", 3),
        gripper_closedness_action=tensor("float32", 1),
    )
    widths = {"world_vector": 3, "rotation_delta": 3, "gripper_closedness_action": 1}
    values |= {f"steps/action/{key}": np.zeros(STEPS * width, np.float32) for key, width in widths.items()}
    folder = write_folder(tmp_path, [values], features, name="fractal20220817_data", shards=1)
    space = convert(folder, out=tmp_path / "fractal").action_space
    assert space is not None and (space.names[6], any(space.binary), space.control) == ("gripper", False, "delta")


def test_what_does_not_fit_is_said_before_any_work(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    for options, told in (
        ({"camera": ("man",)}, "unknown camera 'man'; did you mean 'main'"),
        ({"camera": ("wrist_depth",)}, "unknown camera 'wrist_depth'"),
        ({"split": "val"}, "unknown split 'val'"),
        ({"size": 31}, "even number"),
        ({"limit": 0}, "at least 1"),
        ({"fps": -1.0}, "cannot be -1"),
        ({"folder": folder.parent}, "name the folder of a version, such as .*1.0.0"),
        ({"folder": tmp_path / "none"}, "name the folder of a TFDS dataset"),
    ):
        with pytest.raises(ValueError, match=told):
            convert(**{"folder": folder, "out": tmp_path / "out", **options})
    (folder / "features.json").write_text('{"featuresDict": {"features": {"image": {}}}}')
    with pytest.raises(ValueError, match=r"features\.json: describes no `steps`"):
        convert(folder, out=tmp_path / "out")
    (folder / "dataset_info.json").write_text('{"name": "made_up", "splits": [{"name": "train"}]}')
    with pytest.raises(ValueError, match=r"dataset_info\.json: lacks the name, the splits"):
        convert(folder, out=tmp_path / "out")
    (folder / "dataset_info.json").write_text('{"name": "made_up", "fileFormat": "riegeli", "splits": []}')
    with pytest.raises(ValueError, match="only tfrecord is read"):
        convert(folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_is_named_and_the_rest_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path)
    path = shard_path(folder, 1)
    whole = bytearray(path.read_bytes())
    offset = len(frame(encode_example(episode(2))))
    whole[offset + 100] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=rf"-00001-of-00002: record 1 at byte {offset}: CRC mismatch.*--skip-bad"):
        convert(folder)
    dataset = convert(folder, skip_bad=True, resume=True)
    assert [item.source[-1] for item in dataset.episodes] == ["0", "1", "0", "2"]
    assert "skipped in all (--skip-bad): 1" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["within", "between", "before", "length"])
def test_a_file_that_ends_early(tmp_path: Path, capsys: pytest.CaptureFixture, where: str) -> None:
    folder = write_folder(tmp_path)
    path = shard_path(folder, 1)
    whole, offset = path.read_bytes(), len(frame(encode_example(episode(2))))
    if where == "length":
        path.write_bytes(whole[:offset] + b"\xff" + whole[offset + 1 :])
    else:
        path.write_bytes(whole[: {"within": offset + 50, "between": offset, "before": 0}[where]])
    found = 0 if where == "before" else 1
    told = {"within": f"byte {offset}: the file ends", "length": f"byte {offset}: CRC mismatch of its length"}
    with pytest.raises(ValueError, match=told.get(where, f"{found} records found, dataset_info.json says 3")):
        convert(folder)
    dataset = convert(folder, skip_bad=True, overwrite=True)
    assert len(dataset.episodes) == 2 + found
    assert f"skipped in all (--skip-bad): {3 - found}" in capsys.readouterr().err


def test_a_missing_shard(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path)
    shard_path(folder, 0).unlink()
    with pytest.raises(ValueError, match="00000-of-00002: missing; 1 of 2 shards are, with 2 episodes"):
        convert(folder)
    assert not (tmp_path / "dataset").exists()
    assert len(convert(folder, skip_bad=True).episodes) == 3
    assert "skipped in all (--skip-bad): 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("steps/action", None, "lacks steps/action, which features.json names"),
        ("steps/action", np.zeros(4, np.float32), "steps/action is not 3 numbers in each of 6 steps"),
        ("steps/action", [b"abc"] * 18, "steps/action is not 3 numbers"),
        ("steps/observation/state", np.full(12, np.nan, np.float32), "state is not finite at step 0"),
        ("steps/observation/main", [], "has no step"),
        ("steps/observation/main", np.zeros(6, np.float32), "main cannot be decoded at step 0 (no JPEG or PNG)"),
        ("steps/observation/wrist/rgb", [encode_picture(9)], "rgb has 1 pictures in an episode of 6 steps"),
        (
            "steps/observation/main",
            [encode_picture(9)] * 5 + [encode_picture(9)[:-60]],
            "main cannot be decoded at step 5",
        ),
        ("steps/language_instruction", [b"\xff\xfe"] * 6, "not UTF-8"),
    ],
)
def test_an_episode_that_does_not_fit(tmp_path: Path, key: str, value: Any, told: str) -> None:
    bad = {name: values for name, values in {**episode(1), key: value}.items() if values is not None}
    folder = write_folder(tmp_path, [episode(0), bad, episode(2)], shards=1)
    with pytest.raises(ValueError, match=rf"record 1 at byte \d+: .*{re.escape(told)}"):
        convert(folder)
    assert len(convert(folder, skip_bad=True, resume=True).episodes) == 2


def test_what_is_no_example(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [episode(0)], shards=1)
    shard_path(folder, shards=1).write_bytes(frame(b"\xff\xff\xff"))
    with pytest.raises(ValueError, match="record 0 at byte 0: is not a tf"):
        convert(folder)


def test_blank_cameras_and_missing_instructions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    black = io.BytesIO()
    Image.new("RGB", (48, 32)).save(black, "JPEG")
    blank = {"steps/observation/main": [black.getvalue()] * STEPS}
    unlabelled = {"steps/language_instruction": [b" "] * STEPS}
    folder = write_folder(tmp_path, [episode(0), {**episode(1), **blank}, {**episode(2), **unlabelled}], shards=1)
    dataset = convert(folder)
    assert [item.instruction for item in dataset.episodes] == ["task 0", "task 1", ""]
    told = capsys.readouterr().err
    assert "camera main shows one colour throughout in 1 of 3 episodes" in told
    assert "without instruction: 1 of 3 episodes; --caption" in told
    dataset = convert(folder, camera=("main",), caption="wait", overwrite=True)
    assert [item.instruction for item in dataset.episodes] == ["task 0", "wait"]
    assert "no camera shows anything: 1 of 3" in capsys.readouterr().err


def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path)
    whole, out, add = convert(folder), tmp_path / "interrupted", writer.DatasetWriter.add_episode

    def interrupted(self, *arguments, **options):
        if self.num_episodes == 3:
            raise KeyboardInterrupt
        return add(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writer.DatasetWriter, "add_episode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, out=out)
    assert not (out / INFO).exists()
    with pytest.raises(ValueError, match="--resume"):
        convert(folder, out=out)
    with pytest.raises(ValueError, match="other settings"):
        convert(folder, out=out, resume=True, camera=("main",))
    resumed = convert(folder, out=out, resume=True)
    assert resumed.fingerprint == whole.fingerprint
    assert all((resumed.frames(number) == whole.frames(number)).all() for number in range(5))
    convert(folder, out=out, resume=True)


@given(payloads=st.lists(st.binary(max_size=40), min_size=1, max_size=4), data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_flipped_bit_and_no_truncation_is_silent(payloads: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(frame(payload) for payload in payloads)
    assert [record.payload for record in _read(whole)] == payloads
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    records = list(_read(bytes(flipped)))
    assert [record.error is not None for record in records].count(True) == 1
    assert all(record.payload == payloads[record.index] for record in records if record.error is None)
    end = data.draw(st.integers(0, len(whole) - 1))
    records = list(_read(whole[:end]))
    # Cut between two records, only the count of them tells.
    assert any(record.error for record in records) or len(records) < len(payloads)


@given(values=st.dictionaries(st.text(max_size=5), st.lists(st.integers(-(1 << 63), (1 << 63) - 1)), max_size=4))
@settings(max_examples=50, deadline=None)
def test_examples_read_as_they_were_written(values: dict[str, list[int]]) -> None:
    arrays: dict[str, Any] = {key: np.array(value, np.int64) for key, value in values.items()}
    parsed = parse_example(encode_example(arrays), [*arrays, "absent!"])
    assert set(parsed) == set(arrays)
    assert all((parsed[key] == array).all() and len(parsed[key]) == len(array) for key, array in arrays.items())


def _read(content: bytes) -> Iterator[Any]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield from read_records(Path(file.name))


def test_real_bridge_episodes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = SHARED / "bridge_rlds" / "bridge_dataset" / "1.0.0"
    if not folder.is_dir():
        pytest.skip("the shared sample data are not here")
    dataset = convert(folder, size=64, fps=None, out=tmp_path / "bridge")
    assert (len(dataset.episodes), dataset.num_frames, dataset.fps) == (25, 250, 5.0)
    assert dataset.cameras == ("image_0", "image_1", "image_2", "image_3")
    assert (dataset.action_dim, dataset.state_dim, len(dataset.tasks)) == (7, 7, 4)
    assert dataset.features["action"]["names"][-1] == "gripper"
    assert dataset.action_space is not None and dataset.action_space.control == "delta"
    assert dataset.action_space.binary == (False,) * 6 + (True,)
    assert "camera image_3 shows one colour throughout in 25 of 25" in capsys.readouterr().err
    # In Bridge, the first action of each episode is no motion.
    assert max(np.abs(dataset.actions(number)[0, :6]).max() for number in range(25)) < 1e-6
    with pytest.raises(ValueError, match=r"val\.tfrecord-00000-of-00001: missing; 1 of 1 shards"):
        convert(folder, split="val", fps=None, out=tmp_path / "val")
