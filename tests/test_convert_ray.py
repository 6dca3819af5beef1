"""`lapa data SOURCE --engine ray`: the dataset of one machine, also after kills of workers and of the command."""

from __future__ import annotations

import os
import pickle
import platform
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import pytest

from lapa.data import convert_ray
from lapa.data.convert import run
from lapa.data.convert_ray import ShardActor
from lapa.data.metadata import JOURNAL
from lapa.data.source import Item
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.files import read_json
from lapa.ray_cluster import RETRIES, RayConfig, cluster
from lapa.sources.videos import VideosConfig
from test_convert import FEW, SCENES, converted
from test_data_merge import files
from test_sources_videos import write_clip


class Killed(BaseException):
    """Ends the command as SIGKILL would, but for the test."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_ray, "SHARD_ITEMS", 2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips, of which one is too short and one is damaged."""
    folder = tmp_path_factory.mktemp("ray") / "clips"
    for number in range(7):
        write_clip(folder / f"{number}.mp4", num=2 if number == 1 else 6 + number)
    write_clip(folder / "3x.mkv", num=40, codec="libx264")
    content = (folder / "3x.mkv").read_bytes()
    (folder / "3x.mkv").write_bytes(content[: len(content) * 2 // 3])
    return folder


def options(clips: Path, out: Path, **changes: Any) -> VideosConfig:
    given = {"caption": "wait", "size": 32, "min_seconds": 0.5, "skip_bad": True, "fps": 10.0, **changes}
    return VideosConfig(str(clips), out=out, **given)


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one machine writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(options(clips, out, workers=1))
    return files(out)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray as far as it is used, in this process; of shards that are made, the last one is returned first."""

    class Handle:
        """Calls of an actor are carried out at once, and kept as what a reference stands for."""

        def __init__(self, actor: Any):
            for name in ("check", "make"):
                setattr(self, name, SimpleNamespace(remote=partial(self.call, getattr(actor, name))))

        def call(self, method: Any, *arguments: Any) -> object:
            reference = object()
            checks.update([] if arguments else [reference])
            try:
                results[reference] = method(*pickle.loads(pickle.dumps(arguments)))
            except Killed:
                results[reference] = ConnectionError()
            except MemoryError as error:
                results[reference] = error
            return reference

    def get(reference: object) -> Any:
        result = results.pop(reference)
        if isinstance(result, ConnectionError | MemoryError):
            raise result
        return result

    def wait(references: list[object], num_returns: int, timeout: float | None = None) -> tuple[list[object], list]:
        return [next((one for one in references if one in checks), references[-1])], []

    results: dict[object, Any] = {}
    checks: set[object] = set()

    @contextmanager
    def cluster(config: RayConfig) -> Iterator[Any]:
        yield SimpleNamespace(
            remote=lambda **_: lambda actor: SimpleNamespace(remote=lambda *arguments: Handle(actor(*arguments))),
            wait=wait,
            get=get,
            exceptions=SimpleNamespace(
                RayError=RuntimeError, RayActorError=ConnectionError, OutOfMemoryError=MemoryError
            ),
            cluster_resources=lambda: {"CPU": 8.0},
        )

    monkeypatch.setattr(convert_ray, "cluster", cluster)


@pytest.mark.usefixtures("stand_in")
def test_shards_in_any_order_become_the_dataset_of_one_machine(
    clips: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(options(clips, tmp_path / "out", engine="ray"))
    assert files(tmp_path / "out") == whole
    assert len(open_dataset(tmp_path / "out")) == 7
    shown = capsys.readouterr().err
    assert "left out, too short: 1" in shown and "3x.mkv: damaged; " in shown


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("killed", [0, 1, 3, 5])
def test_duplicates_in_other_shards_are_those_of_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, killed: int
) -> None:
    def dying(writer: DatasetWriter, record: dict[str, Any]) -> int:
        if writer.root == tmp_path / "out" and writer.num_episodes + 1 == killed:
            raise Killed
        return original(writer, record)

    whole = converted(tmp_path, SCENES, "whole", **FEW)
    original = DatasetWriter._write_record
    capsys.readouterr()
    if killed:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(DatasetWriter, "_write_record", dying)
            converted(tmp_path, SCENES, engine="ray", **{**FEW, "workers": 0})
    converted(tmp_path, SCENES, engine="ray", resume=True, **{**FEW, "workers": 0})
    assert "left out, looks like an earlier episode: 3" in capsys.readouterr().err
    assert files(tmp_path / "out") == files(whole.root)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("engine", "function", "place"),
    [("ray", "_write_record", 1), ("ray", "close_item", 3), ("local", "_write_record", 3)],
)
def test_a_command_that_is_killed_loses_and_doubles_nothing(
    clips: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    function: str,
    place: int,
) -> None:
    calls = []

    def dying(writer: DatasetWriter, *arguments: Any) -> Any:
        if writer.root == tmp_path / "out":
            calls.append(arguments)
            if len(calls) == place:
                raise Killed
        return original(writer, *arguments)

    original = getattr(DatasetWriter, function)
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, function, dying)
        with pytest.raises(Killed):
            run(options(clips, tmp_path / "out", engine="ray"))
    assert (tmp_path / "out" / JOURNAL).exists()
    (tmp_path / "out" / ".incoming-local").mkdir()
    (tmp_path / "out" / ".incoming-local" / "0.mp4").write_bytes(b"begun by a run on one machine")
    run(options(clips, tmp_path / "out", engine=engine, resume=True, workers=int(engine == "local")))
    assert files(tmp_path / "out") == whole


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("place", range(2, 7))
def test_what_was_added_is_not_looked_at_again(
    clips: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """Also where the command is killed between the shard's two removals."""
    calls = []

    def dying(path: Path) -> None:
        if path.name.startswith(convert_ray.PRIVATE) or path.suffix == ".json":
            calls.append(path)
            if len(calls) == place:
                raise Killed
        remove(path)

    def read(path: Path) -> Any:
        markers.append(path.name)
        return read_json(path)

    remove, markers = convert_ray.remove, list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(convert_ray, "remove", dying)
        with pytest.raises(Killed):
            run(options(clips, tmp_path / "out", engine="ray"))
    monkeypatch.setattr(convert_ray, "read_json", read)
    run(options(clips, tmp_path / "out", engine="ray", resume=True))
    added = {f"{2 * shard:09d}.json" for shard in range((place + 1) // 2)}
    assert markers and not added & set(markers)
    assert files(tmp_path / "out") == whole


def test_workers_get_work_before_what_is_made_is_added() -> None:
    class Worker:
        check = SimpleNamespace(remote=object)

    given: list[int] = []

    def make(worker: Worker, shard: int) -> object:
        given.append(shard)
        return object()

    ray = SimpleNamespace(
        wait=lambda references, **_: (references, []),
        get=lambda _: {},
        exceptions=SimpleNamespace(RayActorError=ConnectionError, OutOfMemoryError=MemoryError),
    )
    shards = convert_ray._shards_made(ray, Worker, make, range(5), 2)
    made = [next(shards)]
    assert given == [0, 1, 2, 3]
    assert sorted([*made, *shards]) == given == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("stand_in")
def test_errors_of_workers_stop_the_command_and_resume_goes_on(
    clips: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lapa.data.convert.encode_clip", lambda path, *_: full_disk(path))
        with pytest.raises(ValueError, match=r"out: no space left"):
            run(options(clips, tmp_path / "out", engine="ray"))
    run(options(clips, tmp_path / "out", engine="ray", resume=True))
    assert files(tmp_path / "out") == whole


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("what", ["its folder", "a video"])
def test_a_shard_that_is_lost_before_it_is_added_is_made_again(
    clips: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def lost(actor: ShardActor, marker: Path, items: Sequence[Item]) -> None:
        original(actor, marker, items)
        if marker.stem == "000000002":
            folder = marker.parent / read_json(marker)["folder"]
            if what == "a video":
                next(folder.rglob("file-001.mp4")).unlink()
            else:
                shutil.rmtree(folder)

    original = ShardActor._make
    named = r".*file-001\.mp4'" if what == "a video" else r"'2\.mp4'"
    with monkeypatch.context() as patch:
        patch.setattr(ShardActor, "_make", lost)
        with pytest.raises(ValueError, match=rf"000000002\.json: lacks {named}; --resume makes it again"):
            run(options(clips, tmp_path / "out", engine="ray"))
    run(options(clips, tmp_path / "out", engine="ray", resume=True))
    assert files(tmp_path / "out") == whole


def full_disk(path: Path) -> None:
    raise OSError("out: no space left")


@pytest.mark.usefixtures("stand_in")
def test_what_ray_needs(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--ray\.num-workers"):
        run(options(clips, tmp_path / "other", engine="ray", workers=2))
    for wrong, message in (
        ({"num_gpus": 1.0}, "--ray.num-gpus 1: a conversion uses no GPU"),
        ({"num_workers": -1}, "--ray.num-workers -1: must be at least 1"),
        ({"num_cpus": float("nan")}, "--ray.num-cpus nan: must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(options(clips, tmp_path / "other", engine="ray", ray=RayConfig(**wrong)))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install "lapa-vla\[ray\]"'):
        run(options(clips, tmp_path / "other", engine="ray"))


VERSIONS = """Version mismatch: The cluster was started with:
    Ray: 2.40.0
    Python: 3.11.9
This process on node 10.0.0.5 was started with:
    Ray: 2.58.0
    Python: 3.12.1
"""


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (
            None,
            Exception("The current node timed out during startup.\nMore advice"),
            r"^Ray cannot start a cluster on this machine \(The current node timed out during startup\.\)$",
        ),
        (
            "ray-head:6379",
            RuntimeError(VERSIONS),
            r"^--ray\.address ray-head:6379: runs Ray 2\.40\.0 and Python 3\.11\.9, here are 2\.58\.0 and 3\.12\.1; "
            r"install the same on all machines \(pip install ray==2\.40\.0\)$",
        ),
    ],
)
def test_a_cluster_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, address: str | None, error: Exception, message: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    ray, data = ModuleType("ray"), ModuleType("ray.data")
    context = SimpleNamespace(get_current=SimpleNamespace)
    vars(data).update(DataContext=context)
    vars(ray).update(data=data, is_initialized=lambda: False, init=fails)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    with pytest.raises(ValueError, match=message), cluster(RayConfig(address=address)):
        pass


@pytest.mark.usefixtures("stand_in")
def test_a_shard_that_kills_its_worker_every_time_is_named(
    clips: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = []

    def killed(actor: ShardActor, marker: Path, items: Sequence[Item]) -> None:
        if marker.stem == "000000002" and len(kills) < most:
            kills.append(marker)
            (marker.parent / f"{convert_ray.PRIVATE}half").mkdir(exist_ok=True)
            # The second time, by Ray, where a machine runs out of memory.
            raise MemoryError if len(kills) == 2 else Killed
        original(actor, marker, items)

    original = ShardActor._make
    monkeypatch.setattr(ShardActor, "_make", killed)
    most = RETRIES
    run(options(clips, tmp_path / "out", engine="ray"))
    assert files(tmp_path / "out") == whole and len(kills) == RETRIES
    most = 100
    with pytest.raises(ValueError, match="000000002: its worker was killed 4 times"):
        run(options(clips, tmp_path / "other", engine="ray"))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("fault", ["full disk", "no AV1", "another version", "no source"])
def test_work_of_a_worker_that_cannot_do_it_goes_to_others(
    clips: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    fault: str,
) -> None:
    class Unfit(ShardActor):
        number = 0

        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.number = Unfit.number = Unfit.number + 1
            if fault == "another version" and self.number == 2:
                self.expected = self.expected | {"PyAV": "1.0"}
            if fault == "no AV1" and self.number in (2, 3):
                self.expected = self.expected | {"codec libdav1d": "missing"}

        def check(self) -> dict[str, str]:
            there = clips.with_name("away") if fault == "no source" and self.number == 2 else clips
            clips.rename(there)
            try:
                return super().check()
            finally:
                there.rename(clips)

        def _make(self, marker: Path, items: Sequence[Item]) -> None:
            if fault == "full disk" and self.number == 2:
                raise OSError(28, "No space left on device", "/tmp/x.mp4")
            super()._make(marker, items)

    monkeypatch.setattr(convert_ray, "ShardActor", Unfit)
    run(options(clips, tmp_path / "out", engine="ray"))
    assert files(tmp_path / "out") == whole
    shown = " ".join(capsys.readouterr().err.split())
    reason = {
        "full disk": "No space left on device",
        "no AV1": "codec libdav1d there (here missing)",
        "no source": "cannot read what can be read here",
    }
    assert f"others do its work: {platform.node()}" in shown
    assert reason.get(fault, f"PyAV {av.__version__} (here 1.0); install the same on all machines") in shown


class DyingActor(ShardActor):
    """Is killed once amid its second shard, and once after it."""

    def _make(self, shard: Path, items: Sequence[Item]) -> None:
        marks = Path(self.folder)
        if shard.stem.endswith("2") and not (marks / "amid").exists():
            (marks / "amid").touch()
            self.convert(items, shard.with_name(f"{convert_ray.PRIVATE}killed"))
            os.kill(os.getpid(), signal.SIGKILL)
        super()._make(shard, items)
        if shard.stem.endswith("2") and not (marks / "after").exists():
            (marks / "after").touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_ray_itself_and_killed_workers(
    clips: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(convert_ray, "ShardActor", DyingActor)
    monkeypatch.chdir(tmp_path)
    run(options(clips, Path("out"), engine="ray", ray=RayConfig(num_cpus=0.5, num_workers=1)))
    assert (tmp_path / "amid").exists() and (tmp_path / "after").exists()
    assert files(tmp_path / "out") == whole
