"""Labels: the latent action tokens of a dataset's frames, as parquet shards with a manifest.

A labels folder has `episodes-XXXXXX-YYYYYY.parquet` (one row a frame: episode_index, frame_index, codes, and where
asked for, embedding) and `manifest.json`, written last; by default it is `DATASET/labels/LAM_FINGERPRINT`. Shards are
whole or absent, so an interrupted run continues with the missing ones; the schema of each counts the pairs that were
left out of it, so that a reader can check that it is complete. Folders may lie wherever fsspec reaches.
Axes: T time, L latent action length, D width, N rows of all episodes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lapa import config as configs
from lapa.checksums import SUMS, opened_line, read_sums, require_sum, sealed_line, verify, write_marker
from lapa.data.config import LARGEST_CODE
from lapa.data.tables import as_numpy
from lapa.errors import UserError
from lapa.files import as_path, atomic_path, find_files, open_for_arrow, reading
from lapa.hub.download import as_hub_id, hub_folder
from lapa.hub.push import Pushed

MANIFEST = "manifest.json"
SHARDS = "episodes-*.parquet"
# What is downloaded from the hub.
FILES = (MANIFEST, SHARDS, SUMS)
# The columns with several numbers a row.
LISTS = ("codes", "embedding")
# The key of a shard's notes in its schema.
NOTES = b"lapa"
MAKE_AGAIN = "run `lapa label --resume`, which makes it again"
LABEL_ANEW = "run `lapa label --overwrite`"


@dataclass(frozen=True)
class Manifest:
    """Origin, shape and statistics of labels.

    code_usage: for each of the L positions, the share of rows with each code. skipped_episodes: number not longer than
    the horizon. static_pairs: number left out for lack of motion. bad_episodes: those that could not be read.
    """

    lam_fingerprint: str
    dataset_fingerprint: str
    camera: str
    horizon_seconds: float
    horizon_frames: int
    latent_length: int
    codebook_size: int
    num_rows: int
    num_episodes: int
    skipped_episodes: int
    code_usage: list[list[float]]
    embeddings: bool = False
    precision: str = "fp32"
    min_motion: float = 0.0
    static_pairs: int = 0
    bad_episodes: tuple[int, ...] = ()


@dataclass(frozen=True)
class ShardNotes:
    """What is left out of a shard: the number of pairs without motion, and the episodes that could not be read."""

    static_pairs: int = 0
    bad_episodes: tuple[int, ...] = ()


@dataclass(frozen=True)
class EpisodeLabels:
    """The labels of one episode: frame t's codes stand for the change from frame t to frame t + horizon."""

    frame_indices_T: np.ndarray
    codes_TL: np.ndarray
    embeddings_TLD: np.ndarray | None = None


def shard_path(folder: Path, first_episode: int, last_episode: int) -> Path:
    """Returns the shard of the episodes first..last (inclusive)."""
    return folder / f"episodes-{first_episode:06d}-{last_episode:06d}.parquet"


def shard_episodes(path: Path) -> tuple[int, int]:
    """Returns the first and last episode of a shard, by its name."""
    first, last = map(int, path.stem.split("-")[1:])
    return first, last


def write_shard(path: Path, episodes: dict[int, EpisodeLabels], notes: ShardNotes | None = None) -> None:
    """Writes one shard, atomically, sorted by episode and frame. Raises UserError where codes are no codes."""
    order = sorted(episodes)
    for i in order:
        require_codes(episodes[i].codes_TL, 2**31, f"{path}: episode {i}")
    columns = {
        "episode_index": np.concatenate([np.full(len(episodes[i].frame_indices_T), i, np.int64) for i in order]),
        "frame_index": np.concatenate([episodes[i].frame_indices_T.astype(np.int64) for i in order]),
    }
    codes = np.concatenate([episodes[i].codes_TL.astype(np.int32) for i in order])
    table = pa.table({**columns, "codes": _fixed_lists(codes)})
    embeddings = [episodes[i].embeddings_TLD for i in order]
    if all(embedding is not None for embedding in embeddings):
        flat = np.concatenate(
            [e.reshape(len(e), math.prod(e.shape[1:])).astype(np.float32) for e in embeddings if e is not None]
        )
        table = table.append_column("embedding", _fixed_lists(flat))
    if notes is not None:
        table = table.replace_schema_metadata({NOTES: sealed_line(configs.to_dict(notes))[0]})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read_shard(path: Path, columns: Sequence[str] | None = None, sha256: str | None = None) -> pa.Table:
    """Reads a shard and verifies its checksums. Raises UserError naming the file where it is damaged.

    sha256: the checksum of the whole file, where it is known.
    """
    try:
        with reading(path, MAKE_AGAIN), open_for_arrow(path) as file:
            if sha256 is not None:
                require_sum(path, hashlib.sha256(file.read()).hexdigest(), sha256, LABEL_ANEW)
            table = pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)
    # Names of columns that are not UTF-8 raise UnicodeDecodeError.
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); {MAKE_AGAIN}") from None
    odd = {field.name for field in table.schema if (field.name in LISTS) != pa.types.is_fixed_size_list(field.type)}
    if wrong := sorted(odd | (set(columns or ()) - set(table.column_names))):
        raise UserError(f"{path}: damaged (the columns {', '.join(wrong)}); {MAKE_AGAIN}")
    return table


