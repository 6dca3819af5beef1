"""RLDS datasets, such as the TFDS folders of Open X-Embodiment, to a dataset, without TensorFlow.

    lapa data rlds bridge_dataset/1.0.0 --camera image_0 --out data/bridge

A record of a TFRecord file is one episode. Interrupt it and go on with `--resume`.
Formats: https://github.com/google-research/rlds, https://www.tensorflow.org/datasets; datasets: arXiv 2310.08864.
Axes: T time, H W image, C channel, A action dimensions, S state dimensions.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image, UnidentifiedImageError

from lapa import files
from lapa.console import finish, progress, say, warn
from lapa.data.lerobot import INFO
from lapa.data.sources.rlds_layout import KNOWN, Known, Layout, Shard, choose_layout, dimension_names, read_info
from lapa.data.sources.tfrecord import Record, parse_example, read_records
from lapa.data.transforms import resize_and_crop
from lapa.data.writer import DatasetWriter, nothing_to_add, require_even

FORMATS = ("JPEG", "PNG")


@dataclass(frozen=True)
class RldsConfig:
    """Turn an RLDS (TFDS) folder, such as one of Open X-Embodiment, into a dataset."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with features.json, dataset_info.json and the TFRecord files; mostly NAME/VERSION."""
    out: Path
    """Folder of the dataset to write."""
    split: str = "train"
    """Split to read."""
    camera: tuple[str, ...] = ()
    """Cameras to keep, by their names in the observation; by default all."""
    actions: bool = True
    """Store actions and robot states; --no-actions leaves video and instruction only."""
    action_keys: tuple[str, ...] = ()
    """Step features that make up the action, in order; by default `action`, or what is known of the dataset."""
    caption: str | None = None
    """One text for the episodes that have no instruction."""
    fps: float | None = None
    """Steps per second, which RLDS does not store; needed where it is not known of the dataset."""
    size: int = 256
    """Height and width of the pictures: the short side is scaled to it, the centre cropped. Even."""
    limit: int | None = None
    """Number of episodes to write; by default all."""
    skip_bad: bool = False
    """Leave out, and count, damaged records, episodes that do not fit features.json, and missing shards."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with what an interrupted run wrote."""


@dataclass(frozen=True)
class _Episode:
    """A record, decoded. instructions: one a step."""

    frames_THWC: dict[str, np.ndarray]
    instructions: list[str]
    actions_TA: np.ndarray | None
    states_TS: np.ndarray | None


@dataclass
class _Tally:
    """What did not go as the user may believe; shown at the end."""

    skip_bad: bool
    num_read: int = 0
    skipped: int = 0
    unlabelled: int = 0
    changing: int = 0
    all_blank: int = 0
    blank: Counter[str] = field(default_factory=Counter)

    def skip(self, problem: str, count: int = 1) -> None:
        """Stops at the first problem, or with --skip-bad names it and counts the episodes lost."""
        if not self.skip_bad:
            raise ValueError(f"{problem}; download the file again, or give --skip-bad to leave out what is damaged")
        warn(f"skipped: {problem}")
        self.skipped += count

    def report(self) -> None:
        of_all = f"of {self.num_read} episodes"
        if self.skipped:
            warn(f"episodes skipped in all (--skip-bad): {self.skipped}")
        for camera, count in sorted(self.blank.items()):
            warn(f"camera {camera} shows one colour throughout in {count} {of_all}; --camera chooses others")
        if self.all_blank:
            warn(f"left out, because no camera shows anything: {self.all_blank} {of_all}")
        if self.unlabelled:
            warn(f"without instruction: {self.unlabelled} {of_all}; --caption TEXT gives them one")
        if self.changing:
            warn(f"the instruction changes, the first is taken: {self.changing} {of_all}")


def run(config: RldsConfig) -> None:
    """`lapa data rlds`."""
    complete = (config.out / INFO).exists()
    if nothing_to_add(config.out, resume=config.resume, overwrite=config.overwrite):
        return
    require_even(config.size)
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"--limit {config.limit}: must be at least 1")
    name, shards = read_info(config.folder, config.split)
    known = KNOWN.get(name, Known())
    layout = choose_layout(config.folder, known, config.camera, config.actions, config.action_keys)
    fps = known.fps if config.fps is None else config.fps
    if fps is None or fps <= 0:
        told = "is not known" if fps is None else f"cannot be {fps:g}"
        raise ValueError(f"{config.folder}: the control rate of {name} {told}; give it as --fps")
    tally = _Tally(config.skip_bad)
    shards = _present(shards, tally)
    files.claim_output(
        config.out, complete=complete, overwrite=config.overwrite, resume=config.resume, inputs=[config.folder]
    )
    say(f"reads {', '.join(layout.keys)}")
    settings = {"split": config.split, "limit": config.limit, "caption": config.caption, "features": layout.keys}
    writer = DatasetWriter(
        config.out,
        fps=fps,
        cameras=dict.fromkeys(layout.cameras, (config.size, config.size)),
        action_names=layout.action_names,
        state_names=dimension_names(layout.states),
        binary_actions=layout.binary_actions,
        control=layout.control,
        extra_info={"made_by": "lapa data rlds", "dataset": name, "version": config.folder.name, **settings},
        resume=config.resume,
    )
    if writer.num_episodes:
        say(f"resuming: {writer.num_episodes} episodes are done")
    _convert_all(shards, layout, writer, config, tally)
    tally.report()
    if not writer.num_episodes:
        raise ValueError(f"{config.folder}: none of its episodes can be used; choose another --camera or --split")
    dataset = writer.finish()
    what = f"dataset of {len(dataset.episodes)} episodes, {dataset.num_frames} frames at {fps:g} fps"
    finish(what, config.out, [f"lapa data info {config.out}", f"lapa latent train --data {config.out} --out LAM"])


