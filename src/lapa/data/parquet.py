"""Parquet tables of a dataset, local or remote: numbers, and pictures kept as PNG or JPEG beside them.

Axes: T time, H W image, D numbers of a feature, N rows of a file, E episodes of it, P episodes that it has rows of.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, UInt8
from PIL import Image, UnidentifiedImageError

from lapa.errors import UserError
from lapa.files import open_binary, reading, what_instead

AGAIN = "write the dataset again"
# Row groups of pictures that stay in memory; LeRobot writes one an episode, and an item has a picture a camera.
OPEN_GROUPS = 4


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A table of a dataset. UserError naming the file where it cannot be read."""
    try:
        with reading(path, AGAIN), open_binary(path) as file:
            return pq.ParquetFile(file).read(columns=columns)
    except pa.ArrowException as error:
        raise _unreadable(path, error) from None


def column_names(path: Path) -> list[str]:
    """The columns of a table. UserError as `read_parquet`."""
    try:
        with reading(path, AGAIN), open_binary(path) as file:
            return pq.read_schema(file).names
    except pa.ArrowException as error:
        raise _unreadable(path, error) from None


def matrix(column: pa.ChunkedArray, width: int, source: str) -> Float[np.ndarray, "T D"]:
    """A column as rows of `width` numbers; one number a row may be stored plainly. UserError naming `source`."""
    flat = column.combine_chunks()
    num_rows = len(flat)
    if isinstance(flat, pa.ExtensionArray):
        flat = flat.storage
    while pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        flat = flat.flatten()
    if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type) or pa.types.is_boolean(flat.type)):
        raise UserError(f"{source} holds {flat.type}, expected numbers; {AGAIN}")
    values = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if len(values) != num_rows * width:
        raise UserError(f"{source} is not {width} numbers wide in every row, as meta/info.json says; {AGAIN}")
    return values.reshape(num_rows, width)


def find_episodes(
    owners_N: Int[np.ndarray, "N"],
    seconds_N: Float[np.ndarray, "N"] | None,
    episodes_E: Int[np.ndarray, "E"],
    lengths_E: Int[np.ndarray, "E"],
    fps: float,
) -> tuple[Int[np.ndarray, "E"], dict[int, str]]:
    """The first row of each of the episodes in a data file, and what is wrong, by episode.

    owners_N: the episode of each row; seconds_N: its time in the episode, None where the file has no such column.
    Frame i of an episode must be at i / fps seconds, to half a frame: pictures are found by it.
    """
    present_P, firsts_P, kinds_N, counts_P = np.unique(
        owners_N, return_index=True, return_inverse=True, return_counts=True
    )
    places_N = np.arange(len(owners_N)) - firsts_P[kinds_N]
    scattered = np.flatnonzero(np.diff(owners_N)) + 1
    in_pieces = set(owners_N[scattered[places_N[scattered] != 0]].tolist())
    late: set[int] = set()
    if seconds_N is not None:
        fits_N = np.abs(seconds_N - places_N / fps) < 0.5 / fps
        fits_N[1:] &= (np.diff(seconds_N) > 0) | (places_N[1:] == 0)
        late = set(owners_N[~fits_N].tolist())
    there = dict(zip(present_P.tolist(), zip(firsts_P.tolist(), counts_P.tolist(), strict=True), strict=True))
    firsts, flaws = [], {}
    for episode, length in zip(episodes_E.tolist(), lengths_E.tolist(), strict=True):
        first, count = there.get(episode, (0, 0))
        firsts.append(first)
        if count < length:
            flaws[episode] = f"lacks rows of episode {episode} (has {count} of {length}); {AGAIN}"
        elif count > length or episode in in_pieces:
            flaws[episode] = f"has {count} rows of episode {episode} of {length} frames, or not in one piece; {AGAIN}"
        elif seconds_N is not None and episode in late:
            flaws[episode] = f"episode {episode}: {_time_flaw(seconds_N[first : first + length], fps)}"
    return np.array(firsts), flaws


def _time_flaw(seconds_T: np.ndarray, fps: float) -> str:
    """What is wrong with the times of an episode, in words."""
    forward = np.diff(seconds_T) > 0
    if not forward.all():
        frame = int(np.argmin(forward)) + 1
        told = f"{seconds_T[frame]:.3f} s after {seconds_T[frame - 1]:.3f} s"
        return f"timestamps go backwards at frame {frame} ({told}); correct them or leave the episode out"
    expected_T = np.arange(len(seconds_T)) / fps
    frame = int(np.argmin(np.abs(seconds_T - expected_T) < 0.5 / fps))
    told = f"frame {frame} is at {seconds_T[frame]:.3f} s, should be at {expected_T[frame]:.3f} s"
    return f"timestamps do not match {fps:g} fps ({told}); correct them, or fps in meta/info.json"


class StoredPictures:
    """Pictures in tables: columns of {bytes, path}, of which the last few row groups stay in memory."""

    def __init__(self) -> None:
        self._starts: dict[Path, np.ndarray] = {}
        self._groups: OrderedDict[tuple[Path, int, str], pa.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_starts": {}, "_groups": OrderedDict()}

    def get(self, path: Path, column: str, rows: Sequence[int]) -> UInt8[np.ndarray, "T H W 3"]:
        """The pictures of rows that exist. UserError naming file and row where one cannot be decoded."""
        if path not in self._starts:
            try:
                with reading(path, AGAIN), open_binary(path) as file:
                    metadata = pq.ParquetFile(file).metadata
            except pa.ArrowException as error:
                raise _unreadable(path, error) from None
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._starts[path] = np.cumsum([0, *sizes])
        starts = self._starts[path]
        pictures = []
        for row in rows:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            value = self._group(path, group, column)[int(row - starts[group])].as_py()
            encoded = value.get("bytes") if isinstance(value, dict) else value
            if not encoded:
                raise UserError(f"{path}: {column} holds no picture in row {row}; {AGAIN}")
            try:
                pictures.append(decode_picture(encoded))
            except ValueError as error:
                raise UserError(f"{path}: {column} cannot be decoded in row {row} ({error}); {AGAIN}") from None
        if len({picture_HWC.shape for picture_HWC in pictures}) > 1:
            raise UserError(f"{path}: pictures of {column} differ in size between rows {rows[0]} and {rows[-1]}")
        return np.stack(pictures)

    def _group(self, path: Path, group: int, column: str) -> pa.ChunkedArray:
        key = path, group, column
        if key not in self._groups:
            try:
                with reading(path, AGAIN), open_binary(path) as file:
                    self._groups[key] = pq.ParquetFile(file).read_row_group(group, columns=[column])[column]
            except (pa.ArrowException, KeyError) as error:
                raise _unreadable(path, error) from None
            if len(self._groups) > OPEN_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def decode_picture(encoded: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """A PNG or JPEG as RGB. UserError where it is none, or damaged."""
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise UserError("no PNG or JPEG") from None
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(str(error)) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    told = what_instead(path) or str(error).splitlines()[0]
    return UserError(f"{path}: cannot be read ({told}); {AGAIN}")
