"""From the messages of robots' clients to observations: which key is which camera, and arrays in JSON.

    keys = KeyMap(("front", "wrist"), ("libero",))
    keys.observation({"observation/image": a, "observation/wrist_image": b, "observation/state": s, "prompt": "open"})
    # {"front": a, "wrist": b, "state": s, "instruction": "open"}, which Policy.infer takes

A key is compared without `observation` and `images` in front, nested or joined by `/` or `.`: `front`,
`observation/front`, `observation.images.front` and {"images": {"front": ...}} are the same. The policy's own names
always work; NAMED_MAPS has the keys that clients of widespread benchmarks and robots send.

Arrays in JSON have the form of json_numpy: {"__numpy__": base64 of the bytes, "dtype": "|u1", "shape": [224, 224, 3]}.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from lapa.errors import UserError, shown, unknown
from lapa.files import parse_json
from lapa.serve.client import DTYPE, MAX_AXES

STATE, INSTRUCTION = "state", "instruction"
INSTRUCTIONS = (INSTRUCTION, "prompt", "task", "language_instruction")
# Words that do not identify a camera, and those of a camera that moves with the hand.
FILLERS = {"image", "images", "cam", "camera", "rgb"}
WRIST = {"wrist", "hand", "gripper"}
# An image in REST, as OpenVLA's clients send it, is that of the main camera.
MAIN = ("image", "full_image")
DEEPEST, SHOWN_KEYS = 3, 16
# Of an observation; an error looks for known keys that are like an unknown one of up to that length.
MOST_KEYS, LONGEST_LIKE = 256, 100


@dataclass(frozen=True)
class NamedMap:
    """The keys of one kind of client. images: the main camera first. state: keys whose values are concatenated."""

    images: tuple[str, ...]
    state: tuple[str, ...]


NAMED_MAPS = {
    "libero": NamedMap(("observation/image", "observation/wrist_image"), ("observation/state",)),
    "droid": NamedMap(
        (
            "observation/exterior_image_1_left",
            "observation/exterior_image_2_left",
            "observation/wrist_image_left",
        ),
        ("observation/joint_position", "observation/gripper_position"),
    ),
    "aloha": NamedMap(
        ("images/cam_high", "images/cam_low", "images/cam_left_wrist", "images/cam_right_wrist"), ("state",)
    ),
    "bridge": NamedMap(
        ("observation/image_0", "observation/image_1", "observation/image_2", "observation/image_3"),
        ("observation/state",),
    ),
}


class KeyMap:
    """Which key of a message is which camera of a policy, its state and the instruction.

    images: key -> camera, as clients may send it. state: keys whose values make up the state.
    """

    def __init__(self, cameras: Sequence[str], maps: Sequence[str] = (), state_dim: int = 0) -> None:
        """maps: names of NAMED_MAPS, and KEY=camera. Raises UserError for an unknown one, or where a map has no key
        for a camera."""
        self.cameras, self.state_dim = tuple(cameras), state_dim
        given = dict(_pair(text, cameras) for text in maps if "=" in text)
        self.images = {key: camera for key, camera in given.items() if camera in cameras}
        self.state: tuple[str, ...] = tuple(key for key, target in given.items() if target == STATE)
        self._instructions = {*INSTRUCTIONS, *(_plain(key) for key, target in given.items() if target == INSTRUCTION)}
        self._unused: set[str] = set()
        for name in maps:
            if "=" in name:
                continue
            if name not in NAMED_MAPS:
                raise unknown("--map", name, [*NAMED_MAPS, "KEY=camera"])
            named = NAMED_MAPS[name]
            self.images |= _fitted(name, named.images, cameras, self.images)
            self.state = self.state or named.state
            self._unused |= {_plain(key) for key in named.images}
        self._by_key = {_plain(key): camera for key, camera in self.images.items()}
        for camera in cameras:
            self._by_key.setdefault(_plain(camera), camera)
        main = [camera for camera in cameras if not _words(camera) & WRIST]
        if len(main) == 1 or len(cameras) == 1:
            for key in MAIN:
                self._by_key.setdefault(key, (main or cameras)[0])
        self._states = [_plain(key) for key in self.state]

    @property
    def unnamed(self) -> list[str]:
        """Cameras that no map names: their own name is their key."""
        return [camera for camera in self.cameras if camera not in self.images.values()]

    def wanted(self) -> str:
        """Returns the keys that a message must have, as one line."""
        named = {camera: key for key, camera in reversed(self.images.items())}
        parts = [f"{named[camera]} (camera {camera})" if camera in named else camera for camera in self.cameras]
        if self.state_dim:
            parts.append(f"{' + '.join(self.state) or STATE} ({self.state_dim} numbers)")
        return ", ".join([*parts, "prompt" if self.images else INSTRUCTION])

    def observation(self, message: Mapping[Any, Any]) -> dict[str, Any]:
        """Returns a message as `Policy.infer` takes it: arrays by camera, "instruction", and "state" if there is one.

        Raises UserError listing what came and what is wanted for a key that is unknown, missing or given twice, and for
        a state that is no list of numbers.
        """
        found: dict[str, Any] = {}
        states: dict[str, Any] = {}
        strange = []
        entries = list(islice(_flat(message), MOST_KEYS + 1))
        if len(entries) > MOST_KEYS:
            raise UserError(f"more than {MOST_KEYS} keys; wanted {self.wanted()}")
        for key, value in entries:
            plain = _plain(key)
            if plain in self._by_key:
                name = self._by_key[plain]
            elif plain in self._states:
                if plain in states:
                    raise UserError(f"{shown(key)} is given twice; came {_listed(message)}")
                states[plain] = value
                continue
            elif plain == STATE or plain in self._instructions:
                name = STATE if plain == STATE else INSTRUCTION
            elif plain in self._unused:
                continue
            else:
                strange.append(key)
                continue
            if name in found:
                raise UserError(f"{shown(key)} gives {name} a second time; came {_listed(message)}")
            found[name] = value
        missing = [camera for camera in self.cameras if camera not in found]
        if missing or strange:
            problems = [f"no image of the camera {', '.join(missing)}"] if missing else []
            problems += [f"unknown key {', '.join(map(shown, strange[:SHOWN_KEYS]))}"] if strange else []
            raise UserError(
                f"{'; '.join(problems)}; came {_listed(message)}; wanted {self.wanted()}{self._hint(strange)}"
            )
        if states and STATE in found:
            raise UserError(f"the state is given twice; came {_listed(message)}")
        if states:
            if lacking := [key for key in self.state if _plain(key) not in states]:
                raise UserError(f"no {', '.join(lacking)}; came {_listed(message)}; wanted {self.wanted()}")
            found[STATE] = np.concatenate([np.atleast_1d(_numbers(states[key], key)) for key in self._states])
        elif found.get(STATE) is not None:
            found[STATE] = _numbers(found[STATE], STATE)
        return found

    def _hint(self, strange: Sequence[str]) -> str:
        """Returns the named map whose keys these are, or the nearest known key, as the end of an error."""
        for name, named in NAMED_MAPS.items():
            if strange and {_plain(key) for key in strange} <= {_plain(key) for key in (*named.images, *named.state)}:
                return f"; these are keys of {name}: start the server with --map {name}"
        known = [*self._by_key, STATE, *self._states, *self._instructions]
        brief = [_plain(key) for key in strange[:SHOWN_KEYS] if len(key) <= LONGEST_LIKE]
        near = [close[0] for key in brief if (close := difflib.get_close_matches(key, known, 1, 0.7))]
        return f"; did you mean {near[0]!r}?" if near else ""


def parse_body(body: bytes) -> tuple[dict[str, Any], bool]:
    """Returns the JSON object of a request, and whether it came as text within JSON: {"encoded": "..."}.

    Raises UserError for anything else. Arrays are left as json_numpy has them.
    """
    value, encoded = _parse(body), False
    if isinstance(value, dict) and list(value) == ["encoded"] and isinstance(value["encoded"], str):
        value, encoded = _parse(value["encoded"]), True
    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object, got {type(value).__name__}")
    return value, encoded


def from_json(values: Mapping[str, Any]) -> np.ndarray:
    """Returns the array that json_numpy's form holds. Raises UserError where bytes, dtype and shape do not agree."""
    data, dtype, shape = values["__numpy__"], values.get("dtype"), values.get("shape")
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise UserError(f"an array of dtype {shown(dtype)}; only booleans, whole numbers and floats are taken")
    whole = isinstance(shape, list) and len(shape) <= MAX_AXES and all(type(size) is int for size in shape)
    if not isinstance(shape, list) or not whole or any(not 0 <= size < 2**31 for size in shape):
        raise UserError(f"an array of shape {shown(shape)}; expected at most {MAX_AXES} whole numbers")
    try:
        decoded = base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise UserError("an array whose __numpy__ is not base64") from None
    kind = np.dtype(dtype)
    if math.prod(shape) * kind.itemsize != len(decoded):
        raise UserError(f"an array of shape {shape} and dtype {dtype} does not have {len(decoded)} bytes")
    try:
        return np.frombuffer(decoded, kind).reshape(shape).astype(kind.newbyteorder("="))
    except ValueError:
        raise UserError(f"an array of shape {shape} is larger than any memory") from None


