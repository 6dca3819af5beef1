"""Tables in Parquet and JSON lines, read within bounds: damage is named, and memory is compared with the file's size.

Axes: N rows of a file, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from lapa.errors import UserError
from lapa.files import open_for_arrow, parse_json, reading, why_unreadable
from lapa.types import Plain

AGAIN = "write the dataset again"
# Bytes that columns of a file may take in memory: so many in any case, and so many times the size of the file. Repeated
# values take next to no room in a file.
SMALL_TABLE, EXPANSION = 2**28, 100
# Bytes of a number, or of a reference to a text, by the name of its type in parquet.
SIZES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "BYTE_ARRAY": 4}
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a table of a dataset.

    Raises UserError naming the file where it is damaged, lacks a column, or would be far larger in memory.
    """
    with parsing(path), open_for_arrow(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        if lacking := [name for name in columns or () if name not in parquet.schema_arrow.names]:
            raise UserError(f"{path}: lacks the columns {', '.join(lacking)}; {AGAIN}")
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) != parquet.metadata.num_rows:
            raise ValueError(f"its row groups hold {sum(rows)} rows, its footer declares {parquet.metadata.num_rows}")
        check_memory(parquet, file, columns, range(len(rows)))
        table = parquet.read(columns=columns)
        # Finds texts that are not UTF-8, which would raise where they are used.
        table.validate(full=True)
    return table


def schema_of(path: Path) -> pa.Schema:
    with parsing(path), open_for_arrow(path) as file:
        return pq.read_schema(file)


def column_names(path: Path) -> list[str]:
    return schema_of(path).names


def read_row_group(path: Path, group: int, column: str) -> pa.ChunkedArray:
    with parsing(path), open_for_arrow(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        check_memory(parquet, file, [column], [group])
        return parquet.read_row_group(group, columns=[column])[column]


def read_json_rows(path: Path, keys: Mapping[str, type]) -> list[dict[str, Any]]:
    with parsing(path):
        lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}); {AGAIN}") from None
        lacking = [key for key, kind in keys.items() if not isinstance(row, dict) or not isinstance(row.get(key), kind)]
        if lacking:
            raise UserError(f"{path}: line {number} lacks {', '.join(lacking)}; {AGAIN}")
        rows.append(row)
    return rows


class Texts(Plain, Sequence[str]):
    """Texts in one piece of memory, without an object of Python's for each.

    So the processes that a training forks share it: an object would be copied where it is looked at, with the page of
    memory around it, since its references are counted.
    """

    __slots__ = ("array",)

    def __init__(self, texts: pa.Array | pa.ChunkedArray | Sequence[str]):
        if not isinstance(texts, pa.Array | pa.ChunkedArray):
            texts = pa.array(texts, pa.large_string())
        self.array = texts.cast(pa.large_string())
        if isinstance(self.array, pa.ChunkedArray):
            self.array = self.array.combine_chunks()

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        """Returns one text, or those of an array of indices."""
        return Texts(self.array.take(pa.array(index))) if isinstance(index, np.ndarray) else self.array[index].as_py()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)


def texts_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a column as texts, "" for what is empty."""
    if is_text(column.type):
        return column.cast(pa.large_string()).fill_null("")
    return pa.chunked_array([pa.array([str(value or "") for value in column.to_pylist()], pa.large_string())])


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Raises what pyarrow, NumPy and Python raise of a damaged file as UserError naming `path`."""
    try:
        with reading(path, AGAIN):
            yield
    except UserError:
        raise
    except (pa.ArrowException, LookupError, MemoryError, OverflowError, TypeError, ValueError) as error:
        reason = why_unreadable(path) or (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}); {AGAIN}") from None


def integers(table: pa.Table, name: str, path: Path, empty: int | None = None) -> Int[np.ndarray, "N"]:
    """Returns a column of whole numbers, with `empty` for those that are not there; None: all must be."""
    column = table[name]
    if not pa.types.is_integer(column.type):
        raise UserError(f"{path}: {name} holds {column.type}, expected whole numbers; {AGAIN}")
    if column.null_count and empty is None:
        row = pc.index(column.is_null(), True).as_py()
        raise UserError(f"{path}: {name} is empty in row {row}, expected whole numbers; {AGAIN}")
    return as_numpy(column.fill_null(empty) if column.null_count else column)


def floats(column: pa.ChunkedArray, source: str) -> Float[np.ndarray, "N"]:
    """Returns a column of numbers, NaN for those that are not there."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise UserError(f"{source} holds {column.type}, expected numbers; {AGAIN}")
    column = column.cast(pa.float64(), safe=False)
    return as_numpy(column.fill_null(np.nan) if column.null_count else column)


def as_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Returns a column of numbers, none of which is empty; pyarrow's own way would import pandas (0.5 s)."""
    if isinstance(column, pa.ChunkedArray):
        return np.concatenate([np.zeros(0, column.type.to_pandas_dtype()), *map(as_numpy, column.chunks)])
    return np.from_dlpack(column)


