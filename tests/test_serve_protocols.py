"""Which key of a client's message is which camera, and arrays in JSON."""

from __future__ import annotations

import base64
import difflib
import json
import re

import numpy as np
import pytest

from lapa.errors import UserError

pytest.importorskip("msgpack")
pytest.importorskip("websockets")

from lapa.serve.protocols import NAMED_MAPS, KeyMap, from_json, parse_body, to_json

A, B, C = (np.full((8, 8, 3), value, np.uint8) for value in (1, 2, 3))


@pytest.mark.parametrize(
    ("name", "cameras", "fitted"),
    [
        ("libero", ("image", "wrist_image"), {"observation/image": "image", "observation/wrist_image": "wrist_image"}),
        ("libero", ("wrist", "front"), {"observation/image": "front", "observation/wrist_image": "wrist"}),
        ("libero", ("top",), {"observation/image": "top"}),
        ("libero", ("hand",), {"observation/wrist_image": "hand"}),
        (
            "droid",
            ("exterior_image_2_left", "wrist_left", "front"),
            {
                "observation/exterior_image_2_left": "exterior_image_2_left",
                "observation/wrist_image_left": "wrist_left",
                "observation/exterior_image_1_left": "front",
            },
        ),
        (
            "aloha",
            ("high", "left_wrist", "right_wrist"),
            {
                "images/cam_high": "high",
                "images/cam_left_wrist": "left_wrist",
                "images/cam_right_wrist": "right_wrist",
            },
        ),
        ("bridge", ("image_0", "image_2"), {"observation/image_0": "image_0", "observation/image_2": "image_2"}),
        ("bridge", ("front",), {"observation/image_0": "front"}),
    ],
)
def test_a_named_map_finds_the_cameras_of_a_policy(name, cameras, fitted):
    assert KeyMap(cameras, (name,)).images == fitted


@pytest.mark.parametrize(
    ("maps", "cameras", "message"),
    [
        (("libero",), ("front", "side"), "not certain which key is the camera front, side"),
        (("libero",), ("image", "image2"), r"camera image2 .*observation/image -> image.*add KEY=image2"),
        (("aloha",), ("wrist",), "not certain which key is the camera wrist"),
        (("aloha",), ("wrist_l", "wrist_r"), "not certain which key is the camera wrist_l, wrist_r"),
        (("libro",), ("front",), "unknown --map 'libro'; did you mean 'libero'"),
        (("rgb=fornt",), ("front",), "unknown camera in --map rgb=fornt: 'fornt'; did you mean 'front'"),
        (("=front",), ("front",), "expected KEY=camera"),
    ],
)
def test_a_map_that_does_not_fit_is_named(maps, cameras, message):
    with pytest.raises(UserError, match=message):
        KeyMap(cameras, maps)


def test_a_pair_settles_what_a_named_map_leaves_open():
    keys = KeyMap(("image", "image2"), ("libero", "observation/wrist_image=image2"))
    found = keys.observation({"observation/image": A, "observation/wrist_image": B})
    assert found["image"] is A and found["image2"] is B
    own = KeyMap(("front",), ("rgb=front", "qpos=state", "say=instruction"), 2)
    assert own.observation({"rgb": A, "qpos": [1, 2], "say": "up"})["instruction"] == "up"
    assert own.wanted() == "rgb (camera front), qpos (2 numbers), prompt"


@pytest.mark.parametrize(
    "message",
    [
        {"front": A, "wrist": B, "state": [1.0, 2.0], "instruction": "up"},
        {"observation/front": A, "observation/wrist": B, "observation/state": np.array([1, 2]), "prompt": "up"},
        {"observation.images.front": A, "observation.images.wrist": B, "observation.state": (1, 2), "task": "up"},
        {"images": {"front": A, "wrist": B}, "state": np.array([1.0, 2.0]), "language_instruction": "up"},
        {"observation": {"images": {"front": A}, "wrist": B, "state": [1, 2]}, "prompt": "up"},
        {"full_image": A, "wrist": B, "state": [1, 2], "instruction": "up"},
        {"front": to_json(A), "wrist": to_json(B), "state": to_json(np.array([1.0, 2.0])), "instruction": "up"},
    ],
)
def test_a_policys_own_names_work_in_every_form(message):
    found = KeyMap(("front", "wrist"), (), 2).observation(message)
    assert set(found) == {"front", "wrist", "state", "instruction"} and found["instruction"] == "up"
    np.testing.assert_array_equal(found["front"], A)
    np.testing.assert_array_equal(found["wrist"], B)
    np.testing.assert_array_equal(found["state"], np.array([1, 2], np.float32))