def shard_notes(path: Path, table: pa.Table) -> ShardNotes:
    """Returns the notes of a shard that was read. Raises UserError naming the file where they are damaged."""
    line = (table.schema.metadata or {}).get(NOTES)
    if line is None:
        return ShardNotes()
    try:
        notes = configs.from_dict(ShardNotes, opened_line(line)[0])
    except UserError as error:
        raise UserError(f"{path}: damaged (its notes: {error}); {MAKE_AGAIN}") from None
    return notes


def table_codes(table: pa.Table, length: int, codebook_size: int, path: Path) -> np.ndarray:
    """Returns the codes of a shard [N, L], not narrowed. Raises UserError naming the file for what is no code."""
    column = table["codes"]
    if column.type.list_size != length:
        raise UserError(f"{path}: its codes are {column.type.list_size} long, {length} in {MANIFEST}; {LABEL_ANEW}")
    if column.combine_chunks().flatten().null_count or column.null_count:
        raise UserError(f"{path}: codes are missing; {LABEL_ANEW}")
    codes_NL = _from_fixed_lists(column)
    require_codes(codes_NL, codebook_size, str(path))
    return codes_NL


def require_codes(codes_NL: np.ndarray, codebook_size: int, source: str) -> None:
    """Raises UserError naming `source` where codes are no whole numbers from 0 to below the size of the codebook."""
    if not np.issubdtype(codes_NL.dtype, np.integer):
        raise UserError(f"{source}: its codes are {codes_NL.dtype}, expected whole numbers; {LABEL_ANEW}")
    if codes_NL.size and not 0 <= int(codes_NL.min()) <= int(codes_NL.max()) < codebook_size:
        found = f"{int(codes_NL.min())} to {int(codes_NL.max())}"
        raise UserError(f"{source}: its codes lie in {found}, expected 0 to {codebook_size - 1}; {LABEL_ANEW}")


def _numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """Returns a column of numbers of episodes or frames. Raises UserError naming the file for anything else."""
    column = table[name]
    if not pa.types.is_integer(column.type) or column.null_count:
        kind = "empty values" if column.null_count else column.type
        raise UserError(f"{path}: {name} holds {kind}, expected whole numbers; {LABEL_ANEW}")
    numbers_N = as_numpy(column)
    if len(numbers_N) and not 0 <= int(numbers_N.min()) <= int(numbers_N.max()) < 2**31:
        raise UserError(
            f"{path}: {name} lies in {numbers_N.min()} to {numbers_N.max()}, expected numbers from 0; {LABEL_ANEW}"
        )
    return numbers_N


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, which marks labels as complete, and the checksums of the shards."""
    write_marker(folder, MANIFEST, configs.to_dict(manifest), (path.name for path in folder.glob(SHARDS)))


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of finished labels. Raises UserError naming it where it is damaged."""
    path = folder / MANIFEST
    manifest = configs.load(Manifest, path)
    verify(folder, LABEL_ANEW, {name: digest for name, digest in read_sums(folder).items() if name == MANIFEST})
    sizes = manifest.latent_length, manifest.codebook_size
    known = 1 <= min(sizes) <= max(sizes) <= LARGEST_CODE and 1 <= manifest.horizon_frames < 2**31
    if not known or manifest.num_rows < 0:
        raise UserError(f"{path}: its sizes cannot be; {LABEL_ANEW}")
    return manifest