def matrix(column: pa.ChunkedArray, width: int, source: str) -> Float[np.ndarray, "N D"]:
    """Returns a column as rows of `width` numbers; rows of one number may be stored as plain numbers.

    Raises UserError where a row, or a list inside it, is empty, or has another number of numbers than the rest.
    """
    flat = column.combine_chunks()
    num_rows, found = len(flat), 1
    while True:
        if isinstance(flat, pa.ExtensionArray):
            flat = flat.storage
        if not any(is_kind(flat.type) for is_kind in LISTS):
            break
        lengths = pc.list_value_length(flat).unique().to_pylist()
        if None in lengths:
            row = pc.index(flat.is_null(), True).as_py() // found
            raise UserError(f"{source} is empty at frame {row}; correct it or leave the episode out")
        if len(lengths) > 1:
            row = pc.index(pc.not_equal(pc.list_value_length(flat), lengths[0]), True).as_py() // found
            raise UserError(f"{source} changes its width at frame {row}; correct it or leave the episode out")
        found *= lengths[0] if lengths else 1
        flat = flat.flatten()
    if pa.types.is_decimal(flat.type):
        flat = flat.cast(pa.float64())
    if flat.null_count:
        row = pc.index(flat.is_null(), True).as_py() // found
        raise UserError(f"{source} is empty at frame {row}; correct it or leave the episode out")
    if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type) or pa.types.is_boolean(flat.type)):
        raise UserError(f"{source} holds {flat.type}, expected numbers; {AGAIN}")
    if num_rows and found != width:
        raise UserError(f"{source} is {found} numbers wide, {width} in meta/info.json; correct one of them")
    # What float32 does not hold is not finite, which is named where the numbers are checked.
    with np.errstate(over="ignore"):
        numbers = as_numpy(flat.cast(pa.uint8()) if pa.types.is_boolean(flat.type) else flat)
        return numbers.astype(np.float32, copy=False).reshape(num_rows, width)


def check_memory(parquet: pq.ParquetFile, file: BinaryIO, columns: Sequence[str] | None, groups: Sequence[int]) -> None:
    """Raises ValueError where these columns of these row groups would be far larger in memory than the file."""
    metadata, kinds = parquet.metadata, {field.name: field.type for field in parquet.schema_arrow}
    size, text_size, texts = 0, 0, dict[str, str]()
    for leaf in range(len(parquet.schema)):
        column = parquet.schema.column(leaf)
        name = max((name for name in kinds if f"{column.path}.".startswith(f"{name}.")), key=len, default="")
        if columns is not None and name not in columns:
            continue
        width = SIZES.get(column.physical_type, max(8, column.length)) + 4 * column.max_repetition_level
        for group in groups:
            rows, chunk = metadata.row_group(group).num_rows, metadata.row_group(group).column(leaf)
            values = max(chunk.num_values, rows, _num_slots(kinds.get(name), rows, chunk.num_values))
            size += max(chunk.total_uncompressed_size, values * width)
            if column.physical_type == "BYTE_ARRAY":
                texts[column.path] = name
                # As if each text were as large as all that are stored.
                text_size += values * chunk.total_uncompressed_size
    require_in_proportion(size, file)
    if text_size > _most_memory(file):
        text_size, dictionaries = 0, pq.ParquetFile(file, metadata=metadata, read_dictionary=list(texts))
        for group in groups:
            table = dictionaries.read_row_group(group, columns=sorted(set(texts.values())))
            text_size += sum(map(_text_size, table.columns))
            require_in_proportion(text_size, file)


def _most_memory(file: BinaryIO) -> int:
    return max(SMALL_TABLE, EXPANSION * file.seek(0, 2))


def require_in_proportion(num_bytes: int, file: BinaryIO) -> None:
    """Raises ValueError where `num_bytes` are far more than the size of the file."""
    if num_bytes > (most := _most_memory(file)):
        raise ValueError(f"would take {num_bytes / 2**20:.0f} MiB of memory, a file of this size {most >> 20} at most")


def _num_slots(kind: pa.DataType | None, rows: int, values: int) -> int:
    """Returns the most values that Arrow makes room for, which it does in empty lists of a fixed size as well."""
    if isinstance(kind, pa.BaseExtensionType):
        return _num_slots(kind.storage_type, rows, values)
    if kind is None or not pa.types.is_nested(kind):
        return rows
    if pa.types.is_fixed_size_list(kind):
        return _num_slots(kind.value_type, rows * kind.list_size, values)
    return max(_num_slots(kind.field(number).type, values, values) for number in range(kind.num_fields))


def _texts_in(column: pa.ChunkedArray | pa.Array) -> list[pa.DictionaryArray]:
    """Returns the texts of a column that is read as dictionaries, out of its lists and structures."""
    if isinstance(column, pa.ChunkedArray):
        return [texts for chunk in column.chunks for texts in _texts_in(chunk)]
    if isinstance(column, pa.DictionaryArray):
        return [] if pa.types.is_primitive(column.type.value_type) else [column]
    if isinstance(column, pa.ExtensionArray):
        return _texts_in(column.storage)
    if isinstance(column, pa.StructArray):
        return [texts for field in column.flatten() for texts in _texts_in(field)]
    return _texts_in(column.flatten()) if pa.types.is_nested(column.type) else []


def _text_size(column: pa.ChunkedArray) -> int:
    """Returns the bytes of a column's texts, each counted as often as it occurs."""
    lengths = (pc.binary_length(texts.dictionary).take(texts.indices) for texts in _texts_in(column))
    return sum(pc.sum(its).as_py() or 0 for its in lengths)
