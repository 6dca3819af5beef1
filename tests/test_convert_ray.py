"""`lapa data SOURCE --engine ray`: the dataset of one machine, also after kills of workers and of the command."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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
from test_data_merge import files
from test_sources_videos import write_clip


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
    """Ray as far as it is used, in this process: shards are made last first."""

    @contextmanager
    def cluster(config: RayConfig) -> Iterator[Any]:
        def from_items(rows: Sequence[dict[str, Any]], override_num_blocks: int) -> Any:
            def map_batches(actor: Any, fn_constructor_args: tuple[Any, ...], **_: Any) -> Any:
                def iter_rows() -> Iterator[dict[str, Any]]:
                    worker = actor(*fn_constructor_args)
                    for row in reversed(rows):
                        made = worker({name: [value] for name, value in row.items()})
                        yield {name: values[0] for name, values in made.items()}

                return SimpleNamespace(iter_rows=iter_rows)

            return SimpleNamespace(map_batches=map_batches)

        data = SimpleNamespace(from_items=from_items, ActorPoolStrategy=lambda size: size)
        errors = SimpleNamespace(RayError=RuntimeError)
        yield SimpleNamespace(data=data, exceptions=errors, cluster_resources=lambda: {"CPU": 2.0})

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


class Killed(BaseException):
    """Ends the command as SIGKILL would, but for the test."""


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
def test_errors_of_workers_stop_the_command_and_resume_goes_on(
    clips: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lapa.data.convert.encode_clip", lambda path, *_: full_disk(path))
        with pytest.raises(ValueError, match=r"out: no space left"):
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


def test_a_cluster_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed_out(*_: Any, **__: Any) -> None:
        raise Exception("The current node timed out during startup.\nMore advice")

    ray, data = ModuleType("ray"), ModuleType("ray.data")
    context = SimpleNamespace(get_current=SimpleNamespace)
    vars(data).update(DataContext=context)
    vars(ray).update(data=data, is_initialized=lambda: False, init=timed_out)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    message = r"cannot start a cluster.*\(The current node timed out during startup\.\)"
    with pytest.raises(ValueError, match=message), cluster(RayConfig()):
        pass


def test_a_shard_that_kills_its_worker_every_time_is_named(tmp_path: Path) -> None:
    def killed(items: Sequence[Item], folder: Path) -> list[str]:
        (folder / "begun").touch()
        raise Killed

    def make(convert: Any) -> dict[str, list[Any]]:
        return ShardActor(convert, str(tmp_path))({"path": [str(tmp_path / "000")], "items": [pickle.dumps([])]})

    for _ in range(RETRIES):
        with pytest.raises(Killed):
            make(killed)
    assert make(lambda items, folder: ["a warning"]) == {"error": [""]}
    # Made again, it would be killed.
    assert make(killed) == {"error": [""]}
    assert read_json(tmp_path / "000" / convert_ray.WARNINGS) == ["a warning"]
    shutil.rmtree(tmp_path / "000")
    for _ in range(RETRIES + 1):
        with pytest.raises(Killed):
            make(killed)
    assert "was killed 4 times" in make(killed)["error"][0]


class DyingActor(ShardActor):
    """Is killed once amid its second shard, and once after it."""

    def _make(self, shard: Path, items: Sequence[Item]) -> None:
        marks = Path(self.folder)
        if shard.name.endswith("2") and not (marks / "amid").exists():
            (marks / "amid").touch()
            self.convert(items, shard.with_name(".making-killed"))
            os.kill(os.getpid(), signal.SIGKILL)
        super()._make(shard, items)
        if shard.name.endswith("2") and not (marks / "after").exists():
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