class Labels(Pushed):
    """A finished labels folder. Codes are held in memory, as small integers; embeddings are read when asked for."""

    def __init__(self, folder: Path, manifest: Manifest, shards: Iterable[tuple[Path, pa.Table]]) -> None:
        """shards: file and table of each, in order; each is read after the one before it was copied."""
        self.folder, self.manifest = folder, manifest
        rows, length = manifest.num_rows, manifest.latent_length
        small = np.int16 if manifest.codebook_size <= 2**15 else np.int32
        try:
            self._codes_NL, self._frames_N = np.empty((rows, length), small), np.empty(rows, np.int32)
            episodes_N, taken = np.empty(rows, np.int32), 0
        except (MemoryError, OverflowError, ValueError):
            raise UserError(f"{folder / MANIFEST}: {rows} rows of {length} codes cannot be; {LABEL_ANEW}") from None
        for path, table in shards:
            there = slice(taken, taken + len(table))
            taken = there.stop
            if taken <= rows:
                self._codes_NL[there] = table_codes(table, length, manifest.codebook_size, path)
                self._frames_N[there] = _numbers(table, "frame_index", path)
                episodes_N[there] = _numbers(table, "episode_index", path)
        if taken != rows:
            raise UserError(f"{folder}: has {taken} rows, {rows} in {MANIFEST}; {LABEL_ANEW}")
        if (np.diff(episodes_N) < 0).any():
            raise UserError(f"{folder}: its episodes are not in order; {LABEL_ANEW}")
        # Rows are sorted by episode: those of _episodes_E[i] are _starts[i] to _starts[i + 1].
        found_E, first_E = np.unique(episodes_N, return_index=True)
        self._episodes_E, self._starts = found_E.astype(np.int64), np.append(first_E, rows)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        lam_fingerprint: str | None = None,
        dataset_fingerprint: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Labels:
        """Opens a labels folder, or labels by their id on the hub.

        revision: a branch, tag or commit on the hub (`user/name@revision` names one too). token: by default the one
        that is logged in. Raises UserError naming the folder where it is unfinished, or where its fingerprints differ
        from the given ones.
        """
        if as_hub_id(folder, revision) is not None:
            make = "; or make labels with `lapa label --lam LAM --data DATASET`"
            folder = hub_folder(folder, FILES, make, "dataset", marker=MANIFEST, revision=revision, token=token)
        folder = as_path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such labels folder; make one with `lapa label --lam LAM --data DATASET`")
        if not (folder / MANIFEST).exists():
            raise UserError(f"{folder}: unfinished or not a labels folder (no {MANIFEST}); run `lapa label --resume`")
        manifest = read_manifest(folder)
        if lam_fingerprint is not None and manifest.lam_fingerprint != lam_fingerprint:
            raise UserError(
                f"{folder}: made by the latent action model {manifest.lam_fingerprint}, not by {lam_fingerprint}; "
                "label the dataset again with this model"
            )
        if dataset_fingerprint is not None and manifest.dataset_fingerprint != dataset_fingerprint:
            raise UserError(
                f"{folder}: labels another dataset, or an earlier state of this one; run `lapa label` again"
            )
        columns, sums = ["episode_index", "frame_index", "codes"], read_sums(folder)
        paths = sorted(find_files(folder, SHARDS), key=shard_episodes)
        return cls(folder, manifest, ((path, read_shard(path, columns, sums.get(path.name))) for path in paths))

    def _artifact_folder(self) -> AbstractContextManager[Path]:
        return nullcontext(self.folder)

    @property
    def episodes(self) -> list[int]:
        """The episodes with a labelled frame, in order."""
        return self._episodes_E.tolist()

    def codes(self, episode_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the labelled frames of an episode, (frame_indices_T, codes_TL), both int64, perhaps empty."""
        place = int(np.searchsorted(self._episodes_E, episode_index))
        known = place < len(self._episodes_E) and self._episodes_E[place] == episode_index
        rows = slice(*self._starts[place : place + 2]) if known else slice(0, 0)
        return self._frames_N[rows].astype(np.int64), self._codes_NL[rows].astype(np.int64)

    def embeddings(self, episode_index: int) -> np.ndarray:
        """Returns the embeddings [T, L * D] of the same frames. Raises UserError where the labels have none."""
        if not self.manifest.embeddings:
            raise UserError(f"{self.folder}: has no embeddings; label again with --embeddings")
        for path in find_files(self.folder, SHARDS):
            first, last = shard_episodes(path)
            if first <= episode_index <= last:
                table = read_shard(path, ["episode_index", "embedding"])
                rows = np.searchsorted(as_numpy(table["episode_index"]), [episode_index, episode_index + 1])
                return _from_fixed_lists(table["embedding"])[slice(*rows)]
        raise UserError(f"{self.folder}: has no shard with episode {episode_index}; {LABEL_ANEW}")


def _fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _from_fixed_lists(column: pa.ChunkedArray) -> np.ndarray:
    width = column.type.list_size
    return as_numpy(column.combine_chunks().flatten()).reshape(-1, width)
