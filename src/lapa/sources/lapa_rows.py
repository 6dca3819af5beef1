"""Rows of the released LAPA code's files, and which of them are one episode.

A row of its JSONL for pretraining, and of its JSON list for finetuning (https://github.com/LatentActionPretraining/LAPA):

    {"instruction": "<s> You are ...", "vision": ["754", ...], "delta": ["3", ...], "fields": "[instruction],..."}
    {"id": "episode_0/step_0", "image": "0/step_0.jpg", "conversations": [{"value": ...}, {"raw_actions": [...]}]}

vision: codes of the picture; delta: the latent action. Axes: N codes of a picture, L latent action length, A actions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lapa.errors import UserError
from lapa.files import open_binary, reading

# What the released code puts around the task in words; policies put it there again (`--prompt paper`).
ROLES = re.compile(r"(?:<s>\s*)*(?:You are a helpful assistant\.)?\s*(?:USER:)?(.*?)(?:ASSISTANT:)?\s*", re.DOTALL)
QUESTION = re.compile(r"\s*What action should the robot take to `(.*)`[.?]?\s*", re.DOTALL)
PICTURE = re.compile(r"<image>\s*")
# The number of a step at the end of an id or a path, and before it what names the episode.
STEP = re.compile(r"(.+?)[/_-](?:[A-Za-z]+[_-]?)?(\d{1,9})(?:\.[A-Za-z]+)?")
CONTROLS = ("<|bos|>", "<|eos|>")
LARGEST = 10**9


@dataclass(frozen=True)
class Row:
    """One step. name: its id, or else its picture's path; empty or None: what it has not."""

    name: str
    image: str
    instruction: str
    vision_N: tuple[int, ...] | None
    delta_L: tuple[int, ...] | None
    actions_A: np.ndarray | None
    states_S: np.ndarray | None
    state_names: tuple[str, ...]

    @property
    def episode(self) -> tuple[str, int] | None:
        """The name of its episode and the number of its step there, where its name tells."""
        match = STEP.fullmatch(self.name)
        return (match[1], int(match[2])) if match else None


def existing(path: Path) -> Path:
    """The path, which must be a file. UserError, with the mend, where it is none."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; name a JSONL file, or a JSON list, of the released LAPA code")
    return path


def find_rows(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line or number in the list, first byte, content) of each row of a JSONL file or a JSON list.

    UserError where the list is no JSON: what comes after that place cannot be found.
    """
    with reading(path), open_binary(path) as file:
        head = file.read(64).lstrip()
        file.seek(0)
        if head.startswith(b"["):
            yield from _list_rows(file.read(), path)
            return
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def read_row(path: Path, offset: int, length: int) -> Row:
    """The row at a place in the file. UserError, which does not name it, where it is malformed."""
    with reading(path), open_binary(path) as file:
        file.seek(offset)
        return parse_row(file.read(length))


def parse_row(content: bytes) -> Row:
    """A row of either file. UserError, which does not name it, where it is malformed."""
    try:
        row = json.loads(content.decode())
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"is not valid JSON ({error.msg} at character {error.pos})") from None
    except (RecursionError, ValueError):
        raise UserError("is not valid JSON (nested too deeply, or a number of thousands of digits)") from None
    if not isinstance(row, dict):
        raise UserError(f"is not a JSON object, but {type(row).__name__}")
    if "conversations" in row:
        row = {**row, **_of_conversation(row["conversations"])}
    _require_fields(row)
    image, instruction = (_text(row, key) for key in ("image", "instruction"))
    states = _numbers_by_name(row.get("states"))
    return Row(
        _text(row, "id") or image,
        image,
        task_in_words(instruction),
        _whole_numbers(row, "vision"),
        _whole_numbers(row, "delta"),
        _numbers(row.get("raw_actions"), "raw_actions"),
        None if states is None else np.array([number for _, number in states], np.float32),
        () if states is None else tuple(name for name, _ in states),
    )


