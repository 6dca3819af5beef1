"""Conversion on the workers of a Ray cluster: each converts shards, which this process adds to the dataset in order.

    lapa data webdataset 's3://bucket/clips-{00000..01023}.tar' --engine ray --ray.address auto --out s3://bucket/DATASET

A shard is a few items in a row. A worker converts it into a folder of its own, as a dataset that is not finished, whose
journal has the episodes; for a dataset on a store that folder is uploaded. One small file then names it and makes the
shard: as a whole or not at all, and by one of two workers where both have converted it. Its episodes are moved to the
dataset as soon as all shards before it are there, on a store by copies that do not leave it; then that file is removed,
and the folder. So the dataset is that of one machine, byte for byte. The shard of a worker that is killed, whose disk
is full, whose codecs are others or that cannot read the source goes to another one; after this process is killed,
--resume goes on with the shards that are there.
https://docs.ray.io/en/latest/ray-core/actors.html
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import av

import lapa
from lapa.console import progress, say, warn
from lapa.data.source import Item
from lapa.data.writer import REQUESTS, DatasetWriter
from lapa.errors import UserError, shown
from lapa.files import as_path, copy_file, find_files, is_remote, read_json, remove, write_json
from lapa.ray_cluster import RETRIES, RayConfig, cluster, killed_too_often, pool, ray_errors

# Prefix of the folders in the dataset's with what waits to be added.
INCOMING = ".incoming-"
SHARDS = f"{INCOMING}shards"
SHARD_ITEMS = 16
# Of the folder with what a worker has converted, and the names of the files that make shards.
PRIVATE = "made-"
MARKERS = "*.json"
# Of encoders and decoders: those that datasets are written with, and those that videos are mostly in.
CODECS = ("libx264", "h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d")

# Converts items into a folder, as an unfinished dataset, and returns warnings.
Convert = Callable[[Sequence[Item], Path], list[str]]
# Returns why a few items, which the command's own machine can read, cannot be read here; "" where they can.
Look = Callable[[], str]


def versions() -> dict[str, str]:
    """What decides the bytes of a conversion, besides its options: versions, and codecs that are there."""
    return {
        "lapa": lapa.__version__,
        "PyAV": av.__version__,
        "FFmpeg": ".".join(map(str, av.library_versions["libavcodec"])),
        **{f"codec {codec}": "there" if codec in av.codecs_available else "missing" for codec in CODECS},
    }


class ShardActor:
    """A worker: makes shards. folder: the one that the command's paths are relative to; expected: `versions` there."""

    def __init__(self, convert: Convert, look: Look, folder: str, expected: dict[str, str]) -> None:
        self.convert, self.look, self.folder, self.expected = convert, look, folder, expected

    def check(self) -> dict[str, str]:
        """Returns, as `make` does, whether this worker would write what the command's own machine writes."""
        own = versions()
        other = [f"{name} {own[name]} (here {here})" for name, here in self.expected.items() if own[name] != here]
        if other:
            return {"unfit": f"{platform.node()} has {', '.join(other)}; install the same on all machines"}
        self._enter()
        if problem := self.look():
            fix = "let all machines reach the same source under the same name"
            return {"unfit": f"{platform.node()} cannot read what can be read here: {problem}; {fix}"}
        return {}

    def make(self, shard: str, items: Sequence[Item]) -> dict[str, str]:
        """Makes a shard, named by its marker. Errors are returned, not raised: Ray would wrap them.

        error: of the items or the store; unfit: of this worker, such as a full disk.
        """
        try:
            self._enter()
            self._make(as_path(shard), items)
        except UserError as error:
            return {"error": str(error)}
        except OSError as error:
            return {"unfit": f"{platform.node()}: {error}"}
        return {}

    def _enter(self) -> None:
        if Path(self.folder).is_dir():
            os.chdir(self.folder)

    def _make(self, marker: Path, items: Sequence[Item]) -> None:
        out = None if is_remote(marker) else marker.parent
        private, made = Path(tempfile.mkdtemp(prefix=PRIVATE, dir=out)), False
        try:
            warnings = self.convert(items, private)
            if out is None:
                paths = [path for path in private.rglob("*") if path.is_file()]
                targets = [marker.parent / path.relative_to(private.parent) for path in paths]
                with ThreadPoolExecutor(REQUESTS) as threads:
                    list(threads.map(copy_file, paths, targets))
            write_json(marker, {"folder": private.name, "warnings": warnings})
            made = True
        finally:
            if out is None or not made:
                shutil.rmtree(private, ignore_errors=True)


