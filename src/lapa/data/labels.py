"""Labels: the latent action tokens of a dataset's frames, as parquet shards with a manifest.

A labels folder holds `episodes-XXXXXX-YYYYYY.parquet` (one row a frame: episode_index, frame_index, codes, and
where asked for, embedding) and `manifest.json`, written last. By default it lies beside the dataset it labels, in
`DATASET/labels/LAM_FINGERPRINT`. Shards are whole or absent, so an interrupted run goes on with what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lapa import config as configs
from lapa.files import atomic_path

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What labels say of themselves.

    code_usage: for each of the L positions, the share of rows that each code has.
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


@dataclass(frozen=True)
class EpisodeLabels:
    """The labels of one episode: frame t's codes stand for the change from frame t to frame t + horizon."""

    frame_indices_T: np.ndarray
    codes_TL: np.ndarray
    embeddings_TLD: np.ndarray | None = None


def shard_path(folder: Path, first_episode: int, last_episode: int) -> Path:
    """The shard that holds the episodes first..last (inclusive)."""
    return folder / f"episodes-{first_episode:06d}-{last_episode:06d}.parquet"


def write_shard(path: Path, episodes: dict[int, EpisodeLabels]) -> None:
    """Writes one shard, atomically, sorted by episode and frame."""
    order = sorted(episodes)
    columns = {
        "episode_index": np.concatenate([np.full(len(episodes[i].frame_indices_T), i, np.int64) for i in order]),
        "frame_index": np.concatenate([episodes[i].frame_indices_T.astype(np.int64) for i in order]),
    }
    codes = np.concatenate([episodes[i].codes_TL.astype(np.int32) for i in order])
    table = pa.table({**columns, "codes": _fixed_lists(codes)})
    embeddings = [episodes[i].embeddings_TLD for i in order]
    if all(embedding is not None for embedding in embeddings):
        flat = np.concatenate([e.reshape(len(e), -1).astype(np.float32) for e in embeddings if e is not None])
        table = table.append_column("embedding", _fixed_lists(flat))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


class Labels:
    """A finished labels folder, read whole (a row is a few integers)."""

    def __init__(self, folder: Path, manifest: Manifest, table: pa.Table) -> None:
        self.folder, self.manifest, self._table = folder, manifest, table

    @classmethod
    def open(
        cls, folder: Path, *, lam_fingerprint: str | None = None, dataset_fingerprint: str | None = None
    ) -> Labels:
        """Opens a labels folder.

        Raises ValueError naming the folder where it is unfinished, or where its fingerprints are not the given ones.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such labels folder; make one with `lapa label --lam LAM --data DATASET`")
        if not (folder / MANIFEST).exists():
            raise ValueError(f"{folder}: unfinished or not a labels folder (no {MANIFEST}); run `lapa label --resume`")
        manifest = configs.load(Manifest, folder / MANIFEST)
        if lam_fingerprint is not None and manifest.lam_fingerprint != lam_fingerprint:
            raise ValueError(
                f"{folder}: made by the latent action model {manifest.lam_fingerprint}, not by {lam_fingerprint}; "
                "label the dataset again with this model"
            )
        if dataset_fingerprint is not None and manifest.dataset_fingerprint != dataset_fingerprint:
            raise ValueError(
                f"{folder}: labels another dataset, or an earlier state of this one; run `lapa label` again"
            )
        table = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("episodes-*.parquet")))
        if len(table) != manifest.num_rows:
            raise ValueError(
                f"{folder}: {len(table)} rows where {MANIFEST} says {manifest.num_rows}; run `lapa label --overwrite`"
            )
        return cls(folder, manifest, table)

    @cached_property
    def _rows(self) -> dict[int, slice]:
        """Episode index -> its rows in the table, which is sorted by episode."""
        episodes = self._table["episode_index"].to_numpy()
        indices, starts = np.unique(episodes, return_index=True)
        ends = [*starts[1:], len(episodes)]
        return {int(i): slice(int(a), int(b)) for i, a, b in zip(indices, starts, ends, strict=True)}

    @cached_property
    def _codes(self) -> np.ndarray:
        return _from_fixed_lists(self._table["codes"]).astype(np.int64)

    @cached_property
    def _frames(self) -> np.ndarray:
        return self._table["frame_index"].to_numpy()

    @cached_property
    def _embeddings(self) -> np.ndarray:
        return _from_fixed_lists(self._table["embedding"])

    def codes(self, episode_index: int) -> tuple[np.ndarray, np.ndarray]:
        """The labelled frames of an episode: (frame_indices_T, codes_TL), both int64; empty where it has none."""
        rows = self._rows.get(episode_index, slice(0, 0))
        return self._frames[rows], self._codes[rows]

    def embeddings(self, episode_index: int) -> np.ndarray:
        """The continuous embeddings [T, L * D] of the same frames; ValueError where they were not asked for."""
        if "embedding" not in self._table.column_names:
            raise ValueError(f"{self.folder}: holds no embeddings; label again with --embeddings")
        return self._embeddings[self._rows.get(episode_index, slice(0, 0))]


def _fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _from_fixed_lists(column: pa.ChunkedArray) -> np.ndarray:
    width = column.type.list_size
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
