"""The released LAPA code's files, labels included: its JSONL for pretraining, and its JSON list for finetuning.

    lapa data lapa-jsonl latent_action_pretraining_openx.jsonl --out OPENX       # the labels: OPENX/labels/released
    lapa policy pretrain --policy LWM --data lapa-jsonl:latent_action_pretraining_openx.jsonl \\
        --labels OPENX/labels/released --out POLICY
    lapa data lapa-jsonl finetune.json --images . --out data/finetune

A row of the one and of the other (https://github.com/LatentActionPretraining/LAPA); `vision` holds the codes of an
image, `delta` the latent action:

    {"instruction": "<s> You are ...", "vision": ["754", ...], "delta": ["3", ...], "fields": "[instruction],..."}
    {"id": "episode_0/step_0", "image": "0/step_0.jpg", "conversations": [{"value": ...}, {"raw_actions": [...]}]}

The published JSONL contains codes of images and no images: an `lwm` policy reads them in place. Rows whose ids or paths
name the step of an episode are put together, others are an episode each.
Axes: T time, H W image, N codes of an image, L latent action length, A actions, S state.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, overload

import numpy as np
import tyro
from jaxtyping import Int

from lapa import config as configs
from lapa.console import finish, progress, say, warn
from lapa.data import convert
from lapa.data.config import ConvertOptions
from lapa.data.dataset import ACTION, STATE, ActionSpace, Dataset
from lapa.data.labels import MANIFEST, EpisodeLabels, Manifest, shard_path, write_manifest, write_shard
from lapa.data.lerobot import LeRobotDataset
from lapa.data.source import Clip, Item, Reading, Source, SourceDataset
from lapa.data.spec import open_dataset
from lapa.data.transforms import read_image
from lapa.errors import UserError
from lapa.files import as_path, claim_output, errors_about, inside, open_binary, reading, whole_characters
from lapa.locks import locks_output
from lapa.sources.folder_scan import cached, file_state, require_rate
from lapa.sources.rlds.table import POSE

CAMERA = "image"
LABELS = Path("labels", "released")
# Pixels of a side that one code of the released image tokenizer stands for.
CODE_SIDE = 16
EPISODES_PER_SHARD = 10_000
FIX_ROW = "correct the row, or leave out what is malformed: --skip-bad, or skip_bad=true with --data"
# What the released code puts around the task in words; policies put it there again (`--prompt paper`).
ROLES = re.compile(r"(?:<s>\s*)*(?:You are a helpful assistant\.)?\s*(?:USER:)?(.*?)(?:ASSISTANT:)?\s*", re.DOTALL)
QUESTION = re.compile(r"\s*What action should the robot take to `(.*)`[.?]?\s*", re.DOTALL)
IMAGE_TAG = re.compile(r"<image>\s*")
# The number of a step at the end of an id or a path, and before it the name of the episode.
STEP = re.compile(r"(.+?)[/_-](?:[A-Za-z]+[_-]?)?(\d{1,9})(?:\.[A-Za-z]+)?")
CONTROLS = ("<|bos|>", "<|eos|>")
LARGEST_CODE = 10**9
# Before and between the rows of a JSON list; group 1 is "]" where it ends.
LIST_START, BETWEEN_ROWS = re.compile(r"\s*\[[ \t\r\n]*(\]?)"), re.compile(r"[ \t\r\n]*([,\]])[ \t\r\n]*")


@dataclass(frozen=True)
class LapaJsonlReading(Reading):
    """How a file of the released LAPA code is read."""

    file: Annotated[str, tyro.conf.Positional]
    """JSONL for pretraining or finetuning, or JSON list for finetuning. May be a URL."""
    images: str | None = None
    """Folder that the rows' image paths begin in; without it the codes in `vision` are read in place of images where
    the rows have any, else images next to the file."""
    actions: bool = True
    """Read `raw_actions` and `states`."""
    fps: float = 5.0
    """Rows a second, which the files do not contain."""
    image_codes: int = 256
    """Codes of one image; of several images in `vision` the first is read."""
    skip_bad: bool = False
    """Leave out, and count, malformed rows."""

    def open(self) -> LapaJsonlSource:
        return LapaJsonlSource(self)


@dataclass(frozen=True)
class LapaJsonlConfig(ConvertOptions, LapaJsonlReading):
    """Turn a file of the released LAPA code into a dataset with labels; codes without images, into labels."""

    codebook_size: int = 8
    """Number of latent action codes, of which `delta` holds a few."""
    horizon: float = 0.6
    """Seconds that a latent action spans, as far as it is known; noted in the labels."""
    NAMES: ClassVar[tuple[str, ...]] = ("lam",)
    lam: str = "released"
    """Name of the latent action model that made `delta`: policies refuse to mix labels of two."""


@locks_output
def run(config: LapaJsonlConfig) -> None:
    """`lapa data lapa-jsonl`."""
    source, out = config.open(), as_path(config.out)
    labels = out / LABELS
    if not source.coded:
        convert.run(config)
        if not source.latent_length:
            return
        if config.rate not in (None, source.fps) or config.cut_shots:
            warn("labels are not written: with --rate or --cut-shots, frames are not those of the rows")
            return
        dataset, words = open_dataset(config.out), ["--data", str(config.out)]
    else:
        if not source.latent_length:
            raise UserError(f"{config.file}: has codes of images, and no `delta` to label them with; give --images")
        say(f"{config.file}: has codes and no images; its labels are written, the rows are read in place")
        claim_output(out, complete=False, overwrite=config.overwrite, resume=config.resume, inputs=[source.root])
        dataset, words = source.dataset(), ["--policy", "LWM_POLICY", "--data", _spec(config)]
    next_commands = [shlex.join(["lapa", "policy", "pretrain", *words, "--labels", str(labels), "--out", "POLICY"])]
    identity = {
        "lam_fingerprint": config.lam,
        "dataset_fingerprint": dataset.fingerprint,
        "horizon_seconds": config.horizon,
        "codebook_size": config.codebook_size,
    }
    if (labels / MANIFEST).exists():
        configs.require_same(labels / MANIFEST, identity)
        finish("labels, already complete", labels, next_commands)
        return
    claim_output(labels, complete=False, overwrite=True)
    written = write_labels(source, dataset, labels, config)
    finish(f"labels of {written} rows", labels, next_commands)


def write_labels(source: LapaJsonlSource, dataset: Dataset, folder: Path, config: LapaJsonlConfig) -> int:
    """Writes the rows' latent actions as labels of a dataset of the same rows, in place or converted.

    Returns the number of rows. Raises UserError naming the row whose latent action is outside the codebook.
    """
    # A dataset in place has an episode for each item, in their order.
    items: Iterable[Item] = source.items
    if isinstance(dataset, LeRobotDataset):
        by_key = {item.key: item for item in source.items}
        items = (by_key[episode.source] for episode in dataset.episodes)
    usage_LK = np.zeros((source.latent_length, config.codebook_size))
    shard: dict[int, EpisodeLabels] = {}
    num_labelled = 0
    for episode, item in enumerate(items):
        if len(item.place) != dataset.lengths[episode]:
            raise UserError(f"{source.file_of(item)}: {len(item.place)} rows, but {dataset.lengths[episode]} frames")
        labels = source.labels(item, config.codebook_size)
        if len(labels.frame_indices_T):
            shard[episode] = labels
            num_labelled += 1
            for position, codes_T in enumerate(labels.codes_TL.T):
                usage_LK[position] += np.bincount(codes_T, minlength=config.codebook_size)
        if len(shard) == EPISODES_PER_SHARD or (shard and episode == len(dataset.lengths) - 1):
            write_shard(shard_path(folder, min(shard), max(shard)), shard)
            shard = {}
    num_rows = int(usage_LK[0].sum())
    manifest = Manifest(
        lam_fingerprint=config.lam,
        dataset_fingerprint=dataset.fingerprint,
        camera=CAMERA,
        horizon_seconds=config.horizon,
        horizon_frames=max(1, round(config.horizon * dataset.fps)),
        latent_length=source.latent_length,
        codebook_size=config.codebook_size,
        num_rows=num_rows,
        num_episodes=num_labelled,
        skipped_episodes=len(dataset.lengths) - num_labelled,
        code_usage=(usage_LK / max(1, num_rows)).tolist(),
    )
    write_manifest(folder, manifest)
    return num_rows


def _spec(config: LapaJsonlConfig) -> str:
    """Returns the `--data` of the next command, with the options that the labels depend on."""
    defaults = LapaJsonlReading(config.file)
    given = {name: getattr(config, name) for name in ("fps", "image_codes", "skip_bad")}
    options = [f",{name}={str(value).lower()}" for name, value in given.items() if value != getattr(defaults, name)]
    return f"lapa-jsonl:{config.file}{''.join(options)}"


class LapaJsonlSource(Source):
    """A JSONL file or JSON list; an item is an episode of one or more rows, its place (number, first byte, length) of

    each. coded: whether codes are read in place of images; latent_length: L, 0 where no row has a latent action.
    """

    kind = "lapa-jsonl"

    def __init__(self, options: LapaJsonlReading):
        self.options, self.root = options, as_path(options.file)
        require_rate(options.fps)
        if options.image_codes < 1:
            raise UserError(f"image_codes {options.image_codes}: must be above 0")
        if not self.root.is_file():
            problem = "is a folder" if self.root.is_dir() else "no such file"
            raise UserError(f"{self.root}: {problem}; name a JSONL file, or a JSON list, of the released LAPA code")
        self.name, self.fps = self.root.stem, options.fps
        key = [file_state(self.root), options.images is not None, options.image_codes, options.skip_bad]
        found = cached(self.kind, key, lambda: scan_rows(self.root, options))
        for problem in found["problems"][:10]:
            warn(f"left out: {problem}")
        self.notes = {**found["notes"], "left out, malformed rows": len(found["problems"])}
        for note, count in self.notes.items():
            if count:
                warn(f"{self.name}: {note}: {count}")
        if not found["episodes"]:
            raise UserError(f"{self.root}: holds no row that can be read")
        self.coded, self.latent_length = bool(found["coded"]), int(found["latent_length"])
        self.items = RowEpisodes(found["episodes"], found["places"], found["names"], found["instructions"])
        if options.actions and (width := found["action_dim"]):
            # The released code learns deltas of the end effector, and a gripper of two values.
            names = [f"raw_actions_{number}" for number in range(width)]
            pose = ActionSpace.named(POSE, ["gripper"], "delta")
            self.action_space = pose if width == len(POSE) else ActionSpace.named(names)
        self.state_names = tuple(found["state_names"]) if options.actions and found["state_names"] else None
        self._image_folder = as_path(options.images) if options.images is not None else self.root.parent
        side = round(options.image_codes**0.5) * CODE_SIDE
        self.cameras = {CAMERA: (side, side) if self.coded else self._image(self.items[0], 0).shape[:2]}
        self.settings = {"file": self.root.name, "codes": self.coded}

    def dataset(self, name: str | None = None) -> Dataset:
        return CodedDataset(self, name) if self.coded else SourceDataset(self, name)

    def file_of(self, item: Item) -> str:
        return f"{self.root}: row {item.place[0][0]} ({item.key})"

    def read(self, item: Item) -> Clip:
        numbers = self.numbers(item)
        images = ((index / self.fps, self._image(item, index)) for index in range(len(item.place)))
        return Clip({CAMERA: images}, item.instruction, numbers.get(ACTION), numbers.get(STATE))

    def frames(self, item: Item, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        frames = [self._image(item, int(index)) for index in frame_indices]
        sizes = {frame_HWC.shape[:2] for frame_HWC in frames}
        if len(sizes) > 1:
            raise UserError(f"{self.file_of(item)}: its images differ in size ({sizes}); convert it first")
        return np.stack(frames)

    def codes(self, item: Item, frame_indices: Sequence[int]) -> Int[np.ndarray, "T N"]:
        """Returns the codes in place of images."""
        rows = [self._row(item, int(index)).vision_N or () for index in frame_indices]
        return np.array([vision_N[: self.options.image_codes] for vision_N in rows], np.int64)

    def numbers(self, item: Item) -> Mapping[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        if self.action_space is None and self.state_names is None:
            return found
        rows = [self._row(item, index) for index in range(len(item.place))]
        if self.action_space is not None:
            found[ACTION] = np.array([row.actions_A for row in rows])
        if self.state_names is not None:
            found[STATE] = np.array([row.states_S for row in rows])
        return found

    def labels(self, item: Item, codebook_size: int) -> EpisodeLabels:
        """Returns an episode's latent actions. Raises UserError naming the row with a code outside the codebook."""
        frames, codes = [], []
        for index, (number, _, _) in enumerate(item.place):
            delta_L = self._row(item, index).delta_L
            if delta_L is None:
                continue
            if max(delta_L) >= codebook_size:
                raise UserError(
                    f"{self.root}: row {number}: `delta` holds {max(delta_L)}, but there are {codebook_size} codes; "
                    "give --codebook-size"
                )
            frames.append(index)
            codes.append(delta_L)
        return EpisodeLabels(np.array(frames, np.int64), np.array(codes, np.int64).reshape(-1, self.latent_length))

    def _row(self, item: Item, index: int) -> Row:
        number, offset, length = item.place[index]
        with reading(self.root), open_binary(self.root) as file:
            file.seek(offset)
            content = file.read(length)
        try:
            return parse_row(content)
        except UserError as error:
            raise UserError(f"{self.root}: row {number} {error}") from None

    def _image(self, item: Item, index: int) -> np.ndarray:
        with errors_about(f"{self.root}: row {item.place[index][0]}"):
            path = inside(self._image_folder, self._row(item, index).image)
            return read_image(path, "give the folder of the images as --images (images= with --data)")