def convert_with_ray(
    convert: Convert, look: Look, items: Sequence[Item], writer: DatasetWriter, config: RayConfig
) -> None:
    """Converts items and adds their episodes to the dataset. Raises UserError where no worker can go on."""
    folder = writer.root / SHARDS / writer.identity

    def marker_of(start: int) -> Path:
        return folder / f"{start:09d}.json"

    def shard_of(start: int) -> Sequence[Item]:
        return items[start : start + SHARD_ITEMS]

    # Shards by the number of their first item; some items of the first one may be done.
    starts = range(0, len(items), SHARD_ITEMS)
    waiting = deque(start for start in starts if start + len(shard_of(start)) > writer.num_items)
    made = _made_before(writer.root, folder, waiting)
    missing = [start for start in waiting if start not in made]
    with progress() as bar:
        task = bar.add_task("converting", total=len(items), note="")

        def add_ready() -> None:
            while waiting and waiting[0] in made:
                start = waiting.popleft()
                marker, shard = marker_of(start), shard_of(start)
                note = read_json(marker)
                for warning in note["warnings"]:
                    warn(warning)
                lost = ""
                try:
                    writer.add_unfinished(folder / note["folder"], start)
                except FileNotFoundError as error:
                    lost = str(error.filename)
                else:
                    lost = "".join(item.key for item in shard[writer.num_items - start :][:1])
                # Before the folder: what no file names is removed by --resume.
                remove(marker)
                if lost:
                    raise UserError(f"{marker}: lacks {shown(lost)}; --resume makes it again")
                made.remove(start)
                remove(folder / note["folder"])
            bar.update(task, completed=writer.num_items)

        add_ready()
        if missing:
            with cluster(config) as ray, ray_errors(ray):
                size, cpus, _ = pool(config, "cpu", ray.cluster_resources(), len(missing))
                say(f"{size} workers of Ray, each with {cpus:g} CPU cores")
                actor = ray.remote(num_cpus=cpus)(ShardActor)
                arguments = convert, look, str(Path.cwd()), versions()

                def make(worker: Any, start: int) -> Any:
                    marker = marker_of(start)
                    name = str(marker if is_remote(marker) else marker.absolute())
                    return worker.make.remote(name, shard_of(start))

                for start in _shards_made(ray, lambda: actor.remote(*arguments), make, missing, size):
                    made.add(start)
                    add_ready()
    remove_incoming(writer.root)


def _shards_made(
    ray: Any, start: Callable[[], Any], make: Callable[[Any, int], Any], shards: Iterable[int], size: int
) -> Iterator[int]:
    """Yields the numbers of shards as they are made, by `size` workers. Raises UserError where no worker can go on.

    start: returns a worker; make: has it make a shard, and returns the reference to what it will return.
    All workers have work again before a number is yielded: what the caller then does takes time.
    A worker that is killed is started again, and its shard made again; one that cannot write what the others write, or
    cannot write at all, gets no further shard.
    """
    waiting = deque(shards)
    # By shard; None: a worker's start.
    killed: Counter[int | None] = Counter()
    idle: list[Any] = []
    # By the reference to what they are to return; those that are starting have no shard yet.
    running: dict[Any, tuple[Any, int | None]] = {}

    def begin() -> None:
        actor = start()
        running[actor.check.remote()] = actor, None

    for _ in range(size):
        begin()
    reason = ""
    while waiting or any(shard is not None for _, shard in running.values()):
        if not running:
            raise UserError(f"no worker is left: {reason}; what is finished is kept, continue with --resume")
        ray.wait(list(running), num_returns=1)
        finished, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
        made: list[int] = []
        for reference in finished:
            actor, shard = running.pop(reference)
            try:
                result = ray.get(reference)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                killed[shard] += 1
                if killed[shard] > RETRIES:
                    raise killed_too_often("its start" if shard is None else f"{shard:09d}", killed[shard]) from None
                begin()
                waiting.extendleft([] if shard is None else [shard])
                continue
            del killed[shard]
            if result.get("error"):
                raise UserError(result["error"])
            unfit = result.get("unfit", "")
            if unfit:
                reason = unfit
                warn(f"a worker of Ray is left out, and others do its work: {unfit}")
                waiting.extendleft([] if shard is None else [shard])
            else:
                idle.append(actor)
                made += [] if shard is None else [shard]
        while idle and waiting:
            actor, shard = idle.pop(), waiting.popleft()
            running[make(actor, shard)] = actor, shard
        yield from made


def _made_before(root: Path, folder: Path, waiting: Iterable[int]) -> set[int]:
    """Returns the shards of `waiting` whose markers are there; removes what else earlier runs have left."""
    if is_remote(root):
        cast(Any, root).fs.invalidate_cache()
    else:
        folder.mkdir(parents=True, exist_ok=True)
    markers = {int(path.stem): path for path in find_files(folder, MARKERS) if path.stem.isdecimal()}
    made = markers.keys() & set(waiting)
    with ThreadPoolExecutor(REQUESTS) as threads:
        notes = threads.map(read_json, [markers[start] for start in made])
        kept = {folder, *(markers[start] for start in made), *(folder / note["folder"] for note in notes)}
        paths = [*find_files(root / SHARDS, "*"), *find_files(folder, f"{PRIVATE}*"), *markers.values()]
        list(threads.map(remove, [path for path in paths if path not in kept]))
    remove_incoming(root, but=SHARDS)
    return made


def remove_incoming(root: Path, but: str = "") -> None:
    """Removes the folders of what waits to be added, except one."""
    if is_remote(root):
        cast(Any, root).fs.invalidate_cache()
    for path in find_files(root, f"{INCOMING}*"):
        if path.name != but:
            remove(path)
