"""Datasets on stores that fsspec reaches: the same as on disk; no permission, no package, no such place."""

from __future__ import annotations

import pickle
import shutil
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from check_lerobot import write_v21
from fsspec.implementations.memory import MemoryFileSystem
from upath.implementations.memory import MemoryPath
from upath.registry import register_implementation

from lapa.data.convert import run
from lapa.data.dataset import Dataset
from lapa.data.lerobot import require_folder
from lapa.data.spec import open_dataset
from lapa.files import as_path, is_remote
from lapa.sources.lerobot import LeRobotConfig
from lapa.sources.synthetic import write_synthetic_dataset


class DeniedFileSystem(MemoryFileSystem):
    """A bucket that its owner keeps to himself; `shut` names what may not be read."""

    protocol = "denied"
    shut: tuple[str, ...] = ("",)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("denied://", "memory://") if isinstance(path, str) else path)

    def info(self, path, **options):
        self._refuse(path)
        return super().info(path, **options)

    def ls(self, path, detail=True, **options):
        self._refuse(path)
        return super().ls(path, detail, **options)

    def _open(self, path, mode="rb", **options):
        self._refuse(path)
        return super()._open(path, mode, **options)

    def _refuse(self, path: str) -> None:
        if any(part in path for part in self.shut):
            raise PermissionError("Access Denied (403)")


class DeniedPath(MemoryPath):
    pass


@pytest.fixture(scope="module", autouse=True)
def denied() -> None:
    fsspec.register_implementation("denied", DeniedFileSystem, clobber=True)
    register_implementation("denied", DeniedPath, clobber=True)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(tmp_path_factory.mktemp("remote") / "ds", 3, frames=8, size=32, actions=True)


@pytest.fixture
def bucket(local: Dataset) -> Iterator[str]:
    """A folder of the memory file system that holds the dataset."""
    name = f"bucket-{uuid.uuid4().hex}"
    upload(local.root, f"/{name}/ds")
    yield name
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def upload(root: Path, target: str) -> None:
    fsspec.filesystem("memory").put(f"{root}/", f"{target}/", recursive=True)


def same(one: Dataset, other: Dataset) -> None:
    assert one.fingerprint == other.fingerprint
    assert one.episodes == other.episodes
    assert (one.fps, one.extra, one.features) == (other.fps, other.extra, other.features)
    for episode in range(len(one.lengths)):
        assert np.array_equal(one.frames(episode), other.frames(episode))
        assert np.array_equal(one.frames(episode, [5, 0, 5]), other.frames(episode, [5, 0, 5]))
        assert np.array_equal(one.actions(episode), other.actions(episode))
        assert np.array_equal(one.states(episode), other.states(episode))


def test_a_dataset_in_memory_is_the_one_on_disk(local: Dataset, bucket: str) -> None:
    dataset = open_dataset(f"memory://{bucket}/ds,horizon=0.5:2.0")
    same(local, dataset)
    assert (dataset.name, dataset.horizon, dataset.weight) == ("ds", 0.5, 2.0)
    for seconds in ("0", "nan", "inf"):
        with pytest.raises(
            ValueError, match=rf"must be above 0 seconds, got {seconds}|expected float, got '{seconds}'"
        ):
            open_dataset(f"memory://{bucket}/ds,horizon={seconds}")
    assert is_remote(dataset.root)
    same(local, pickle.loads(pickle.dumps(dataset)))


def test_file_urls_are_folders_of_this_machine(local: Dataset) -> None:
    dataset = open_dataset(f"file://{local.root}")
    same(local, dataset)
    assert require_folder(dataset).root == local.root
    same(local, open_dataset(f"lerobot:file://{local.root}"))


def test_old_layouts_and_stored_images_open_from_a_store(local: Dataset, bucket: str, tmp_path: Path) -> None:
    write_v21(local, tmp_path / "old")
    upload(tmp_path / "old", f"/{bucket}/old")
    dataset = open_dataset(f"old=lerobot:memory://{bucket}/old,control=delta")
    assert dataset.name == "old"
    same(open_dataset(f"lerobot:{tmp_path / 'old'},control=delta"), dataset)
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"none", "path": "x"}]}), path)
    assert as_path(f"file://{path}") == path


def test_a_store_is_converted_to_this_machine(local: Dataset, bucket: str, tmp_path: Path) -> None:
    run(LeRobotConfig(f"memory://{bucket}/ds", out=tmp_path / "new", size=32, workers=1))
    dataset = open_dataset(tmp_path / "new")
    assert np.array_equal(dataset.actions(2), local.actions(2))
    assert dataset.extra["source_fingerprint"] == local.fingerprint


def test_rewriting_needs_a_folder_of_this_machine(bucket: str) -> None:
    with pytest.raises(ValueError, match="needs a dataset folder on this machine"):
        require_folder(open_dataset(f"memory://{bucket}/ds"))


def test_what_is_not_there_is_said(bucket: str) -> None:
    with pytest.raises(ValueError, match=rf"memory://{bucket}/none/meta/info\.json: no such file; a dataset folder"):
        open_dataset(f"memory://{bucket}/none")
    fsspec.filesystem("memory").rm(f"/{bucket}/ds/videos/observation.images.front/chunk-000/file-001.mp4")
    with pytest.raises(ValueError, match=r"file-001\.mp4: no such file; 1 of 3 video files"):
        open_dataset(f"memory://{bucket}/ds").require_files(["front"])
    fsspec.filesystem("memory").rm(f"/{bucket}/ds/videos", recursive=True)
    with pytest.raises(ValueError, match=r"file-000\.mp4: no such file; 3 of 3 video files"):
        open_dataset(f"memory://{bucket}/ds").require_files(["front"])


@pytest.mark.parametrize("shut", ["", "meta/episodes", "videos", "data/"])
def test_no_permission_is_said_with_the_file(bucket: str, shut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeniedFileSystem, "shut", (shut,))
    with pytest.raises(ValueError, match=rf"denied:///{bucket}/ds/{shut}.*: no permission.* \(Access Denied"):
        open_dataset(f"denied://{bucket}/ds").frames(0)


def test_an_empty_object_is_told(bucket: str) -> None:
    video = f"/{bucket}/ds/videos/observation.images.front/chunk-000/file-001.mp4"
    fsspec.filesystem("memory").pipe(video, b"")
    with pytest.raises(ValueError, match=r"file-001\.mp4: not a readable video \(it is empty, zero bytes\)"):
        open_dataset(f"memory://{bucket}/ds").frames(1)


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(protocol: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=rf"reading {protocol}:// needs another package: pip install {package}"):
        open_dataset(f"{protocol}://bucket/dataset,horizon=0.6")


def test_an_unknown_store_is_said() -> None:
    with pytest.raises(ValueError, match="nonsense://bucket: no such file system"):
        open_dataset("nonsense://bucket")


def test_folders_without_permission_are_said_here_too(
    local: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(local.root, tmp_path / "d")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Whoever runs the tests as root may read everything.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"meta/info\.json: no permission to read it .*change its permissions"):
        open_dataset(tmp_path / "d")