def to_json(array: np.ndarray) -> dict[str, Any]:
    """Returns an array in json_numpy's form."""
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def _parse(text: str | bytes) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({shown(str(error))})") from None


def _flat(message: Mapping[Any, Any], prefix: str = "", depth: int = DEEPEST) -> Iterator[tuple[str, Any]]:
    """The values of nested maps under keys joined by `/`; arrays of JSON as arrays."""
    for key, value in message.items():
        if not isinstance(key, str):
            raise UserError(f"a key is {shown(key)}, expected text")
        if isinstance(value, Mapping) and "__numpy__" in value:
            yield f"{prefix}{key}", from_json(value)
        elif isinstance(value, Mapping) and depth:
            yield from _flat(value, f"{prefix}{key}/", depth - 1)
        else:
            yield f"{prefix}{key}", value


def _plain(key: str) -> str:
    """Returns a key without `observation` and `images` in front of it."""
    return re.sub(r"^(observation/)?(images/)?(?=.)", "", key.replace(".", "/"))


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[/._\-]", _plain(name).lower()) if word and word not in FILLERS}


def _pair(text: str, cameras: Sequence[str]) -> tuple[str, str]:
    """Returns the key and the target of KEY=camera. Raises UserError for an unknown camera."""
    key, _, target = text.rpartition("=")
    if not key:
        raise UserError(f"--map {text}: expected KEY=camera")
    if target not in (*cameras, STATE, INSTRUCTION):
        raise unknown(f"camera in --map {text}:", target, [*cameras, STATE, INSTRUCTION])
    return key, target