def _present(shards: Sequence[Shard], tally: _Tally) -> list[Shard]:
    """The shards that are there; the others are a problem."""
    missing = [shard for shard in shards if not shard.path.is_file()]
    if missing:
        count = sum(shard.num_records for shard in missing)
        problem = f"{missing[0].path}: missing; {len(missing)} of {len(shards)} shards are, with {count} episodes"
        tally.skip(problem, count)
    return [shard for shard in shards if shard not in missing]


def _convert_all(
    shards: Sequence[Shard], layout: Layout, writer: DatasetWriter, config: RldsConfig, tally: _Tally
) -> None:
    total = sum(shard.num_records for shard in shards)
    limit = total if config.limit is None else config.limit
    with progress() as bar:
        task = bar.add_task("converting", total=min(total, limit), note="")
        for shard, record in _records(shards, tally):
            if writer.num_episodes >= limit:
                break
            source = f"{shard.path.name}:{record.index}"
            if source in writer.done_sources:
                continue
            try:
                episode = _read_episode(record, layout, config.size)
            except ValueError as error:
                tally.skip(f"{shard.path}: record {record.index} at byte {record.offset}: {error}")
                continue
            _add(episode, source, writer, config.caption, tally)
            bar.update(task, completed=writer.num_episodes)


def _records(shards: Sequence[Shard], tally: _Tally) -> Iterator[tuple[Shard, Record]]:
    """All records; a shard that holds another number of them than it should is a problem."""
    for shard in shards:
        num_found = 0
        for record in read_records(shard.path):
            num_found += 1
            yield shard, record
        if num_found != shard.num_records:
            problem = f"{shard.path}: {num_found} records found, dataset_info.json says {shard.num_records}"
            tally.skip(problem, max(0, shard.num_records - num_found))


def _add(episode: _Episode, source: str, writer: DatasetWriter, caption: str | None, tally: _Tally) -> None:
    tally.num_read += 1
    blank = [name for name, frames in episode.frames_THWC.items() if not np.ptp(frames, axis=(0, 1, 2)).any()]
    tally.blank.update(blank)
    if len(blank) == len(episode.frames_THWC):
        tally.all_blank += 1
        return
    instruction = episode.instructions[0] if episode.instructions else ""
    tally.changing += len(set(episode.instructions)) > 1
    tally.unlabelled += not (instruction or caption)
    writer.add_episode(
        episode.frames_THWC,
        instruction or caption or "",
        actions=episode.actions_TA,
        states=episode.states_TS,
        source=source,
    )


def _read_episode(record: Record, layout: Layout, size: int) -> _Episode:
    """Decodes a record. ValueError, which does not name it, where it is damaged or does not fit features.json."""
    if record.error is not None:
        raise ValueError(record.error)
    values = parse_example(record.payload, layout.keys)
    lacking = [key for key in layout.keys if key not in values]
    if lacking:
        raise ValueError(f"lacks {', '.join(lacking)}, which features.json names")
    num_steps = len(values[next(iter(layout.cameras.values()))])
    if not num_steps:
        raise ValueError("has no step")
    return _Episode(
        {name: _pictures(values, key, num_steps, size) for name, key in layout.cameras.items()},
        _texts(values[layout.instruction]) if layout.instruction else [],
        _rows(values, layout.actions, num_steps) if layout.actions else None,
        _rows(values, layout.states, num_steps) if layout.states else None,
    )


def _pictures(values: Mapping[str, Any], key: str, num_steps: int, size: int) -> np.ndarray:
    if len(values[key]) != num_steps:
        raise ValueError(f"{key} has {len(values[key])} pictures in an episode of {num_steps} steps")
    frames = []
    for step, encoded in enumerate(values[key]):
        try:
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                frames.append(resize_and_crop(np.asarray(image.convert("RGB"))[None], size)[0])
        # Pillow raises SyntaxError for a broken PNG; numbers where bytes should be are a TypeError.
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
            reason = "no JPEG or PNG" if isinstance(error, UnidentifiedImageError | TypeError) else error
            raise ValueError(f"{key} cannot be decoded at step {step} ({reason})") from None
    return np.stack(frames)


def _texts(encoded: Sequence[bytes]) -> list[str]:
    try:
        return [text.decode().strip() for text in encoded]
    except (UnicodeDecodeError, AttributeError):
        raise ValueError("its instruction is not UTF-8 text") from None


def _rows(values: Mapping[str, Any], widths: Mapping[str, int], num_steps: int) -> np.ndarray:
    """The numbers of several features side by side, [T, their widths in all]."""
    columns = []
    for key, width in widths.items():
        flat = values[key]
        if not isinstance(flat, np.ndarray) or len(flat) != num_steps * width:
            raise ValueError(f"{key} is not {width} numbers in each of {num_steps} steps")
        rows = flat.reshape(num_steps, width).astype(np.float32)
        if not np.isfinite(rows).all():
            raise ValueError(f"{key} is not finite at step {int(np.argmin(np.isfinite(rows).all(axis=1)))}")
        columns.append(rows)
    return np.concatenate(columns, axis=1)
