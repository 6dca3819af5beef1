"""Shards of web video: tar files of videos with their texts (WebDataset), or parquet with the bytes of videos.

    lapa data webdataset 's3://bucket/clips-{00000..01023}.tar' --cut-shots --min-motion 0.01 --out data/clips
    lapa latent train --data 'webdataset:clips/,caption-key=text' --out LAM

Files of one sample follow one another and share their name up to the first dot: `a/7.mp4`, `a/7.json`, `a/7.txt`. Each
sample with a video is an episode. A shard is never unpacked: one pass over the headers of its members, which is cached,
finds where each video is, and that part of the shard is then read as a file. So the names in a shard are never names of
files on this machine, and links and devices in it are nothing. In parquet each row is a sample, and a video is read
with its row group.
https://github.com/webdataset/webdataset; Aizman et al., 2019, arXiv 2001.01858;
https://huggingface.co/docs/datasets/video_dataset
"""

from __future__ import annotations

import io
import re
import stat
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from lapa.console import say, warn
from lapa.data.config import ConvertOptions
from lapa.data.metadata import INFO
from lapa.data.source import Item, Reading, Source
from lapa.data.tables import check_memory, parsing, read_row_group, require_in_proportion
from lapa.data.video import probe
from lapa.errors import StoreError, UserError, shown
from lapa.files import (
    as_path,
    find_files,
    is_remote,
    open_binary,
    open_for_arrow,
    parse_json,
    reading,
    whole_characters,
    why_unreadable,
)
from lapa.sources.captions import TEXT_COLUMNS
from lapa.sources.folder_scan import (
    THREADS,
    VIDEO_SUFFIXES,
    cached,
    file_state,
    natural_order,
    require_rate,
    scan_files,
    stop_or_skip,
)
from lapa.sources.videos import CAMERA, VideoFilesSource, common_format, count_frames
from lapa.store_cache import store_cache
from lapa.stores import ANSWERS, READ_AHEAD, opened, retried

# Members that describe the shard.
OF_SHARD = re.compile(r"__[^/]*__($|/)")
SUFFIXES = (".tar", ".parquet")
NESTED = re.compile(r"\{[^{}]*\{")
BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}")
MOST_SHARDS = 10**6
# Bytes of all headers of one member, and of a text: larger ones are no headers and no captions.
MOST_BYTES = 1 << 20
LONGEST_NAME = 1000
# Of a row of parquet in memory, without its video: a file may hold millions of rows that are empty.
ROW_BYTES = 256
# Bytes of a store that are fetched beyond a header: fewer than a video has.
BLOCK = 1 << 16
# Videos, spread over all, whose headers are looked at for the rate and the size of all.
SAMPLED = 64
# Of a row group of parquet in memory: each thread that reads in place holds one.
LARGEST_GROUP = 64 << 20
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
FIX = "download it again, or leave out what is damaged: --skip-bad, or skip_bad=true with --data"
# What is counted.
OTHER_VIDEOS = "further videos of a sample, not read"
NO_FILES = "links, devices, sparse files and names of more than 1000 characters, not read"
HIDDEN = "hidden files (names that begin with a dot), not read"
NO_VIDEO = "samples without a video"
MISSING = "shards that are missing or cannot be read"
DAMAGED = "shards that are damaged, read up to there"
TWICE = "samples whose name comes twice in their shard, left out"
NO_CAPTION = "videos without a caption (--caption TEXT gives them one)"


@dataclass(frozen=True)
class WebDatasetReading(Reading):
    """Shards of videos with their texts; each video is an episode."""

    shards: Annotated[str, tyro.conf.Positional]
    """Folder with tar or parquet files, one of them, or a pattern such as 'clips-{00000..01023}.tar'; may be a URL."""
    caption_key: str | None = None
    """Key of a video's text in its .json, or column of parquet; by default the .txt is taken, or else text, caption or
    instruction there."""
    caption: str | None = None
    """One text for videos that have none."""
    fps: float | None = None
    """Frames a second at which the videos are read; by default the rate of most of those that are looked at."""
    skip_bad: bool = False
    """Leave out, and count, shards that are missing, what is behind the damage of a shard, and damaged videos."""

    def open(self) -> Source:
        return WebDatasetSource(self)


@dataclass(frozen=True)
class WebDatasetConfig(ConvertOptions, WebDatasetReading):
    """Turn WebDataset shards into a dataset without actions."""


