"""The released LAPA code's files, labels included: its JSONL for pretraining, and its JSON list for finetuning.

    lapa data lapa-jsonl latent_action_pretraining_openx.jsonl --out OPENX       # the labels: OPENX/labels/released
    lapa policy pretrain --policy LWM --data lapa-jsonl:latent_action_pretraining_openx.jsonl \\
        --labels OPENX/labels/released --out POLICY
    lapa data lapa-jsonl finetune.json --images . --out data/finetune

The published JSONL holds codes of pictures and no pictures: an `lwm` policy reads them in place. Rows whose ids or
paths name the step of an episode are put together, others are an episode each.
Formats: lapa.sources.lapa_jsonl. Axes: T time, H W image, N codes of a picture, L latent action length.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, overload

import numpy as np
import tyro
from jaxtyping import Int
from PIL import Image

from lapa import config as configs
from lapa.console import finish, progress, say, warn
from lapa.data import convert
from lapa.data.action_space import ActionSpace
from lapa.data.config import ConvertOptions
from lapa.data.dataset import ACTION, STATE, Dataset
from lapa.data.labels import MANIFEST, EpisodeLabels, Manifest, shard_path, write_shard
from lapa.data.lerobot import LeRobotDataset
from lapa.data.source import Clip, Item, Reading, Source, SourceDataset
from lapa.errors import UserError
from lapa.files import as_path, claim_output, open_binary, reading, remove_folder
from lapa.sources.folder_scan import cached, file_state
from lapa.sources.rlds.table import POSE

CAMERA = "image"
LABELS = Path("labels", "released")
# Pixels of a side that one code of the released image tokeniser stands for.
CODE_SIDE = 16
EPISODES_PER_SHARD = 10_000


@dataclass(frozen=True)
class LapaJsonlReading(Reading):
    """How a file of the released LAPA code is read."""

    file: Annotated[str, tyro.conf.Positional]
    """JSONL for pretraining or finetuning, or JSON list for finetuning. May be a URL."""
    images: str | None = None
    """Folder that the rows' paths of pictures begin in; without it the codes in `vision` are read in place of pictures
    where the rows have any, else pictures beside the file."""
    actions: bool = True
    """Read `raw_actions` and `states`."""
    fps: float = 5.0
    """Rows a second, which the files do not tell."""
    picture_codes: int = 256
    """Codes of one picture; of several pictures in `vision` the first is read."""
    skip_bad: bool = False
    """Leave out, and count, malformed rows."""

    def open(self) -> LapaJsonlSource:
        """Raises UserError naming the file and the row that is wrong, and the mend."""
        return LapaJsonlSource(self)


@dataclass(frozen=True)
class LapaJsonlConfig(ConvertOptions, LapaJsonlReading):
    """Turn a file of the released LAPA code into a dataset with labels; of codes without pictures, into labels."""

    codebook_size: int = 8
    """Latent action codes that there are, of which `delta` holds a few."""
    horizon: float = 0.6
    """Seconds that a latent action spans, as far as it is known; noted in the labels."""
    lam: str = "released"
    """Name of the latent action model that made `delta`: policies refuse to mix labels of two."""


def run(config: LapaJsonlConfig) -> None:
    """`lapa data lapa-jsonl`."""
    source = config.open()
    labels = config.out / LABELS
    if source.coded:
        if not source.latent_length:
            raise UserError(f"{config.file}: has codes of pictures, and no `delta` to label them with; give --images")
        if (labels / MANIFEST).exists() and config.resume and not config.overwrite:
            say(f"{labels}: already complete")
            return
        say(f"{config.file}: has codes and no pictures; its labels are written, the rows are read in place")
        claim_output(config.out, complete=False, overwrite=config.overwrite, inputs=[source.root])
        written = write_labels(source, source.dataset(), labels, config)
        words = ["lapa", "policy", "pretrain", "--policy", "LWM_POLICY", "--data", _spec(config)]
        finish(f"labels of {written} rows", labels, [shlex.join([*words, "--labels", str(labels), "--out", "POLICY"])])
        return
    convert.run(config)
    if not source.latent_length or (labels / MANIFEST).exists():
        return
    if config.rate not in (None, source.fps) or config.cut_shots:
        warn("labels are not written: with --rate or --cut-shots, frames are not those of the rows")
        return
    written = write_labels(source, Dataset.open(config.out), labels, config)
    words = ["lapa", "policy", "pretrain", "--data", str(config.out), "--labels", str(labels), "--out", "POLICY"]
    finish(f"labels of {written} rows", labels, [shlex.join(words)])


def write_labels(source: LapaJsonlSource, dataset: Dataset, folder: Path, config: LapaJsonlConfig) -> int:
    """The rows' latent actions as labels of a dataset of the same rows, in place or converted. How many rows.

    UserError naming the row whose latent action is outside the codebook.
    """
    if folder.exists():
        remove_folder(folder)
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
        labels = _labels_of(source, item, config.codebook_size)
        if len(labels.frame_indices_T):
            shard[episode] = labels
            num_labelled += 1
            for position, codes_T in enumerate(labels.codes_TL.T):
                usage_LK[position] += np.bincount(codes_T, minlength=config.codebook_size)
        if len(shard) == EPISODES_PER_SHARD:
            write_shard(shard_path(folder, min(shard), max(shard)), shard)
            shard = {}
    if shard:
        write_shard(shard_path(folder, min(shard), max(shard)), shard)
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
    configs.save(manifest, folder / MANIFEST)
    return num_rows


def _labels_of(source: LapaJsonlSource, item: Item, codebook_size: int) -> EpisodeLabels:
    frames, codes = [], []
    for index in range(len(item.place)):
        delta_L = source.row(item, index).delta_L
        if delta_L is None:
            continue
        if max(delta_L) >= codebook_size:
            raise UserError(
                f"{source.root}: row {item.place[index][0]}: `delta` holds {max(delta_L)}, but there are "
                f"{codebook_size} codes; give --codebook-size"
            )
        frames.append(index)
        codes.append(delta_L)
    return EpisodeLabels(np.array(frames, np.int64), np.array(codes, np.int64).reshape(-1, source.latent_length))


class LapaJsonlSource(Source):
    """A JSONL file or JSON list; an item is an episode of one or more rows.

    coded: whether codes are read in place of pictures; latent_length: L, 0 where no row has a latent action.
    """

    kind = "lapa-jsonl"

    def __init__(self, options: LapaJsonlReading):
        self.options, self.root = options, as_path(options.file)
        if not 0 < options.fps < float("inf") or options.picture_codes < 1:
            raise UserError(f"{options.file}: fps {options.fps:g} and picture_codes must be above 0")
        self.name, self.fps = self.root.stem, options.fps
        pictured, codes = options.images is not None, options.picture_codes
        found = cached(
            self.kind,
            [file_state(existing(self.root)), pictured, codes, options.skip_bad],
            lambda: look_through(self.root, pictured=pictured, picture_codes=codes, skip_bad=options.skip_bad),
        )
        for problem in found["problems"][:10]:
            warn(f"left out: {problem}")
        for note, count in {**found["notes"], "left out, malformed rows": len(found["problems"])}.items():
            if count:
                warn(f"{self.name}: {note}: {count}")
        if not found["episodes"]:
            raise UserError(f"{self.root}: holds no row that can be read")
        self.coded, self.latent_length = bool(found["coded"]), int(found["latent_length"])
        self.items = RowEpisodes(found["episodes"], found["places"], found["names"], found["instructions"])
        width = found["action_dim"] if options.actions else 0
        self.action_space = _space(width) if width else None
        self.state_names = tuple(found["state_names"]) if options.actions and found["state_names"] else None
        self.images = as_path(options.images) if options.images is not None else self.root.parent
        side = round(options.picture_codes**0.5) * CODE_SIDE
        self.cameras = {CAMERA: (side, side) if self.coded else self._picture(self.items[0], 0).shape[:2]}
        self.settings = {"file": self.root.name, "codes": self.coded}

    def dataset(self, name: str | None = None) -> Dataset:
        return CodedDataset(self, name) if self.coded else SourceDataset(self, name)

    def file_of(self, item: Item) -> str:
        return f"{self.root}: row {item.place[0][0]} ({item.key})"

    def read(self, item: Item) -> Clip:
        numbers = self.numbers(item)
        notes = () if item.instruction else ("without instruction",)

        def pictures() -> Iterator[tuple[float, np.ndarray]]:
            for index in range(len(item.place)):
                yield index / self.fps, self._picture(item, index)

        return Clip({CAMERA: pictures()}, item.instruction, numbers.get(ACTION), numbers.get(STATE), notes)

    def pictures(self, item: Item, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        frames = [self._picture(item, int(index)) for index in frame_indices]
        sizes = {frame_HWC.shape[:2] for frame_HWC in frames}
        if len(sizes) > 1:
            raise UserError(f"{self.file_of(item)}: its pictures differ in size ({sizes}); convert it first")
        return np.stack(frames)

    def codes(self, item: Item, frame_indices: Sequence[int]) -> Int[np.ndarray, "T N"]:
        """The codes in place of pictures."""
        rows = [self.row(item, int(index)).vision_N or () for index in frame_indices]
        return np.array([vision_N[: self.options.picture_codes] for vision_N in rows], np.int64)

    def numbers(self, item: Item) -> Mapping[str, np.ndarray]:
        if self.action_space is None and self.state_names is None:
            return {}
        rows = [self.row(item, index) for index in range(len(item.place))]
        found = {}
        if self.action_space is not None:
            found[ACTION] = np.stack([row.actions_A for row in rows if row.actions_A is not None])
        if self.state_names is not None:
            found[STATE] = np.stack([row.states_S for row in rows if row.states_S is not None])
        return found

    def row(self, item: Item, index: int) -> Row:
        """One row of an episode."""
        number, offset, length = item.place[index]
        try:
            return read_row(self.root, offset, length)
        except ValueError as error:
            raise UserError(f"{self.root}: row {number} {error}") from None

    def _picture(self, item: Item, index: int) -> np.ndarray:
        path = self.images / self.row(item, index).image
        where = f"{self.root}: row {item.place[index][0]}"
        try:
            with reading(path, "give the folder of the pictures as --images (images= with --data)"):
                content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                return np.asarray(image.convert("RGB"))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        # Pillow raises SyntaxError for a broken PNG.
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{where}: {path}: cannot be decoded ({error})") from None


class CodedDataset(SourceDataset):
    """Rows in place that have codes of pictures, and no pictures."""

    coded = True
    source: LapaJsonlSource

    def picture_codes(self, episode_index: int, frame_indices: Sequence[int]) -> Int[np.ndarray, "T N"]:
        return self.source.codes(self._items[episode_index], frame_indices)

    def _pictures(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        raise UserError(
            f"{self.root}: has codes of pictures and no pictures, which `lapa policy pretrain` and `finetune` with an "
            "`lwm` policy read; give --images (images= with --data) where there are pictures"
        )


def _space(width: int) -> ActionSpace:
    """The released code learns deltas of the end effector, and a gripper of two values."""
    if width == len(POSE):
        return ActionSpace.named(POSE, ["gripper"], "delta")
    return ActionSpace.named([f"raw_actions_{number}" for number in range(width)])


def _spec(config: LapaJsonlConfig) -> str:
    """What `--data` must say for the labels to fit."""
    defaults = LapaJsonlReading(config.file)
    given = {name: getattr(config, name) for name in ("fps", "picture_codes", "skip_bad")}
    told = [f",{name}={str(value).lower()}" for name, value in given.items() if value != getattr(defaults, name)]
    return f"lapa-jsonl:{config.file}{''.join(told)}"


MEND = "mend the row, or leave out what is malformed: --skip-bad, or skip_bad=true with --data"


class RowEpisodes(Sequence[Item]):
    """Items, made when they are asked for: a file may have millions of rows."""

    def __init__(self, episodes: list[int], places: list[int], names: list[str], instructions: list[Any]):
        """episodes: first row of each; places: number, offset and length of each row, in the order of the episodes.

        names: of the first episodes, the others are called by their rows' numbers; instructions: all texts, and which
        of them each episode has.
        """
        self._starts = np.array([*episodes, len(places) // 3], np.int64)
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self._names = names
        self._texts, numbers = instructions
        self._text_of = np.array(numbers, np.int32)

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
        rows = self._places[self._starts[index] : self._starts[index + 1]]
        name = self._names[index] if index < len(self._names) else f"row {rows[0][0]}"
        place = tuple((int(number), int(offset), int(length)) for number, offset, length in rows)
        return Item(name, place, self._texts[self._text_of[index]], len(rows))


def look_through(path: Path, *, pictured: bool, picture_codes: int, skip_bad: bool) -> dict[str, Any]:
    """One pass over the rows: what all of them are like, and which of them are an episode. Plain JSON values.

    pictured: whether pictures are read even where there are codes; picture_codes, skip_bad: as in `LapaJsonlReading`.
    UserError naming the row that is malformed or not like the first one.
    """
    problems: list[str] = []
    first: Row | None = None
    texts: dict[str, int] = {}
    latent_length = 0
    steps: dict[str, list[tuple[int, int]]] = {}
    places: list[tuple[int, int, int]] = []
    said: list[int] = []
    alone: list[int] = []
    with progress() as bar:
        task = bar.add_task("looking through", total=path.stat().st_size, note="bytes")
        for number, offset, content in find_rows(path):
            bar.update(task, completed=offset + len(content))
            try:
                row = parse_row(content)
                coded = not pictured and (first or row).vision_N is not None
                _require_alike(row, first or row, picture_codes if coded else 0, latent_length)
            except ValueError as error:
                if not skip_bad:
                    raise UserError(f"{path}: row {number} {error}; {MEND}") from None
                problems.append(f"{path}: row {number} {error}")
                continue
            first = first or row
            latent_length = latent_length or len(row.delta_L or ())
            said.append(texts.setdefault(row.instruction, len(texts)))
            if row.episode is None:
                alone.append(len(places))
            else:
                steps.setdefault(row.episode[0], []).append((row.episode[1], len(places)))
            places.append((number, offset, len(content)))
    names, groups, notes = _group(steps, said)
    ordered = [row for rows in groups for row in rows] + alone
    starts = np.cumsum([0, *map(len, groups), *([1] * len(alone))])[:-1].tolist() if ordered else []
    firsts = [rows[0] for rows in groups] + alone
    return {
        "problems": problems,
        "notes": notes,
        "coded": not pictured and first is not None and first.vision_N is not None,
        "latent_length": latent_length,
        "action_dim": 0 if first is None or first.actions_A is None else len(first.actions_A),
        "state_names": [] if first is None else list(first.state_names),
        "names": names,
        "episodes": starts,
        "places": list(chain.from_iterable(places[row] for row in ordered)),
        "instructions": [list(texts), [said[row] for row in firsts]],
    }


def _group(
    steps: Mapping[str, list[tuple[int, int]]], said: Sequence[int]
) -> tuple[list[str], list[list[int]], Counter[str]]:
    """Names and rows of the episodes, in the order of their steps; names that hold a step twice tell no episodes."""
    names, groups = [], []
    notes: Counter[str] = Counter()
    for name, numbered in steps.items():
        numbered = sorted(numbered)
        numbers = [number for number, _ in numbered]
        rows = [row for _, row in numbered]
        if len(set(numbers)) < len(numbers):
            notes["rows whose ids are the same, taken as an episode each"] += len(rows)
            names += [f"{name} {number} #{place}" for place, number in enumerate(numbers)]
            groups += [[row] for row in rows]
            continue
        notes["episodes that lack steps in between"] += numbers[-1] - numbers[0] + 1 != len(numbers)
        notes["the instruction changes, the first is taken"] += len({said[row] for row in rows}) > 1
        names.append(name)
        groups.append(rows)
    return names, groups, +notes


def _require_alike(row: Row, first: Row, picture_codes: int, latent_length: int) -> None:
    """UserError where a row is not like the first one. picture_codes: of one picture; 0 where pictures are read."""
    if picture_codes:
        num = len(row.vision_N or ())
        if not num or num % picture_codes:
            raise UserError(f"has {num} codes in `vision`, which is no multiple of {picture_codes}")
    elif not row.image:
        raise UserError("has neither `vision` nor `image`" if row is first else "lacks `image`, which the first has")
    if row.delta_L is not None and latent_length not in (0, len(row.delta_L)):
        raise UserError(f"has {len(row.delta_L)} codes in `delta`, the others {latent_length}")
    for name, ours, its in (
        ("raw_actions", row.actions_A, first.actions_A),
        ("states", row.states_S, first.states_S),
    ):
        if (0 if ours is None else len(ours)) != (0 if its is None else len(its)):
            raise UserError(f"has other `{name}` than the first row")


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