class CodedDataset(SourceDataset):
    """Rows in place that have codes of images, and no images."""

    coded = True
    source: LapaJsonlSource

    def image_codes(self, episode_index: int, frame_indices: Sequence[int]) -> Int[np.ndarray, "T N"]:
        return self.source.codes(self._items[episode_index], frame_indices)

    def _images(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        raise UserError(
            f"{self.root}: has codes of images and no images, which `lapa policy pretrain` and `finetune` with an "
            "`lwm` policy read; give --images (images= with --data) where there are images"
        )


class RowEpisodes(Sequence[Item]):
    """Items, made when they are asked for: a file may have millions of rows.

    starts: first row of each episode; places: number, first byte and length of each row, in the order of the episodes.
    names: of the first episodes, the others are named by their rows' numbers; instructions: all texts, and the index of
    each episode's.
    """

    def __init__(self, starts: list[int], places: list[int], names: list[str], instructions: list[Any]):
        self._starts = np.array([*starts, len(places) // 3], np.int64)
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self._names = names
        self._texts, self._text_of = instructions[0], np.array(instructions[1], np.int32)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        index %= len(self)
        rows = self._places[self._starts[index] : self._starts[index + 1]].tolist()
        name = self._names[index] if index < len(self._names) else f"row {rows[0][0]}"
        return Item(name, tuple(map(tuple, rows)), self._texts[self._text_of[index]], len(rows))


def scan_rows(path: Path, options: LapaJsonlReading) -> dict[str, Any]:
    """Passes once over the rows: returns what they share, and which of them are an episode, as plain JSON values.

    Raises UserError naming the row that is malformed or unlike the first one, unless `skip_bad`.
    """
    problems: list[str] = []
    first: Row | None = None
    coded, latent_length = False, 0
    places: list[tuple[int, int, int]] = []
    # Of each row the index of its text; the rows of each episode, with the numbers of their steps; all other rows.
    texts: dict[str, int] = {}
    text_of: list[int] = []
    steps: dict[str, list[tuple[int, int]]] = {}
    alone: list[int] = []
    with progress() as bar:
        task = bar.add_task("scanning", total=path.stat().st_size, note="bytes")
        for number, offset, content in find_rows(path):
            bar.update(task, completed=offset + len(content))
            try:
                row = parse_row(content)
                coded = options.images is None and (first or row).vision_N is not None
                _require_alike(row, first or row, options.image_codes if coded else 0, latent_length)
            except UserError as error:
                if not options.skip_bad:
                    raise UserError(f"{path}: row {number} {error}; {FIX_ROW}") from None
                problems.append(f"{path}: row {number} {error}")
                continue
            first = first or row
            latent_length = latent_length or len(row.delta_L or ())
            text_of.append(texts.setdefault(row.instruction, len(texts)))
            if row.episode is None:
                alone.append(len(places))
            else:
                steps.setdefault(row.episode[0], []).append((row.episode[1], len(places)))
            places.append((number, offset, len(content)))
    names, groups, notes = _group(steps, text_of)
    episodes, words = [*groups, *([row] for row in alone)], list(texts)
    notes["without instruction"] = sum(not words[text_of[rows[0]]] for rows in episodes)
    return {
        "problems": problems,
        "notes": notes,
        "coded": coded and first is not None,
        "latent_length": latent_length,
        "action_dim": 0 if first is None or first.actions_A is None else len(first.actions_A),
        "state_names": [] if first is None else list(first.state_names),
        "names": names,
        "episodes": np.cumsum([0, *map(len, episodes)])[:-1].tolist(),
        "places": list(chain.from_iterable(places[row] for rows in episodes for row in rows)),
        "instructions": [words, [text_of[rows[0]] for rows in episodes]],
    }


def _group(
    steps: Mapping[str, list[tuple[int, int]]], text_of: Sequence[int]
) -> tuple[list[str], list[list[int]], Counter[str]]:
    """Returns names and rows of the episodes, in order of their steps; a name with a step twice is no episode."""
    names, groups = [], []
    notes: Counter[str] = Counter()
    for name, numbered in steps.items():
        numbers, rows = map(list, zip(*sorted(numbered), strict=True))
        if len(set(numbers)) < len(numbers):
            notes["rows whose ids are the same, taken as an episode each"] += len(rows)
            names += [f"{name} {number} #{place}" for place, number in enumerate(numbers)]
            groups += [[row] for row in rows]
            continue
        notes["episodes that lack steps in between"] += numbers[-1] - numbers[0] + 1 != len(numbers)
        notes["the instruction changes, the first is taken"] += len({text_of[row] for row in rows}) > 1
        names.append(name)
        groups.append(rows)
    return names, groups, +notes


@dataclass(frozen=True)
class Row:
    """One step. name: its id, or else its image's path; fields that the row lacks are empty or None."""

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
        """The name of its episode and the number of its step, where its name contains them."""
        match = STEP.fullmatch(self.name)
        return (match[1], int(match[2])) if match else None


def _require_alike(row: Row, first: Row, image_codes: int, latent_length: int) -> None:
    """UserError where a row is unlike the first one. image_codes: of one image; 0 where images are read."""
    if image_codes:
        num = len(row.vision_N or ())
        if not num or num % image_codes:
            raise UserError(f"has {num} codes in `vision`, which is no multiple of {image_codes}")
    elif not row.image:
        raise UserError("has neither `vision` nor `image`" if row is first else "lacks `image`, which the first has")
    if row.delta_L is not None and latent_length not in (0, len(row.delta_L)):
        raise UserError(f"has {len(row.delta_L)} codes in `delta`, the others {latent_length}")
    for name, numbers, others in (
        ("raw_actions", row.actions_A, first.actions_A),
        ("states", row.states_S, first.states_S),
    ):
        if (0 if numbers is None else len(numbers)) != (0 if others is None else len(others)):
            raise UserError(f"has other `{name}` than the first row")


def find_rows(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line or number in the list, first byte, content) of each row of a JSONL file or a JSON list.

    Raises UserError where the list is no JSON: what comes after that place cannot be found.
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


def _list_rows(content: bytes, path: Path) -> Iterator[tuple[int, int, bytes]]:
    # In Latin-1 a character is a byte; JSON's own characters are the same as in UTF-8, which a row is parsed as.
    text, decoder = content.decode("latin-1"), json.JSONDecoder()
    between, number = LIST_START.match(text), 0
    assert between, "the first character is a bracket"
    while between[1] != "]":
        position = between.end()
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: row {number}, at byte {position}, is not valid JSON") from None
        yield number, position, content[position:end]
        between = BETWEEN_ROWS.match(text, end)
        if between is None:
            raise UserError(f"{path}: expected a comma or ] after row {number}, at byte {end}")
        number += 1
    if content[between.end() :].strip():
        raise UserError(f"{path}: goes on after the end of its list, at byte {between.end(1)}")


def parse_row(content: bytes) -> Row:
    """Returns a row of either file. Raises UserError, which does not name the file, where it is malformed."""
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
        row = {**row, **_from_conversation(row["conversations"])}
    _require_fields(row)
    image, instruction = (_text(row, key) for key in ("image", "instruction"))
    state_names, states_S = _states(row.get("states"))
    names = [name for name in (_text(row, "id"), image) if name]
    return Row(
        # The authors name rows by paths; a plain number tells nothing of the episode.
        next((name for name in names if STEP.fullmatch(name)), next(iter(names), "")),
        image,
        task_in_words(instruction),
        _codes(row, "vision"),
        _codes(row, "delta"),
        _numbers(row.get("raw_actions"), "raw_actions"),
        states_S,
        state_names,
    )


def task_in_words(instruction: str) -> str:
    """Returns an instruction without what the released code puts around it."""
    match = ROLES.fullmatch(IMAGE_TAG.sub("", instruction))
    assert match is not None, "the pattern takes any text"
    question = QUESTION.fullmatch(match[1])
    return whole_characters((question[1] if question else match[1]).strip())


def _from_conversation(conversation: Any) -> dict[str, Any]:
    """Returns the words of the person, and the actions of the robot, under the names that JSONL rows give them."""
    try:
        words, actions = conversation[0]["value"], conversation[1]
        return {"instruction": words, **{key: actions[key] for key in ("raw_actions", "states") if key in actions}}
    except (TypeError, KeyError, IndexError):
        raise UserError("`conversations` must be the words of a person and the actions of the robot") from None


def _require_fields(row: Mapping[str, Any]) -> None:
    """Checks `fields`, which lists what the released code reads of a row, in one order or a choice of several."""
    fields = row.get("fields", "")
    for choice in fields if isinstance(fields, list) else [fields]:
        if not isinstance(choice, str):
            raise UserError(f"`fields` must be text such as '[instruction],[vision],delta', got {choice!r}")
        for field in filter(None, (part.strip().strip("[]") for part in choice.replace("+", ",").split(","))):
            if field not in row and field not in CONTROLS:
                raise UserError(f"`fields` names {field}, which the row lacks")


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if key == "id" and isinstance(value, int):
        return str(value)
    value = value or ""
    if not isinstance(value, str):
        raise UserError(f"`{key}` is not text")
    return value


def _codes(row: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """Returns codes, stored as numbers or as text."""
    values = row.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or not values:
        raise UserError(f"`{key}` is not a list of codes")
    # Hundreds of codes in each of millions of rows: checked one by one only where they are not all text of digits.
    if set(map(type, values)) == {str}:
        digits, lengths = "".join(values), set(map(len, values))
        if digits.isascii() and digits.isdigit() and 0 < min(lengths) <= max(lengths) < 10:
            return tuple(map(int, values))
    codes = []
    for value in values:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else value
        if type(number) is not int or not 0 <= number < LARGEST_CODE:
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


def _states(states: Any) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Returns names and values of the robot's state, which is stored as a number or a list of them under each name."""
    if states is None:
        return (), None
    if not isinstance(states, dict) or not states:
        raise UserError("`states` is not an object of numbers")
    names: list[str] = []
    values: list[float] = []
    for name, value in states.items():
        listed = isinstance(value, list)
        numbers = _numbers(value if listed else [value], f"states {name}")
        assert numbers is not None
        names += [f"{name}_{place}" for place in range(len(numbers))] if listed else [name]
        values += numbers.tolist()
    return tuple(names), np.array(values, np.float32)