@dataclass(frozen=True)
class Member:
    """A video inside a shard, for lapa.data.video in place of a path: it has the methods of pathlib used there.

    place: in a tar first byte and number of bytes, in parquet row group and row in it.
    kind: the ending of its name in a tar, the column in parquet; state: of the shard when its videos were listed.
    """

    shard: Path
    name: str
    kind: str
    place: tuple[int, int]
    state: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"

    def version(self, anew: bool = False) -> tuple[Any, ...]:
        """Returns the state of the shard now; anew: also where a store has answered within a minute."""
        return tuple(file_state(self.shard, anew))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Opens the video. Raises UserError where the shard is another one than when its videos were listed."""
        # The cache of stores holds what it has asked for within a minute.
        if self.version(anew=store_cache() is None) != self.state:
            raise UserError(f"{self.shard}: has changed since its members were listed; run the command again")
        if self.shard.suffix == ".parquet":
            return io.BytesIO(_video_in_row(self))
        file = open_binary(self.shard, max(1, min(self.place[1], READ_AHEAD)))
        return cast(BinaryIO, io.BufferedReader(_Part(file, *self.place)))


class WebDatasetSource(VideoFilesSource):
    """Shards of videos. An item: place = (shard, kind, two numbers), as of `Member`."""

    kind = "webdataset"

    def __init__(self, reading: WebDatasetReading):
        require_rate(reading.fps)
        self.root, shards = find_shards(reading.shards)
        self.skip_bad = reading.skip_bad
        self._caption = whole_characters(reading.caption or "")
        self.name = self.root.name or self.kind
        self._states: dict[str, tuple[Any, ...]] = {}
        # Bytes of the largest row group of parquet, and its shard.
        self._largest = 0, ""
        self.items = self._list(shards, reading.caption_key)
        if not self.items:
            raise UserError(f"{reading.shards}: none of its {len(shards)} shards holds a video that can be read")
        self.fps, size = common_format(self._sampled_headers(), reading.fps)
        self.cameras = {CAMERA: size}
        options = {"caption": self._caption, "caption_key": reading.caption_key, "fps": reading.fps}
        shown_shards = as_path(reading.shards).name or self.name
        self.settings = {"shards": shown_shards, **{name: value for name, value in options.items() if value}}

    def path_of(self, item: Item) -> Path:
        shard, kind, *place = item.place
        name = f"{item.key.removeprefix(f'{shard}:')}.{kind}"
        return cast(Path, Member(self.root / shard, name, kind, (place[0], place[1]), self._states[shard]))

    def measured(self) -> Sequence[Item]:
        """Returns all items with their lengths, from the headers of the videos; what is found is cached by shard.

        Raises UserError where a thread that reads a video would hold more than LARGEST_GROUP bytes of others.
        """
        if self._largest[0] > LARGEST_GROUP:
            size, shard = self._largest
            raise UserError(
                f"{self.root / shard}: has a row group of {size >> 20} MiB, which each thread that reads a video of it "
                "would hold; convert it (`lapa data webdataset`), or write it with fewer rows in a group"
            )
        by_shard = {shard: list(items) for shard, items in groupby(self.items, key=lambda item: item.place[0])}
        measured: dict[str, int] = {}
        problems: list[str] = []

        def measure(shard: str) -> None:
            items, key = by_shard[shard], [self._states[shard], self.fps]
            # By their places: the name of the shard depends on how it is given.
            places = {item.key: "{2}-{3}".format(*item.place) for item in items}
            kept = cached("webdataset-lengths", key, lambda: {places[i.key]: n for i, n in self._lengths(items, [])})
            lengths = {key: kept[place] for key, place in places.items() if place in kept}
            # Errors are not cached: a missing permission is no change of the file.
            missing = [item for item in items if item.key not in lengths]
            measured.update(lengths | {item.key: length for item, length in self._lengths(missing, problems)})

        _, unreadable = scan_files(measure, list(by_shard))
        stop_or_skip([*unreadable, *sorted(problems)], FIX, self.skip_bad)
        return [replace(item, length=measured[item.key]) for item in self.items if item.key in measured]

    def _lengths(self, items: Sequence[Item], problems: list[str]) -> Iterator[tuple[Item, int]]:
        """Yields the items that can be read with their lengths; what is wrong with others goes to `problems`."""
        for item in items:
            try:
                path = self.path_of(item)
                yield item, count_frames(path, probe(path), self.fps)
            except StoreError:
                raise
            except UserError as error:
                problems.append(str(error))

    def _list(self, shards: Sequence[str], caption_key: str | None) -> list[Item]:
        """Returns the videos of all shards; notes the state of each shard, and the largest row group."""

        def members(shard: str) -> dict[str, Any]:
            self._states[shard] = tuple(file_state(self.root / shard))
            key = [self._states[shard], caption_key]
            found = cached("shards", key, lambda: list_videos(self.root / shard, caption_key))
            return cast(dict[str, Any], found)

        listed, problems = scan_files(members, shards)
        num_shards, items = len(listed), list[Item]()
        self.notes = notes = Counter[str]({MISSING: len(problems)})
        for shard in list(listed):
            # What is listed of a shard takes as much memory as its items, and is not kept.
            found, seen = listed.pop(shard), set[str]()
            notes.update(found["notes"])
            self._largest = max(self._largest, (found["group"], shard))
            problems += [found["problem"]] * bool(found["problem"])
            notes[DAMAGED] += bool(found["problem"])
            for key, kind, *place, text in found["videos"]:
                if key in seen:
                    problems.append(f"{self.root / shard}: {shown(key)} comes twice, with other files in between")
                    notes[TWICE] += 1
                    continue
                seen.add(key)
                items.append(Item(f"{shard}:{key}", (shard, sys.intern(kind), *place), text or self._caption))
                notes[NO_CAPTION] += not items[-1].instruction
        stop_or_skip(problems, FIX, self.skip_bad)
        for note in sorted(note for note, count in notes.items() if count):
            warn(f"{note}: {notes[note]}")
        say(f"{len(items)} videos in {num_shards} shards")
        return items

    def _sampled_headers(self) -> list[Any]:
        """Returns the headers of some videos. Raises UserError where none of them can be read."""
        places = np.linspace(0, len(self.items) - 1, min(SAMPLED, len(self.items))).round().astype(int).tolist()
        by_key = {self.items[place].key: self.items[place] for place in places}
        threads = 1 if self._largest[0] > LARGEST_GROUP else THREADS
        headers, problems = scan_files(lambda key: probe(self.path_of(by_key[key])), list(by_key), threads)
        if not headers:
            raise UserError(problems[0])
        return list(headers.values())


def find_shards(shards: str) -> tuple[Path, list[str]]:
    """Returns the folder of the shards, and their names in it, in order. They need not be there.

    Raises UserError for a folder without any, and for a file, not of a pattern, that is not there.
    """
    path, is_folder = as_path(shards), False
    # A store is not asked for a pattern: it may let its shards be read, and nothing be listed.
    names = [shards] if not is_remote(path) and path.exists() else expanded(shards)
    if names == [shards]:
        with reading(path, "name a folder with .tar or .parquet files, one of them, or a pattern ('{000..127}.tar')"):
            is_folder = stat.S_ISDIR(retried(path, path.stat, "read", ANSWERS).st_mode)
    if is_folder:
        files = [file.relative_to(path).as_posix() for file in find_files(path, "**/*")]
        # Not the tables of a dataset that was converted into a folder of them.
        datasets = tuple(file.removesuffix(INFO) for file in files if file.endswith(f"/{INFO}"))
        found = [file for file in files if Path(file).suffix in SUFFIXES and not file.startswith(datasets)]
        if not found:
            raise UserError(f"{shards}: holds no .tar and no .parquet file; name the folder of the shards")
        return path, sorted(found, key=natural_order)
    folder = (shards if names == [shards] else shards.partition("{")[0]).rpartition("/")[0]
    start = f"{folder}/" if folder or shards.startswith("/") else ""
    return as_path(start or "."), [name.removeprefix(start) for name in names]


def expanded(pattern: str) -> list[str]:
    """Returns the names that a pattern with {00..12} and {a,b} stands for, in order, as the shell expands it.

    Raises UserError for more than a million, and for braces inside braces.
    """
    if NESTED.search(pattern):
        raise UserError(f"{pattern}: has braces inside braces; give the names one by one, or name their folder")
    names, end = [""], 0
    for match in BRACES.finditer(pattern):
        first, last, listed = match.groups()
        parts = listed.split(",") if listed is not None else _numbers(first, last)
        if len(names) * len(parts) > MOST_SHARDS:
            raise UserError(f"{pattern}: stands for more than {MOST_SHARDS} shards; correct it, or name their folder")
        between, end = pattern[end : match.start()], match.end()
        names = [f"{name}{between}{part}" for name in names for part in parts]
    return [f"{name}{pattern[end:]}" for name in names]


def list_videos(shard: Path, caption_key: str | None = None) -> dict[str, Any]:
    """Returns what a pass over the headers of a shard finds, as JSON values.

    videos: of each sample with one [key, kind, two numbers, text], as of `Member`; notes: counts of what
    is not read; problem: where the shard is damaged, what is wrong there, "" for nothing. What is in front of the
    damage is found. group: bytes of the largest row group in memory. Raises UserError where the shard is missing, or
    may not be read.
    """
    notes: Counter[str] = Counter()
    if shard.suffix == ".parquet":
        rows, group = _rows(shard, caption_key, notes)
        return {"videos": rows, "notes": notes, "problem": "", "group": group}
    videos: list[list[Any]] = []
    problems: list[str] = []

    def members(file: BinaryIO) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        try:
            yield from _members(file, notes)
        except StoreError:
            raise
        except UserError as error:
            problems.append(f"{shard}: {why_unreadable(shard) or error}")

    with reading(shard), _open_for_headers(shard) as file:
        for key, sample in groupby(members(file), key=lambda member: member[0]):
            video, text = _read_sample(file, sample, caption_key, notes)
            if video is None:
                notes[NO_VIDEO] += 1
            else:
                videos.append([whole_characters(key), *video, text])
    return {"videos": videos, "notes": notes, "problem": "".join(problems), "group": 0}


def _read_sample(
    file: BinaryIO,
    members: Iterator[tuple[str, str, tarfile.TarInfo]],
    caption_key: str | None,
    notes: Counter[str],
) -> tuple[tuple[str, int, int] | None, str]:
    """Returns the video of a sample (ending of its name, first byte, number of bytes), None without, and its text."""
    video: tuple[str, int, int] | None = None
    texts = {"txt": "", "json": ""}
    for _, ending, info in members:
        last = ending.rpartition(".")[2]
        if f".{last}" in VIDEO_SUFFIXES:
            notes[OTHER_VIDEOS] += video is not None
            video = video or (whole_characters(ending), info.offset_data, info.size)
        elif last in texts:
            if info.size > MOST_BYTES:
                notes[_too_long(f".{last}")] += 1
                continue
            file.seek(info.offset_data)
            content = file.read(info.size)
            try:
                texts[last] = texts[last] or _caption(content, last == "json", caption_key)
            except (ValueError, RecursionError):
                notes[f"texts that are no UTF-8 or no JSON, not read (.{last})"] += 1
    given = texts["json"] if caption_key else texts["txt"] or texts["json"]
    return video, whole_characters(given)


def _caption(content: bytes, is_json: bool, caption_key: str | None) -> str:
    """Returns the text in a .txt or .json, "" where it holds none. Raises ValueError or RecursionError."""
    if not is_json:
        return content.decode("utf-8-sig").strip()
    return _first_text(parse_json(content), (caption_key,) if caption_key else TEXT_COLUMNS)


def _too_long(kind: str) -> str:
    return f"texts of more than {MOST_BYTES} bytes, not read ({kind})"


def _first_text(values: Any, keys: Sequence[str]) -> str:
    """Returns the first text of these keys that has words; bytes are decoded."""
    given = [values.get(key) for key in keys] if isinstance(values, dict) else []
    found = (text.decode(errors="replace") if isinstance(text, bytes) else text for text in given)
    return next((text.strip() for text in found if isinstance(text, str) and text.strip()), "")


def _structure(value: Any) -> Any:
    """Returns a column's JSON, which is a structure or its text; None for a text that is no JSON."""
    with suppress(ValueError, RecursionError):
        return parse_json(value) if isinstance(value, str | bytes) else value
    return None


