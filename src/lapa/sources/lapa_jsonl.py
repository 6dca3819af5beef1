"""The released LAPA code's files, labels included: its JSONL for pretraining, and its JSON list for finetuning.

    lapa data lapa-jsonl latent_action_pretraining_openx.jsonl --out OPENX       # the labels: OPENX/labels/released
    lapa policy pretrain --policy LWM --data lapa-jsonl:latent_action_pretraining_openx.jsonl \\
        --labels OPENX/labels/released --out POLICY
    lapa data lapa-jsonl finetune.json --images . --out data/finetune

The published JSONL holds codes of pictures and no pictures: an `lwm` policy reads them in place. Rows whose ids or
paths name the step of an episode are put together, others are an episode each.
Formats: lapa.sources.lapa_rows. Axes: T time, H W image, N codes of a picture, L latent action length.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Int
from PIL import Image

from lapa import config as configs
from lapa.console import finish, say, warn
from lapa.data import convert
from lapa.data.action_space import ActionSpace
from lapa.data.convert import ConvertOptions
from lapa.data.dataset import ACTION, STATE, Dataset
from lapa.data.labels import MANIFEST, EpisodeLabels, Manifest, shard_path, write_shard
from lapa.data.lerobot import LeRobotDataset
from lapa.data.source import Clip, Item, Source, SourceDataset
from lapa.errors import UserError
from lapa.files import as_path, claim_output, reading, remove_folder
from lapa.sources.cache import cached, stamp
from lapa.sources.lapa_index import RowEpisodes, look_through
from lapa.sources.lapa_rows import Row, existing, read_row
from lapa.sources.rlds.table import POSE

CAMERA = "image"
LABELS = Path("labels", "released")
# Pixels of a side that one code of the released image tokeniser stands for.
CODE_SIDE = 16
EPISODES_PER_SHARD = 10_000


@dataclass(frozen=True)
class LapaJsonlReading:
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
    convert.run(config, config)
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
            [stamp(existing(self.root)), pictured, codes, options.skip_bad],
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
