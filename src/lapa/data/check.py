"""Reads every file of a dataset and names the damaged ones: `lapa data check DATASET`.

A file whose checksum is in SHA256SUMS is compared with it. Without one, a video is decoded from its first frame to its
last, and of all episodes images, actions and states are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from lapa.checksums import read_sums, verify
from lapa.console import print_results, progress, warn
from lapa.data.config import CheckConfig
from lapa.data.dataset import Dataset
from lapa.data.lerobot import LeRobotDataset
from lapa.data.spec import open_dataset
from lapa.data.tables import AGAIN
from lapa.data.video import count_frames
from lapa.data.workers import Workers
from lapa.errors import StoreError, UserError

# Frames of an episode that are in memory at once.
WINDOW = 64
MOST_NAMED = 5


def run(config: CheckConfig) -> None:
    """`lapa data check`. Raises UserError naming the damaged files, and for a dataset that cannot be opened."""
    dataset = open_dataset(config.data)
    sums = read_sums(dataset.root) if isinstance(dataset, LeRobotDataset) else {}
    files = {name: partial(verify, dataset.root, AGAIN, {name: digest}) for name, digest in sums.items()}
    videos = _unlisted_videos(dataset, sums)
    damaged: list[str] = []

    def check(read: Callable[[], None]) -> str:
        try:
            read()
        except StoreError:
            raise
        except UserError as error:
            return str(error)
        return ""

    with progress() as bar, Workers(os.cpu_count() or 1, threads=True) as workers:
        jobs = {**files, **videos}
        task = bar.add_task("reading files", total=len(jobs), note="")
        for error in workers.in_order(check, ((job,) for job in jobs.values())):
            damaged += [error] * bool(error)
            bar.update(task, advance=1, note=f"{len(damaged)} damaged")
        task = bar.add_task("reading episodes", total=len(dataset), note="")
        for read in _episodes(dataset, with_images=not isinstance(dataset, LeRobotDataset)):
            error = check(read)
            damaged += [error] * bool(error and error not in damaged)
            bar.update(task, advance=1, note=f"{len(damaged)} damaged")
    for error in damaged:
        warn(error)
    print_results(
        {
            "dataset": str(dataset.root),
            "files_compared": len(files),
            "videos_decoded": len(videos),
            "episodes_read": len(dataset),
            "damaged": damaged,
        },
        f"{dataset.root}: {len(files)} files compared with their SHA-256, {len(videos)} videos decoded, "
        f"{len(dataset)} episodes read: {len(damaged) or 'nothing'} damaged",
        as_json=config.json,
    )
    if damaged:
        named = "; ".join(error.partition(": ")[0] for error in damaged[:MOST_NAMED])
        more = f" and {len(damaged) - MOST_NAMED} more" if len(damaged) > MOST_NAMED else ""
        raise UserError(f"{dataset.root}: damaged: {named}{more}; copy or write them again")


def _unlisted_videos(dataset: Dataset, sums: dict[str, str]) -> dict[str, Callable[[], None]]:
    """The videos without a checksum, with a function that decodes each."""
    if not isinstance(dataset, LeRobotDataset):
        return {}
    lengths: dict[str, int] = {}
    for camera in dataset.cameras:
        if dataset.camera_feature(camera)["dtype"] == "video":
            for episode, length in enumerate(dataset.lengths.tolist()):
                name = dataset.video_path(episode, camera).relative_to(dataset.root).as_posix()
                lengths[name] = lengths.get(name, 0) + length
    return {
        name: partial(_decode, dataset, name, length) for name, length in sorted(lengths.items()) if name not in sums
    }


def _decode(dataset: Dataset, name: str, length: int) -> None:
    """Raises UserError where a video has fewer frames than its episodes, or damaged ones."""
    path = dataset.root / name
    whole, damaged = count_frames(path)
    if damaged:
        raise UserError(f"{path}: {damaged} of its frames are damaged; {AGAIN}")
    if whole < length:
        raise UserError(f"{path}: has {whole} frames, its episodes {length}; {AGAIN}")


def _episodes(dataset: Dataset, with_images: bool) -> Iterator[Callable[[], None]]:
    """For each episode, a function that reads its numbers, and its images where they are not in videos."""
    cameras = [
        camera for camera in dataset.cameras if with_images or dataset.camera_feature(camera)["dtype"] == "image"
    ]

    def read(episode: int) -> None:
        if isinstance(dataset, LeRobotDataset):
            dataset.rows(episode)
        if dataset.action_dim is not None:
            dataset.actions(episode)
        dataset.states(episode)
        length = int(dataset.lengths[episode])
        for first in range(0, length, WINDOW):
            window = range(first, min(first + WINDOW, length))
            if dataset.coded:
                dataset.image_codes(episode, window)
            else:
                for camera in cameras:
                    dataset.frames(episode, window, camera)

    return (partial(read, episode) for episode in range(len(dataset)))