def task_in_words(instruction: str) -> str:
    """An instruction without what the released code puts around it."""
    match = ROLES.fullmatch(PICTURE.sub("", instruction))
    assert match is not None, "the pattern takes any text"
    asked = QUESTION.fullmatch(match[1])
    # Half a surrogate pair is no character: files refuse it.
    return (asked[1] if asked else match[1]).strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _list_rows(content: bytes, path: Path) -> Iterator[tuple[int, int, bytes]]:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    decoder, ascii_only = json.JSONDecoder(), text.isascii()
    position = text.index("[") + 1
    # Bytes before `counted` characters.
    counted, offset = 0, 0
    for number in range(len(text)):
        position = _after_space(text, position)
        if number == 0 and text[position : position + 1] == "]":
            break
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: row {number}, at character {position}, is not valid JSON") from None
        offset = position if ascii_only else offset + len(text[counted:position].encode())
        counted = position
        yield number, offset, text[position:end].encode()
        position = _after_space(text, end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            raise UserError(f"{path}: expected a comma or ] after row {number}, at character {position}")
        position += 1
    if text[position + 1 :].strip():
        raise UserError(f"{path}: goes on after the end of its list, at character {position + 1}")


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _of_conversation(conversation: Any) -> dict[str, Any]:
    """What the person says, and what the robot does, under the names that JSONL rows give them."""
    try:
        said, done = conversation[0]["value"], conversation[1]
        return {"instruction": said, **{key: done[key] for key in ("raw_actions", "states") if key in done}}
    except (TypeError, KeyError, IndexError):
        raise UserError("`conversations` must be the words of a person and the actions of the robot") from None


def _require_fields(row: Mapping[str, Any]) -> None:
    """`fields` says what the released code reads of a row, in one order or a choice of several."""
    fields = row.get("fields", "")
    for choice in fields if isinstance(fields, list) else [fields]:
        if not isinstance(choice, str):
            raise UserError(f"`fields` must be text such as '[instruction],[vision],delta', got {choice!r}")
        for field in filter(None, (part.strip().strip("[]") for part in choice.replace("+", ",").split(","))):
            if field not in row and field not in CONTROLS:
                raise UserError(f"`fields` names {field}, which the row lacks")


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key) or ""
    if key == "id" and isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"`{key}` is not text")
    return value


def _whole_numbers(row: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """Codes, as numbers or as text."""
    values = row.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not values:
        raise UserError(f"`{key}` is not a list of codes")
    # Hundreds of codes in each of millions of rows: looked at one by one only where they are not all text of digits.
    if set(map(type, values)) == {str}:
        digits, lengths = "".join(values), set(map(len, values))
        if digits.isascii() and digits.isdigit() and 0 < min(lengths) <= max(lengths) < 10:
            return tuple(map(int, values))
    codes = []
    for value in values:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else value
        if type(number) is not int or not 0 <= number < LARGEST:
            raise UserError(f"`{key}` holds {str(value)[:20]!r}, which is no code")
        codes.append(number)
    return tuple(codes)


def _numbers(values: Any, key: str) -> np.ndarray | None:
    if values is None:
        return None
    if not isinstance(values, list) or not values or any(type(value) not in (int, float) for value in values):
        raise UserError(f"`{key}` is not a list of numbers")
    try:
        numbers = np.array(values, np.float64)
    except OverflowError:
        numbers = np.array([np.inf])
    if not (np.abs(numbers) <= np.finfo(np.float32).max).all():
        raise UserError(f"`{key}` holds a number that is not finite")
    return numbers.astype(np.float32)


def _numbers_by_name(states: Any) -> list[tuple[str, float]] | None:
    """The robot's state: a number or a list of them under each name."""
    if states is None:
        return None
    if not isinstance(states, dict) or not states:
        raise UserError("`states` is not an object of numbers")
    found = []
    for name, value in states.items():
        numbers = _numbers(value if isinstance(value, list) else [value], f"states {name}")
        assert numbers is not None
        single = not isinstance(value, list)
        found += [(name if single else f"{name}_{place}", float(number)) for place, number in enumerate(numbers)]
    return found