def _rows(shard: Path, caption_key: str | None, notes: Counter[str]) -> tuple[list[list[Any]], int]:
    """Returns a list [number of the row, column of the video, row group, row in it, text] for each row, and the bytes
    of the largest row group. Raises UserError.

    notes: counts of what is not read.
    """
    rows = list[list[Any]]()
    keys = (caption_key,) if caption_key else ("txt", *TEXT_COLUMNS)
    with parsing(shard), open_for_arrow(shard) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        require_in_proportion(parquet.metadata.num_rows * ROW_BYTES, file)
        column = _video_column(parquet.schema_arrow, shard)
        # A .json may be a structure, as `datasets` makes of one.
        texts = [name for name in (*keys, "json") if name in parquet.schema_arrow.names]
        for group in range(parquet.num_row_groups):
            check_memory(parquet, file, texts, [group])
            # Without columns, a table has its number of rows all the same.
            for row, values in enumerate(parquet.read_row_group(group, columns=texts).to_pylist()):
                text = whole_characters(_first_text(values, keys) or _first_text(_structure(values.get("json")), keys))
                if len(text.encode()) > MOST_BYTES:
                    notes[_too_long("parquet")] += 1
                    text = ""
                rows.append([str(len(rows)), column, group, row, text])
        sizes = [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]
    return rows, max(sizes, default=0)


