"""`lapa data rlds`: TFRecord framing and checksums, layouts of features, damaged and missing files, interruptions."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from lapa.data import writer
from lapa.data.convert import run
from lapa.data.dataset import CONTROLS, Dataset
from lapa.data.metadata import INFO
from lapa.data.pairs import FramePairs, PairsConfig
from lapa.data.spec import open_dataset
from lapa.data.transforms import resize_and_crop
from lapa.errors import UserError
from lapa.files import as_path
from lapa.sources import folder_scan
from lapa.sources.rlds import source as rlds
from lapa.sources.rlds import tfrecord
from lapa.sources.rlds.source import RldsConfig, RldsReading
from lapa.sources.rlds.table import KNOWN, POSE, columns
from lapa.sources.rlds.tfrecord import masked_crc, parse_example
from test_convert import listed
from tfds_files import (
    FEATURES,
    STEPS,
    encode_example,
    encode_image,
    episode,
    frame,
    group,
    image_node,
    shard_path,
    tensor,
    write_folder,
)

SHARED = Path(os.environ.get("LAPA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def convert(folder: Path, **options: Any) -> Dataset:
    out = options.pop("out", folder.parent.parent / "dataset")
    run(RldsConfig(str(folder), out=out, **{"size": 32, "fps": 5.0, "workers": 1, **options}))
    return open_dataset(out)


def opened(folder: Path | str, **options: Any) -> Dataset:
    """The same in place."""
    return RldsReading(str(folder), **{"fps": 5.0, **options}).open().dataset()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lapa" / "rlds"


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
        "observation": group(image=image_node(), natural_language_instruction=tensor("string")),
        "action": group(world_vector=tensor("float32", 3), open_gripper=tensor("bool")),
    }
    values = {
        "steps/observation/image": [encode_image(30)] * STEPS,
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
    assert space is not None and (space.names[6], space.binary[6], space.control) == ("gripper", True, "delta")


def test_what_does_not_fit_is_said_before_any_work(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    for options, message in (
        ({"camera": ("man",)}, "unknown camera 'man'; did you mean 'main'"),
        ({"camera": ("wrist_depth",)}, "unknown camera 'wrist_depth'"),
        ({"split": "val"}, "unknown split 'val'"),
        ({"size": 31}, "even number"),
        ({"limit": 0}, "at least 1"),
        ({"fps": -1.0}, "cannot be -1"),
        ({"folder": folder.parent}, "name the folder of a version, such as .*1.0.0"),
        ({"folder": tmp_path / "none"}, "name the folder of a TFDS dataset"),
    ):
        with pytest.raises(ValueError, match=message):
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


@pytest.mark.parametrize(
    ("feature", "problem"),
    [
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ('{"featuresDict": {"features": ' + "[" * 900 + "]" * 900 + "}}", "not valid here: JSON nested"),
        ('{"image": {"shape": 3}}', "describes no `steps`"),
        ('{"image": {"shape": {"dimensions": ["a"]}}}', "describes no `steps`"),
        ('{"tensor": {"shape": {"dimensions": [Infinity]}}}', "not valid JSON"),
    ],
)
def test_metadata_of_another_structure_is_named(tmp_path: Path, feature: str, problem: str) -> None:
    folder = write_folder(tmp_path)
    steps = '{"featuresDict": {"features": {"steps": {"sequence": {"feature": FEATURE}}}}}'
    (folder / "features.json").write_text(steps.replace("FEATURE", feature))
    with pytest.raises(UserError, match=rf"features\.json: {problem}"):
        opened(folder)
    splits = '[{"name": "train", "shardLengths": ["x"]}]'
    (folder / "dataset_info.json").write_text(f'{{"name": [1], "splits": {splits}}}')
    with pytest.raises(UserError, match=r"dataset_info\.json: lacks the name, the splits"):
        opened(folder)


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
    assert "left out, damaged: 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match=rf"record 1 at byte {offset}: CRC mismatch.*skip_bad=true"):
        opened(folder)
    assert [item.source[-1] for item in opened(folder, skip_bad=True).episodes] == ["0", "1", "0", "2"]
    assert "left out: " in capsys.readouterr().err


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
    message = {"within": f"byte {offset}: the file ends", "length": f"byte {offset}: CRC mismatch of its length"}
    with pytest.raises(ValueError, match=message.get(where, f"{found} records found, dataset_info.json expects 3")):
        convert(folder)
    dataset = convert(folder, skip_bad=True, overwrite=True)
    assert len(dataset.episodes) == 2 + found and listed(dataset) == {"records damaged or missing in others": 3 - found}
    assert f"episodes skipped: {3 - found}" in capsys.readouterr().err
    assert len(opened(folder, skip_bad=True).episodes) == 2 + found


def test_a_missing_shard(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path)
    shard_path(folder, 0).unlink()
    with pytest.raises(ValueError, match="00000-of-00002: missing; 1 of 2 shards are, with 2 episodes"):
        convert(folder)
    assert not (tmp_path / "dataset").exists()
    dataset = convert(folder, skip_bad=True)
    assert len(dataset) == 3 and listed(dataset) == {"shards missing": 1}
    assert "episodes skipped: 2" in capsys.readouterr().err
    assert len(opened(folder, skip_bad=True).episodes) == 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps/action", None, "lacks steps/action, which features.json names"),
        ("steps/action", np.zeros(4, np.float32), "steps/action is not 3 numbers in each of 6 steps"),
        ("steps/action", [b"abc"] * 18, "steps/action is not 3 numbers"),
        ("steps/observation/state", np.full(12, np.nan, np.float32), "state is not finite at step 0"),
        ("steps/observation/main", [], "has no step"),
        ("steps/observation/main", np.zeros(6, np.float32), "main cannot be decoded at step 0 (no image in JPEG, PNG"),
        ("steps/observation/wrist/rgb", [encode_image(9)], "rgb has 1 images in an episode of 6 steps"),
        (
            "steps/observation/main",
            [encode_image(9)] * 5 + [encode_image(9)[:-60]],
            "main cannot be decoded at step 5",
        ),
        ("steps/language_instruction", [b"\xff\xfe"] * 6, "not UTF-8"),
    ],
)
def test_an_episode_that_does_not_fit(tmp_path: Path, key: str, value: Any, message: str) -> None:
    bad = {name: values for name, values in {**episode(1), key: value}.items() if values is not None}
    folder = write_folder(tmp_path, [episode(0), bad, episode(2)], shards=1)
    with pytest.raises(ValueError, match=rf"record 1 at byte \d+: .*{re.escape(message)}"):
        convert(folder)
    assert len(convert(folder, skip_bad=True, resume=True).episodes) == 2


TEXTS = {"language_instruction": {"text": {}}, "language_instruction_2": {"text": {}}}
UNLABELLED = {key: feature for key, feature in FEATURES.items() if key != "language_instruction"}


def with_texts(tmp_path: Path, features: dict[str, Any], of_episode: dict[str, Any], **texts: list[bytes]) -> Path:
    """Two episodes with given texts, `/` in whose names is written as `__`, besides those of `UNLABELLED`."""
    episodes = [
        {**episode(number), **{key.replace("__", "/"): value for key, value in texts.items()}} for number in (0, 1)
    ]
    folder = write_folder(tmp_path, episodes, {**UNLABELLED, **features}, shards=1)
    steps = {"sequence": {"feature": group(**{**UNLABELLED, **features}), "length": "-1"}}
    (folder / "features.json").write_text(json.dumps(group(steps=steps, **of_episode)))
    return folder


@pytest.mark.parametrize(
    ("texts", "instruction", "said"),
    [
        # Of one feature the first that has words, and whether there is another.
        ({"steps__language_instruction": [b""] * 2 + [b" open it "] * 4}, "open it", None),
        (
            {"steps__language_instruction": [b""] * 2 + [b"open it"] * 3 + [b"shut it"]},
            "open it",
            "instruction changes",
        ),
        ({"steps__language_instruction": [b"b'open it'"] * 6}, "open it", None),
        ({"steps__language_instruction": [repr(repr(b"it's open").encode()).encode()] * 6}, "it's open", None),
        ({"steps__language_instruction": [rb"b'\xe2\x86\x92 left'"] * 6}, "\u2192 left", None),
        ({"steps__language_instruction": [b"b'a' + b'b'"] * 6}, "b'a' + b'b'", None),
        ({"steps__language_instruction": [b"b''"] * 6}, "", "without (an )?instruction"),
        # Of several the first that has words.
        ({"steps__language_instruction_2": [b"shut it"] * 6}, "shut it", None),
        (
            {"steps__language_instruction": [b"open it"] * 6, "steps__language_instruction_2": [b"shut it"] * 6},
            "open it",
            "other features hold other instructions",
        ),
        ({"steps__language_instruction": [b"a"] * 6, "steps__language_instruction_2": [b"a"] * 6}, "a", None),
        # Of the episode, where its steps have none.
        ({"episode_metadata__natural_language_instruction": [b"open it"]}, "open it", None),
        (
            {"episode_metadata__natural_language_instruction": [b"a"], "steps__language_instruction": [b"b"] * 6},
            "b",
            "other features hold other instructions",
        ),
        ({"episode_metadata__file_path": [b"b.tfrecord"]}, "", "without (an )?instruction"),
        ({"steps__observation__camera_model": [b"d435"] * 6}, "", "without (an )?instruction"),
    ],
)
def test_the_instruction_is_the_first_text_with_words(
    tmp_path: Path, texts: dict[str, list[bytes]], instruction: str, said: str | None, capsys: pytest.CaptureFixture
) -> None:
    bare = {"steps__language_instruction": [b""] * 6, "steps__language_instruction_2": [b""] * 6}
    bare |= {f"episode_metadata__{key}": [b""] for key in ("natural_language_instruction", "file_path")}
    bare |= {"steps__observation__camera_model": [b""] * 6}
    metadata = group(natural_language_instruction={"text": {}}, file_path={"text": {}})
    seen = group(**UNLABELLED["observation"]["featuresDict"]["features"], camera_model={"text": {}})
    folder = with_texts(tmp_path, {**TEXTS, "observation": seen}, {"episode_metadata": metadata}, **{**bare, **texts})
    for read in (opened, convert):
        assert [one.instruction for one in read(folder).episodes] == [instruction] * 2
        shown = capsys.readouterr().err
        counted = ("instruction changes", "other features hold other", "without (an )?instruction")
        assert [note for note in counted if re.search(rf"{note}[^\n]*: 2\n", shown)] == [
            note for note in counted if said and note in said
        ]


def test_a_text_that_is_not_known_is_taken_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    seen = group(**UNLABELLED["observation"]["featuresDict"]["features"], camera_model={"text": {}})
    metadata = {"episode_metadata": group(goal=tensor("string"))}
    texts = {"steps__observation__camera_model": [b"d435"] * 6, "episode_metadata__goal": [b"open it"]}
    folder = with_texts(tmp_path, {"observation": seen}, metadata, **texts)
    assert [one.instruction for one in opened(folder).episodes] == ["", ""]
    shown = capsys.readouterr().err
    assert "(observation/camera_model, episode_metadata/goal); --instruction-key KEY takes one" in shown
    for key, text in (("episode_metadata/goal", "open it"), ("observation/camera_model", "d435")):
        for dataset in (opened(folder, instruction_key=key), convert(folder, instruction_key=key, overwrite=True)):
            assert [one.instruction for one in dataset.episodes] == [text] * 2
        assert "none of its texts" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"unknown text feature 'goal' \(known: .*, episode_metadata/goal\)"):
        opened(folder, instruction_key="goal")
    dataset = open_dataset(f"rlds:{folder},fps=5,instruction_key=episode_metadata/goal")
    assert dataset.episodes[0].instruction == "open it"


def test_a_part_of_a_dataset_is_read_and_what_is_missing_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path)
    for number in range(2):
        shard_path(folder, number).rename(shard_path(folder, number, 32))
    for read in (opened, convert):
        assert [one.source for one in read(folder).episodes][::2] == [
            "made_up-train.tfrecord-00000-of-00032:0",
            "made_up-train.tfrecord-00001-of-00032:0",
            "made_up-train.tfrecord-00001-of-00032:2",
        ]
        shown = capsys.readouterr().err
        assert (
            "lists 2 shards with 5 episodes, the files are of 32 shards; the 2 that are here are read, missing: 30"
            in shown
        )
    # Not the first, and next to the only one of another number.
    shard_path(folder, 0, 32).rename(shard_path(folder, 30, 32))
    shutil.copy(shard_path(folder, 1, 32), shard_path(folder, 0, 7))
    assert len(opened(folder).episodes) == 5
    assert "shards of other numbers, not read: 1" in capsys.readouterr().err
    # Those that dataset_info.json names come first.
    shutil.copy(shard_path(folder, 30, 32), shard_path(folder, 0))
    with pytest.raises(UserError, match="00001-of-00002: missing; 1 of 2 shards are"):
        opened(folder)


@pytest.mark.parametrize(
    "template", ["../{DATASET}", "/{SHARD_INDEX}", "a/{SHARD_X_OF_Y}", "", "..", "a\n{SHARD_INDEX}"]
)
def test_shards_lie_in_the_folder(tmp_path: Path, template: str) -> None:
    folder = write_folder(tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = template or "{SPLIT}/../../{DATASET}"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"dataset_info\.json: .*(names no file inside|hold a folder)"):
        opened(folder)


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a\x1b[31m", "..", "", "a/b", "x" * 300])
def test_the_name_of_a_dataset_is_no_path(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "name": name}))
    with pytest.raises(UserError, match=r"dataset_info\.json: the dataset's name is"):
        opened(folder)


def test_a_template_of_repeated_numbers_names_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, shards=1)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = "{SHARD_INDEX}.{SHARD_INDEX}.{NUM_SHARDS}.(x"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    shard_path(folder, shards=1).rename(folder / "00003.00003.00009.(x")
    assert len(opened(folder).episodes) == 5


@pytest.mark.parametrize("size", [10**9, 10**30, 5_000])
def test_an_action_of_absurd_size_is_refused(tmp_path: Path, size: int) -> None:
    folder = write_folder(tmp_path, features={**FEATURES, "action": tensor("float32", size)})
    with pytest.raises(UserError, match=rf"{size} numbers a step are no action or state; expected up to 4096"):
        opened(folder)


def test_images_that_show_no_colour_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert opened(write_folder(tmp_path)).cameras == ("main", "wrist_rgb")
    assert "left out, no colour images (depth, masks): observation/wrist/depth" in capsys.readouterr().err


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
    message = capsys.readouterr().err
    for noted in ("camera main shows one colour throughout", "without an instruction"):
        assert re.search(rf"{re.escape(noted)}.*: 1\n", message)
    opened(folder)
    assert "made_up: without instruction" in capsys.readouterr().err
    dataset = convert(folder, camera=("main",), caption="wait", overwrite=True)
    assert [item.instruction for item in dataset.episodes] == ["task 0", "wait"]
    assert "left out, no camera shows anything: 1" in capsys.readouterr().err
    dataset = opened(folder, camera=("main",), caption="wait")
    assert [item.instruction for item in dataset.episodes] == ["task 0", "wait"]
    assert "left out, no camera shows anything: 1" in capsys.readouterr().err


def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path)
    whole, out, add = convert(folder), tmp_path / "interrupted", writer.DatasetWriter.add_episode_files

    def interrupted(self, *arguments, **options):
        if self.num_episodes == 3:
            raise KeyboardInterrupt
        return add(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writer.DatasetWriter, "add_episode_files", interrupted)
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


def test_a_dataset_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    alone, several = convert(folder), convert(folder, workers=2, out=tmp_path / "several")
    assert several.fingerprint == alone.fingerprint
    assert all((several.frames(number) == alone.frames(number)).all() for number in range(5))


def test_a_folder_in_place_is_what_it_is_converted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a päth with spaces")
    dataset, converted = opened(folder), convert(folder)
    assert [*map(tuple, _told(dataset))] == [*map(tuple, _told(converted))]
    assert (dataset.cameras, dataset.image_shape(), dataset.name) == (("main", "wrist_rgb"), (32, 48), "made_up")
    assert all((dataset.actions(number) == converted.actions(number)).all() for number in range(5))
    assert all((dataset.states(number) == converted.states(number)).all() for number in range(5))
    shown = resize_and_crop(dataset.frames(3, [5, 0, 5], "main"), 32).astype(int)
    assert np.abs(shown - converted.frames(3, [5, 0, 5], "main")).mean() < 4
    bare = opened(folder, camera=("wrist_rgb",), actions=False)
    assert (bare.cameras, bare.action_dim, bare.state_dim) == (("wrist_rgb",), None, None)


def _told(dataset: Dataset) -> list[tuple[Any, ...]]:
    return [(item.length, item.instruction, item.source) for item in dataset.episodes]


def test_a_spec_reads_the_same_in_any_number_of_workers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    dataset = open_dataset(f"mine=rlds:{folder},camera=wrist_rgb+main,fps=5,horizon=0.4:0.5")
    assert (dataset.name, dataset.cameras, dataset.weight) == ("mine", ("wrist_rgb", "main"), 0.5)
    pairs = FramePairs([dataset], PairsConfig(size=32, camera="main", cache_gib=0, held_out=0))
    assert len(pairs) == 5 * (STEPS - 2)
    alone, several = (list(DataLoader(pairs, batch_size=4, num_workers=num, collate_fn=list)) for num in (0, 2))
    for one, other in zip(chain(*alone), chain(*several), strict=True):
        assert (one["index"], one["episode"]) == (other["index"], other["episode"])
        assert (one["frames_TCHW"] == other["frames_TCHW"]).all()


def test_frames_of_an_episode_parse_its_record_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, parsed = opened(write_folder(tmp_path)), []
    monkeypatch.setattr(rlds, "parse_example", lambda *given: parsed.append(1) or parse_example(*given))
    clone = pickle.loads(pickle.dumps(dataset))
    for frame_index in range(STEPS):
        assert clone.frames(4, [frame_index]).shape == (1, 32, 48, 3)
    clone.actions(4)
    assert len(parsed) == 1
    monkeypatch.setattr(tfrecord, "KEPT_BYTES", 0)
    for number in (0, 1, 0):
        clone.frames(number, [0])
    assert len(parsed) == 4


def test_the_datasets_of_a_mixture_share_the_memory_for_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [opened(write_folder(tmp_path / str(number), [episode(number)], shards=1)) for number in range(4)]
    size = shard_path(tmp_path / "0" / "made_up" / "1.0.0", shards=1).stat().st_size
    monkeypatch.setattr(tfrecord, "KEPT_BYTES", 2 * size)
    parsed: list[int] = []
    monkeypatch.setattr(rlds, "parse_example", lambda *given: parsed.append(1) or parse_example(*given))
    for order, expected in (((0, 1, 2, 3), 4), ((3, 2), 4), ((0,), 5)):
        for number in order:
            assert datasets[number].actions(0)[0, 0] == number
        assert len(parsed) == expected


def test_a_dataset_is_known_again_in_a_folder_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(folder)
    assert len({opened(place).fingerprint for place in (folder, tmp_path / "copy", ".")}) == 1
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "version": "2.0.0"}))
    assert opened(folder).fingerprint != opened(tmp_path / "copy").fingerprint


def test_the_pass_over_the_records_is_kept_until_they_change(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path)
    passes, measure = [], rlds.RldsSource._measure
    monkeypatch.setattr(rlds.RldsSource, "_measure", lambda self: passes.append(1) or measure(self))
    first = opened(folder)
    assert opened(folder).fingerprint == first.fingerprint and len(passes) == 1
    (kept,) = own_cache.iterdir()
    whole = kept.read_bytes()
    for damaged in (whole.replace(b"task 0", b"task 9"), whole[:-20], b"", b"\xff\xfe", whole.replace(b"\n", b" ")):
        kept.write_bytes(damaged)
        assert opened(folder).fingerprint == first.fingerprint
    assert len(passes) == 6
    assert opened(folder, camera=("main",)).fingerprint == first.fingerprint and len(passes) == 7
    shard_path(folder).write_bytes(b"".join(frame(encode_example(episode(number))) for number in (3, 1)))
    assert opened(folder).fingerprint != first.fingerprint and len(passes) == 8
    (tmp_path / "cache").chmod(0o500)
    monkeypatch.setattr(folder_scan, "atomic_path", _refuse)
    assert len(opened(folder, caption="x").episodes) == 5


def test_another_version_looks_through_the_records_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    for version, expected in (("1", 1), ("1", 1), ("2", 2)):
        monkeypatch.setattr(folder_scan, "__version__", version)
        assert folder_scan.cached("rlds", ["key"], lambda: made.append(1) or 7) == 7
        assert len(made) == expected


def _refuse(path: Path) -> Any:
    raise PermissionError(f"{path}: no")


def test_a_image_that_breaks_in_the_middle_of_an_episode(tmp_path: Path) -> None:
    images = [encode_image(9)] * 3 + [encode_image(9)[:-60]] + [encode_image(9)] * 2
    broken = {**episode(1), "steps/observation/main": images}
    folder = write_folder(tmp_path, [episode(0), broken, episode(2)], shards=1)
    dataset = opened(folder)
    assert len(dataset.frames(1, [2, 4], "main")) == 2
    with pytest.raises(
        ValueError, match=r"record 1 at byte \d+: .*main cannot be decoded at step 3.*convert with.*--skip-bad"
    ):
        dataset.frames(1, [3], "main")
    assert len(convert(folder, skip_bad=True).episodes) == 2


def test_remote_folders_are_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    remote = as_path("memory://rlds/made_up/1.0.0")
    for path in folder.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    dataset = opened("memory://rlds/made_up/1.0.0")
    assert _told(dataset) == _told(opened(folder))
    assert (dataset.frames(2, [1]) == opened(folder).frames(2, [1])).all()
    assert len(convert(folder, out=tmp_path / "copy").episodes) == 5
    shard = remote / shard_path(folder).name
    shard.unlink()
    with pytest.raises(ValueError, match=r"memory:.*missing; 1 of 2 shards"):
        opened("memory://rlds/made_up/1.0.0")


def test_what_is_packed_or_compressed_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    path = shard_path(folder)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"record 0 at byte 0: the file is compressed \(gzip\).*gunzip"):
        convert(folder)
    features = {
        **FEATURES,
        "action": tensor("float32", 3),
        "note": {"tensor": {"dtype": "float32", "encoding": "zlib"}},
    }
    folder = write_folder(tmp_path / "packed", features=features)
    with pytest.raises(ValueError, match=r"no step feature 'note' of plain numbers.*note is packed \(zlib\)"):
        convert(folder, action_keys=("note",))
    for parts, message in (
        ("action[1:7]", "action has 3 numbers"),
        ("sin:action", "unknown operation sin"),
        ("a b", "as KEY"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(folder, action_keys=(parts,))


def test_images_whose_size_is_not_known(tmp_path: Path) -> None:
    features = json.loads(json.dumps(FEATURES))
    features["observation"]["featuresDict"]["features"]["main"]["image"]["shape"]["dimensions"] = ["-1", "-1", "3"]
    assert opened(write_folder(tmp_path, features=features)).image_shape("main") == (32, 48)


def test_rows_of_the_table_are_consistent() -> None:
    assert len(KNOWN) >= 29
    for name, known in KNOWN.items():
        widths = defaultdict(lambda: 64, {"action": 2} if name == "language_table" else {})
        widths |= dict.fromkeys(("action/world_vector", "action/rotation_delta", "observation/effector_translation"), 3)
        widths |= dict.fromkeys(
            ("action/open_gripper", "action/gripper_closedness_action", "action_dict/gripper_position"), 1
        )
        widths |= {"action_dict/cartesian_velocity": 6}
        if known.action == "action":
            widths["action"] = 7
        assert sum(part.num for part in columns(known.action, widths)) == len(POSE) == len(set(POSE)), name
        assert known.fps and known.fps > 0 and known.image and known.text, name
        assert known.control in (*CONTROLS, None), name
        assert known.state == "" or columns(known.state, widths), name
    unknown_control = sorted(name.split("_")[0] for name, known in KNOWN.items() if known.control is None)
    assert unknown_control == ["dlr", "iamlab", "ucsd"]


HALF = np.sqrt(0.5)
SPELLED = np.array([*map(ord, "push"), 0, 0], np.int64)
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], list[list[float]]]] = {
    # Name -> features, values of three steps, actions.
    "fractal20220817_data": (
        {
            "action": group(
                world_vector=tensor("float32", 3),
                rotation_delta=tensor("float32", 3),
                gripper_closedness_action=tensor("float32", 1),
            ),
            "observation": group(image=image_node(), other=image_node(), natural_language_instruction=tensor("string")),
        },
        {
            "action/world_vector": np.arange(9, dtype=np.float32),
            "action/rotation_delta": np.arange(9, dtype=np.float32),
            "action/gripper_closedness_action": np.array([0, 1, 0], np.float32),
            "observation/natural_language_instruction": [b"push"] * 3,
        },
        [[0, 1, 2, 0, 1, 2, 1], [3, 4, 5, 3, 4, 5, 0], [6, 7, 8, 6, 7, 8, 0]],
    ),
    "language_table": (
        {"action": tensor("float32", 2), "observation": group(rgb=image_node(), instruction=tensor("int32", 6))},
        {"action": np.arange(6, dtype=np.float32), "observation/instruction": np.tile(SPELLED, 3)},
        [[0, 1, 0, 0, 0, 0, 1], [2, 3, 0, 0, 0, 0, 1], [4, 5, 0, 0, 0, 0, 1]],
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": (
        {
            "action": tensor("float32", 8),
            "language_instruction": {"text": {}},
            "observation": group(image=image_node(), wrist_image=image_node()),
        },
        {
            # Quaternions x y z w: a quarter turn about z, one about x, and none, of length two.
            "action": np.concatenate(
                [[1, 2, 3, 0, 0, HALF, HALF, -1], [1, 2, 3, HALF, 0, 0, HALF, 1], [1, 2, 3, 0, 0, 0, 2, 0.25]]
            ).astype(np.float32),
            "language_instruction": [b"push"] * 3,
        },
        [[1, 2, 3, 0, 0, np.pi / 2, 1], [1, 2, 3, np.pi / 2, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0.75]],
    ),
    "berkeley_fanuc_manipulation": (
        {
            "action": tensor("float32", 6),
            "language_instruction": {"text": {}},
            "observation": group(image=image_node(), wrist_image=image_node(), state=tensor("float32", 13)),
        },
        {
            "action": np.tile(np.arange(6, dtype=np.float32), 3),
            "observation/state": np.repeat(np.array([1, 0, 1], np.float32), 13),
            "language_instruction": [b"push"] * 3,
        },
        [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 5, 1], [0, 1, 2, 3, 4, 5, 0]],
    ),
    "bridge_orig": (
        {
            "action": tensor("float32", 7),
            "language_instruction": {"text": {}},
            "observation": group(image_1=image_node(), image_0=image_node(), state=tensor("float32", 7)),
        },
        {
            "action": np.concatenate([[0, 1, 2, 3, 4, 5, opening] for opening in (0.5, 0.96, 0.4)]).astype(np.float32),
            "observation/state": np.zeros(21, np.float32),
            "language_instruction": [b"push"] * 3,
        },
        [[0, 1, 2, 3, 4, 5, 1], [0, 1, 2, 3, 4, 5, 1], [0, 1, 2, 3, 4, 5, 0]],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_dataset_of_the_table_gets_the_common_action(tmp_path: Path, name: str) -> None:
    features, values, actions = SHAPES[name]
    known = KNOWN[name]
    cameras = [key for key, node in features["observation"]["featuresDict"]["features"].items() if "image" in node]
    values = {**values, **{f"observation/{camera}": [encode_image(9)] * 3 for camera in cameras}}
    values = {f"steps/{key}": value for key, value in values.items()}
    dataset = convert(write_folder(tmp_path, [values], features, name=name, shards=1), fps=None)
    assert (dataset.fps, dataset.cameras[0], dataset.episodes[0].instruction) == (known.fps, known.image, "push")
    np.testing.assert_allclose(dataset.actions(0), actions, atol=1e-6)
    space = dataset.action_space
    assert space is not None and space.names == POSE and space.control == known.control
    assert space.binary == (False,) * 6 + (known.binary is True,)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("action", ["action[0:7]"]),
        ("action[-1] not:clip:action[-3:-1]", ["action[6:7]", "not:clip:action[4:6]"]),
        ("euler:action[:4] zeros[2] ones", ["euler:action[0:4]", "zeros[0:2]", "ones[0:1]"]),
        ("action[]", "expected a feature"),
        ("action[-]", "expected a feature"),
        ("zeros[:3]", "expected a feature"),
        ("action[-9:3]", "action has 7 numbers"),
        ("action[-8]", "action has 7 numbers"),
        ("action[7]", "action has 7 numbers"),
        ("action[3:2]", "action has 7 numbers"),
        ("euler:action[:3]", "action has 7 numbers"),
    ],
)
def test_parts_are_taken_as_they_are_written_or_refused(parts: str, expected: list[str] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            columns(parts, {"action": 7})
    else:
        assert [str(part) for part in columns(parts, {"action": 7})] == expected


def test_every_number_of_an_action_has_a_name_of_its_own(tmp_path: Path) -> None:
    features, values = dict(FEATURES), episode(0)
    for side in ("left", "right"):
        features[side] = group(action=tensor("float32", 1))
        values[f"steps/{side}/action"] = np.zeros(STEPS, np.float32)
    folder = write_folder(tmp_path, [values], features, shards=1)
    for keys, names in (
        (("left/action", "right/action"), ("left_action_0", "right_action_0")),
        (("action[1]", "not:action[1]"), ("action_1_at_0", "action_1_at_1")),
        (("zeros", "action[0]"), ("zeros_0", "action_0")),
    ):
        space = opened(folder, action_keys=keys).action_space
        assert space is not None and space.names == names


def test_a_gripper_that_is_moved_is_open_or_shut() -> None:
    (part,) = columns("moves:closing", {"closing": 1})
    for moves, opened_ in (
        ([0, 0, 1, 0, -1, 0], [1, 1, 0, 0, 1, 1]),
        ([0, -1, 0], [0, 1, 1]),
        ([0, 0.05, 0], [1, 1, 1]),
        ([1, 1, -0.5], [0, 0, 1]),
    ):
        rows = part.of({"closing": np.array(moves, np.float32)[:, None]}, len(moves))
        assert rows[:, 0].tolist() == opened_


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
    assert re.search(r"camera image_3 shows one colour throughout.*: 25\n", capsys.readouterr().err)
    # In Bridge, the first action of each episode is no motion.
    assert max(np.abs(dataset.actions(number)[0, :6]).max() for number in range(25)) < 1e-6
    inplace = RldsReading(str(folder)).open().dataset()
    assert inplace.cameras == dataset.cameras and [*_told(inplace)] == [*_told(dataset)]
    for number, camera in ((0, "image_0"), (24, "image_1")):
        same = resize_and_crop(inplace.frames(number, None, camera), 64).astype(int) - dataset.frames(
            number, None, camera
        )
        assert np.abs(same).mean() < 5
        assert (inplace.actions(number) == dataset.actions(number)).all()
    with pytest.raises(ValueError, match=r"val\.tfrecord-00000-of-00001: missing; 1 of 1 shards"):
        convert(folder, split="val", fps=None, out=tmp_path / "val")