def _fitted(name: str, keys: Sequence[str], cameras: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Returns key -> camera for a named map: by name, then the one camera that is left on the wrist or elsewhere.

    given: key -> camera that were given. Raises UserError where a camera has no key for certain.
    """
    taken, found = {_plain(key) for key in given}, {}
    left = [camera for camera in cameras if camera not in given.values()]
    open_keys = [key for key in keys if _plain(key) not in taken]
    for key in open_keys:
        same = [c for c in left if _plain(c) == _plain(key) or (_words(c) and _words(c) == _words(key))]
        if same:
            found[key] = same[0]
            left.remove(same[0])
    for on_wrist in (False, True):
        fit = [key for key in open_keys if key not in found and bool(_words(key) & WRIST) == on_wrist]
        of_kind = [camera for camera in left if bool(_words(camera) & WRIST) == on_wrist]
        # Of several fixed cameras the first is the main one; of two wrists neither is.
        if len(of_kind) == 1 and fit and (len(fit) == 1 or not on_wrist):
            found[fit[0]] = of_kind[0]
            left.remove(of_kind[0])
    if left:
        pairs = ", ".join(f"{key} -> {found[key]}" if key in found else key for key in keys)
        raise UserError(
            f"--map {name}: it is not certain which key is the camera {', '.join(left)} (its keys: {pairs}); "
            f"add {' '.join(f'KEY={camera}' for camera in left)}"
        )
    return {key: found[key] for key in keys if key in found}


def _numbers(value: Any, key: str) -> np.ndarray:
    """Returns a state as an array of numbers, floats as float32. Raises UserError where it is none."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise UserError(f"{key}: lists of different lengths, expected numbers") from None
    if array.dtype.kind not in "iuf":
        raise UserError(f"{key}: {shown(value)}, expected numbers")
    if array.ndim > 1:
        raise UserError(f"{key}: of shape {list(array.shape)}, expected a list of numbers")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _listed(message: Mapping[Any, Any]) -> str:
    """Returns the keys of a message, as one line."""
    keys = [shown(key)[1:-1] for key, _ in _flat(message)]
    more = len(keys) - SHOWN_KEYS
    return ", ".join(keys[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "") or "nothing"