def test_droids_state_is_put_together_and_its_second_view_may_be_left_out():
    keys = KeyMap(("exterior_1_left", "wrist"), ("droid",), 8)
    joints = np.arange(7, dtype=np.float64)
    message = {
        "observation/exterior_image_1_left": A,
        "observation/exterior_image_2_left": C,
        "observation/wrist_image_left": B,
        "observation/joint_position": joints,
        "prompt": "open",
    }
    for grip in (np.array([0.5]), np.float64(0.5), 0.5, [0.5]):
        found = keys.observation({**message, "observation/gripper_position": grip})
        np.testing.assert_array_equal(found["state"], [*joints, 0.5])
        assert found["exterior_1_left"] is A and found["wrist"] is B
    with pytest.raises(UserError, match=r"no observation/gripper_position; came .*joint_position"):
        keys.observation(message)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({}, "no image of the camera front, wrist; came nothing; wanted front, wrist, state (2 numbers), instruction"),
        ({"frnt": A, "wrist": B}, "no image of the camera front; unknown key 'frnt'; came frnt, wrist"),
        ({"front": A, "wrist": B, "promt": "up"}, "unknown key 'promt'; came front, wrist, promt"),
        ({"front": A, "wrist": B, "promt": "up"}, "did you mean 'prompt'?"),
        ({"observation/image_1": A, "observation/image_2": B}, "start the server with --map bridge"),
        ({"front": A, "observation/front": A, "wrist": B}, "'observation/front' gives front a second time"),
        ({"front": A, "wrist": B, "prompt": "a", "task": "b"}, "'task' gives instruction a second time"),
        ({3: A}, "a key is 3, expected text"),
        ({"front\x1b[2J": A}, r"unknown key 'front\x1b[2J'"),
        ({"front": A, "wrist": B, "state": "up"}, "state: 'up', expected numbers"),
        ({"front": A, "wrist": B, "state": [[1, 2], [3]]}, "state: lists of different lengths"),
        ({"front": A, "wrist": B, "state": [[1, 2]]}, "state: of shape [1, 2], expected a list of numbers"),
        ({"front": A, "wrist": B, "state": [10**30, 1]}, "expected numbers"),
        ({"front": A, "wrist": B, "state": [True, False]}, "expected numbers"),
    ],
)
def test_what_came_and_what_is_wanted_is_listed(message, told):
    with pytest.raises(UserError, match=re.escape(told)):
        KeyMap(("front", "wrist"), (), 2).observation(message)


def test_many_or_long_keys_are_not_compared_with_those_that_are_known(monkeypatch):
    compared, similar = [], difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", lambda key, *rest: compared.append(key) or similar(key, *rest))
    keys = KeyMap(("front",))
    with pytest.raises(UserError, match="more than 256 keys; wanted front, instruction"):
        keys.observation({f"{i}": {f"{j}": 0 for j in range(100)} for i in range(100)})
    with pytest.raises(UserError, match="no image of the camera front; unknown key 'kkk"):
        keys.observation({"k" * 1_000_000: 0})
    with pytest.raises(UserError, match="and 184 more"):
        keys.observation({f"front{i}": 0 for i in range(200)})
    assert compared == [f"front{i}" for i in range(16)]


def test_the_keys_of_every_named_map_are_distinct():
    for name, named in NAMED_MAPS.items():
        assert len(set(named.images)) == len(named.images), name
        assert not set(named.images) & set(named.state), name


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int64", ">f4", "float16"])
@pytest.mark.parametrize("shape", [(2, 3, 3), (4,), (), (0, 3)])
def test_arrays_survive_json(dtype, shape):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    again = from_json(json.loads(json.dumps(to_json(array))))
    assert again.dtype == array.dtype.newbyteorder("=") and again.shape == array.shape
    np.testing.assert_array_equal(again, array)


def literal(array: np.ndarray) -> dict[str, object]:
    """json_numpy's form, as its documentation has it."""
    return {"__numpy__": base64.b64encode(array.data).decode(), "dtype": array.dtype.str, "shape": array.shape}


def test_the_form_is_that_of_json_numpy():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert json.loads(json.dumps(to_json(array))) == json.loads(json.dumps(literal(array)))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dtype": "|O"}, "an array of dtype '|O'"),
        ({"dtype": "<U4"}, "only booleans, whole numbers and floats"),
        ({"dtype": None}, "an array of dtype None"),
        ({"shape": [-1, 3]}, "an array of shape [-1, 3]"),
        ({"shape": [2**40, 2**40]}, "expected at most 8 whole numbers"),
        ({"shape": [100_000, 100_000, 3]}, "does not have 12 bytes"),
        ({"shape": [True, 12]}, "an array of shape"),
        ({"shape": 12}, "an array of shape 12"),
        ({"shape": [0, *[2**31 - 1] * 3], "__numpy__": ""}, "is larger than any memory"),
        ({"__numpy__": "*"}, "not base64"),
        ({"__numpy__": 3}, "not base64"),
        ({"__numpy__": "ä"}, "not base64"),
    ],
)
def test_arrays_that_do_not_agree_are_refused(changed, told):
    with pytest.raises(UserError, match=re.escape(told)):
        from_json({**to_json(np.zeros((2, 2, 3), np.uint8)), **changed})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[]", b"3", b'{"encoded": "["}', b'{"encoded": "3"}', b"[" * 99_999, b"9" * 9999]
)
def test_bodies_that_are_no_objects_are_refused(body):
    with pytest.raises(UserError, match=r"expected a JSON object|not valid JSON"):
        parse_body(body)


def test_a_body_may_be_text_within_json():
    assert parse_body(b'{"instruction": "up"}') == ({"instruction": "up"}, False)
    assert parse_body(json.dumps({"encoded": '{"instruction": "up"}'}).encode()) == ({"instruction": "up"}, True)