def _video_column(schema: pa.Schema, shard: Path) -> str:
    """Returns the column that holds videos: bytes, or {bytes, path}. Raises UserError where it is not certain."""
    held = {}
    for field in schema:
        kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
        if pa.types.is_struct(kind) and "bytes" in [inner.name for inner in kind]:
            kind = kind.field("bytes").type
        held[field.name] = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    binary = [name for name, is_binary in held.items() if is_binary]
    named = [name for name in binary if name.startswith("video") or f".{name}" in VIDEO_SUFFIXES]
    if len(named or binary) != 1:
        found = ", ".join(named or binary) or "none"
        raise UserError(f"{shard}: columns that may hold videos: {found}; expected one, called `video`, of their bytes")
    return (named or binary)[0]


# The row group that this thread has read last: its videos are mostly read one after another.
_latest = threading.local()


def _video_in_row(member: Member) -> bytes:
    group, row = member.place
    key = member.shard, member.state, group, member.kind
    if getattr(_latest, "key", None) != key:
        _latest.key, _latest.rows = None, None
        _latest.rows, _latest.key = read_row_group(member.shard, group, member.kind), key
    video = _latest.rows[row].as_py()
    content = video.get("bytes") if isinstance(video, dict) else video
    if not content:
        raise UserError(f"{member}: holds no bytes of a video; replace it or take it out")
    return cast(bytes, content)


def _members(file: BinaryIO, notes: Counter[str]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yields key, ending and place of the files of a shard, in order.

    Raises UserError, which does not name the shard, at the first damage: nothing behind it can be found.
    """
    headers = _Headers(file)
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(6).startswith(COMPRESSED):
        raise UserError("is compressed, and parts of it cannot be read; unpack it (gunzip and its like) to a .tar")
    file.seek(0)
    place = -1
    try:
        tar = tarfile.open(fileobj=cast(Any, headers), mode="r:")  # noqa: SIM115
        while (info := tar.next()) is not None:
            headers.left = MOST_BYTES
            # A negative size would lead back, and around in a circle.
            if info.offset <= place or info.size < 0:
                raise UserError(f"has a damaged header at byte {max(place, 0)}")
            place = info.offset
            if info.isreg() and info.offset_data + info.size > end:
                wanted = f"{shown(info.name)} at byte {place} has {info.size} bytes"
                raise UserError(f"is cut short: {wanted}, and the file ends at byte {end}")
            folder, slash, name = info.name.rpartition("/")
            # The files of a sample share what is in front of the first dot, and differ in the ending behind it.
            stem, dot, ending = name.partition(".")
            if not info.isreg() or info.issparse() or len(info.name) > LONGEST_NAME:
                notes[NO_FILES] += not info.isdir()
            elif dot and not OF_SHARD.match(info.name):
                if stem:
                    yield f"{folder}{slash}{stem}", ending.lower(), info
                else:
                    notes[HIDDEN] += 1
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"is damaged behind byte {max(place, 0)} ({error})" if place >= 0 else f"is no tar ({error})"
        ) from None
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"is cut short or damaged: there is no header and no end at byte {tar.offset}")
    if end - tar.offset > MOST_BYTES:
        raise UserError(f"ends at byte {tar.offset}, and {end - tar.offset} bytes follow: are two shards in one file?")


def _open_for_headers(shard: Path) -> BinaryIO:
    """Opens a shard such that of a store no more is fetched than the headers, more or less."""
    return opened(shard, BLOCK) if is_remote(shard) else open_binary(shard)


def _numbers(first: str, last: str) -> Sequence[str]:
    start, stop = int(first), int(last)
    if abs(stop - start) >= MOST_SHARDS:
        raise UserError(f"{{{first}..{last}}}: stands for more than {MOST_SHARDS} shards; correct it")
    padded = any(number.startswith("0") and len(number) > 1 for number in (first, last))
    width, step = max(len(first), len(last)) if padded else 0, 1 if stop >= start else -1
    return [f"{number:0{width}d}" for number in range(start, stop + step, step)]


class _Headers:
    """A shard as tarfile reads it: a header that has it read more than `left` bytes, to the end say, is an error."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.left = MOST_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.left -= size if size >= 0 else MOST_BYTES + 1
        if self.left < 0:
            raise UserError(f"has a header of more than {MOST_BYTES} bytes near byte {self.tell()}")
        return self.file.read(size)


class _Part(io.RawIOBase):
    """Bytes of a file as a file of their own, which closes the whole one."""

    def __init__(self, file: BinaryIO, first: int, size: int):
        self._file, self._first, self._size = file, first, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._first + self._position)
        found = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()
