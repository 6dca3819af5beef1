"""`lapa data merge`: the same files as if written at once, videos untouched, labels carried, and what does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapa import UserError
from lapa.checksums import SUMS
from lapa.data.config import MergeConfig
from lapa.data.dataset import Dataset
from lapa.data.labels import Labels
from lapa.data.lerobot import LeRobotDataset
from lapa.data.merge import merge, run
from lapa.data.metadata import INFO, JOURNAL, STATS
from lapa.data.spec import open_dataset
from lapa.data.writer import DatasetWriter
from lapa.files import read_json
from lapa.sources.synthetic import write_synthetic_dataset
from test_data_replace_actions import with_shared_files
from test_policy_training import write_labels

TEXTS = ("push", "pull", "push", "lift", "pull")


def write(root: Path, episodes: range, fps: float = 10, camera: str = "front", **extra: str) -> LeRobotDataset:
    """Episodes of a made-up source, each with frames and actions of its own."""
    writer = DatasetWriter(root, fps=fps, cameras={camera: (32, 32)}, action_names=["x", "y"], extra_info=extra)
    for episode in episodes:
        random = np.random.default_rng(episode)
        frames = random.integers(0, 255, (5 + episode, 32, 32, 3), np.uint8)
        actions = random.normal(size=(len(frames), 2)).astype(np.float32)
        writer.add_episode({camera: frames}, TEXTS[episode], actions=actions, source=f"clip {episode}")
    return writer.finish()


def merged(out: Path, *datasets: Dataset, **options: bool) -> LeRobotDataset:
    run(MergeConfig(tuple(str(dataset.root) for dataset in datasets), out, **options))
    found = open_dataset(out)
    assert isinstance(found, LeRobotDataset)
    return found


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_parts_merged_are_the_files_of_the_whole(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", range(5), made_by="a test")
    parts = [write(tmp_path / f"part{first}", range(first, last)) for first, last in ((0, 2), (2, 3), (3, 5))]
    (tmp_path / "out").mkdir()
    merge(parts, tmp_path / "out", whole.extra)
    assert files(tmp_path / "out") == files(whole.root)


def test_videos_are_linked_and_numbers_follow(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", range(2)), write(tmp_path / "b", range(2, 5))
    there = merged(tmp_path / "out", first, second)
    assert [e.instruction for e in there] == list(TEXTS) and there.tasks == ("push", "pull", "lift")
    assert [e.source for e in there] == [f"clip {number}" for number in range(5)]
    for episode, (dataset, number) in enumerate([(first, 0), (first, 1), (second, 0), (second, 1), (second, 2)]):
        assert there.video_path(episode).samefile(dataset.video_path(number))
        assert (there.actions(episode) == dataset.actions(number)).all()
        assert (there.frames(episode) == dataset.frames(number)).all()
    assert [note["fingerprint"] for note in there.extra["merged"]] == [first.fingerprint, second.fingerprint]
    assert merged(tmp_path / "again", there, write(tmp_path / "c", range(1))).lengths.tolist() == [5, 6, 7, 8, 9, 5]


@pytest.mark.usefixtures("edited_datasets")
def test_files_that_episodes_share_stay_shared(tmp_path: Path) -> None:
    plain = write_synthetic_dataset(tmp_path / "plain", 4, frames=8, size=32, actions=True)
    shared = with_shared_files(plain, tmp_path / "shared")
    with pytest.raises(ValueError, match=r"shared: differs from .*plain \(.*next\.reward"):
        merged(tmp_path / "out", plain, shared)
    shutil.copytree(shared.root, tmp_path / "other")
    there = merged(tmp_path / "out", shared, open_dataset(tmp_path / "other"))
    assert len(list(tmp_path.glob("out/videos/*/*/*.mp4"))) == 2
    for episode in range(8):
        assert (there.frames(episode) == shared.frames(episode % 4)).all()
        assert (there.actions(episode) == plain.actions(episode % 4)).all()


@pytest.mark.usefixtures("edited_datasets")
def test_episodes_that_are_left_out_take_nothing_from_others(tmp_path: Path) -> None:
    plain = write_synthetic_dataset(tmp_path / "plain", 4, frames=8, size=32, actions=True)
    shared = with_shared_files(plain, tmp_path / "shared")
    damaged = shutil.copytree(shared.root, tmp_path / "damaged")
    rows = pq.read_table(damaged / "data/chunk-000/file-000.parquet")
    # The last row of episode 1 is gone.
    pq.write_table(rows[:-1], damaged / "data/chunk-000/file-000.parquet")
    run(MergeConfig((f"lerobot:{damaged},skip_bad=true", str(shared.root)), tmp_path / "out"))
    there, sources = open_dataset(tmp_path / "out"), [0, 2, 3, 0, 1, 2, 3]
    assert len({e.instruction for e in plain}) > 1
    assert [(e.instruction, e.source) for e in there] == [(plain[n].instruction, plain[n].source) for n in sources]
    for new, old in enumerate(sources):
        assert (there.actions(new) == plain.actions(old)).all()
        assert (there.frames(new) == shared.frames(old)).all()
    means = [np.mean(plain.actions(number), axis=0) for number in sources]
    merged_mean = read_json(there.root / STATS)["action"]["mean"]
    np.testing.assert_allclose(merged_mean, np.mean(means, axis=0), rtol=1e-4, atol=1e-5)


def test_labels_are_carried_where_all_have_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    datasets = [write_synthetic_dataset(tmp_path / str(seed), 3, frames=8, size=32, seed=seed) for seed in range(2)]
    for dataset in datasets:
        write_labels(dataset.root / "labels" / "lam", dataset)
    write_labels(datasets[0].root / "labels" / "other", datasets[0])
    there = merged(tmp_path / "out", *datasets)
    assert "labels other: not merged" in capsys.readouterr().err
    found = Labels.open(there.root / "labels" / "lam", dataset_fingerprint=there.fingerprint)
    for episode in range(6):
        frames_T, codes_TL = Labels.open(datasets[episode // 3].root / "labels" / "lam").codes(episode % 3)
        assert (found.codes(episode)[0] == frames_T).all() and (found.codes(episode)[1] == codes_TL).all()
    assert found.manifest.num_episodes == 6
    shutil.rmtree(there.root / "labels")
    merged(tmp_path / "out", *datasets, resume=True)
    assert (there.root / "labels" / "lam" / "manifest.json").exists()


def test_what_does_not_fit(tmp_path: Path) -> None:
    first = write(tmp_path / "a", range(1))
    for name, other in {
        "fps": write(tmp_path / "fps", range(1, 2), fps=5),
        "front.*side|side.*front": write(tmp_path / "camera", range(1, 2), camera="side"),
    }.items():
        with pytest.raises(ValueError, match=rf"differs from .*a \(.*({name})"):
            merged(tmp_path / "out", first, other)
    with pytest.raises(ValueError, match="is one dataset"):
        merged(tmp_path / "out", first)
    with pytest.raises(ValueError, match="no dataset is named; name two or more"):
        merged(tmp_path / "out")
    with pytest.raises(ValueError, match="is named twice"):
        merged(tmp_path / "out", first, first)
    second = write(tmp_path / "b", range(1, 2))
    with pytest.raises(ValueError, match="is or lies inside"):
        merged(second.root / "out", first, second)
    assert not (tmp_path / "out").exists()


def edited(source: LeRobotDataset, root: Path, name: str, edit: Callable[[pa.Table], pa.Table]) -> LeRobotDataset:
    """A copy of a dataset whose first file of this kind is edited."""
    shutil.copytree(source.root, root)
    (root / SUMS).unlink()
    path = next(root.glob(f"{name}/*/*.parquet"))
    pq.write_table(edit(pq.read_table(path)), path)
    return LeRobotDataset(root)


def with_column(name: str, values: list[Any], kind: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    """Replaces or adds a column; values: one of each row, or the last as often as it takes."""

    def edit(table: pa.Table) -> pa.Table:
        column = pa.array((values + values[-1:] * len(table))[: len(table)], kind)
        there = name in table.column_names
        return (
            table.set_column(table.column_names.index(name), name, column)
            if there
            else table.append_column(name, column)
        )

    return edit


@pytest.mark.parametrize(
    ("folder", "edit", "message"),
    [
        ("data", lambda table: table.drop_columns(["index"]), r"file-000.parquet: lacks the columns index"),
        ("data", lambda table: table.drop_columns(["action"]), r"file-000.parquet: lacks the columns action"),
        ("data", with_column("action", [["x", "y"]]), r"action is stored as .*string.*, in .* as .*float"),
        (
            "data",
            with_column("action", [None, [0.0, 1.0]], pa.list_(pa.float32(), 2)),
            "action of episode 0 is empty at frame 0",
        ),
        ("meta/episodes", with_column("length", ["x"]), r"episodes.*length"),
        (
            "meta/episodes",
            with_column("note", ["text"]),
            r"file-000.parquet: cannot be read \(.*note has incompatible types",
        ),
    ],
)
def test_damaged_tables_are_named(folder: str, edit: Any, message: str, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", range(2))
    noted = edited(whole, tmp_path / "noted", "meta/episodes", with_column("note", [1]))
    with pytest.raises(UserError, match=message):
        merged(tmp_path / "out", noted, edited(whole, tmp_path / "damaged", folder, edit))
    assert not (tmp_path / "out" / INFO).exists()


def test_a_file_of_episodes_may_lack_a_column(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", range(3))
    split = edited(whole, tmp_path / "split", "meta/episodes", lambda table: table[:1].drop_columns(["source"]))
    path = next((whole.root / "meta/episodes").glob("*/*.parquet"))
    pq.write_table(pq.read_table(path)[1:], split.root / "meta/episodes/chunk-000/file-001.parquet")
    there = merged(tmp_path / "out", whole, LeRobotDataset(split.root))
    assert [e.source for e in there] == ["clip 0", "clip 1", "clip 2", "", "clip 1", "clip 2"]


def test_files_of_episodes_may_be_in_any_order(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", range(3))
    expected = files(merged(tmp_path / "expected", whole, write(tmp_path / "more", range(3, 5))).root)
    split = edited(whole, tmp_path / "split", "meta/episodes", lambda table: table.take([1]))
    path = next((whole.root / "meta/episodes").glob("*/*.parquet"))
    pq.write_table(pq.read_table(path).take([2, 0]), split.root / "meta/episodes/chunk-000/file-001.parquet")
    found = files(merged(tmp_path / "out", LeRobotDataset(split.root), open_dataset(tmp_path / "more")).root)
    noted = {"meta/lapa.json", SUMS}
    assert found.keys() == expected.keys()
    assert [name for name in found if name not in noted and found[name] != expected[name]] == []


def test_an_unfinished_merge_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = write(tmp_path / "a", range(2)), write(tmp_path / "b", range(2, 5))
    expected = files(merged(tmp_path / "expected", first, second).root)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("lapa.data.merge.write_json", full)
        with pytest.raises(OSError, match="no space"):
            merged(tmp_path / "out", first, second)
    assert (tmp_path / "out" / JOURNAL).exists() and not (tmp_path / "out" / INFO).exists()
    with pytest.raises(ValueError, match="not empty"):
        merged(tmp_path / "out", first, second)
    with pytest.raises(ValueError, match="begun with other settings"):
        merged(tmp_path / "out", second, first, resume=True)
    assert files(merged(tmp_path / "out", first, second, resume=True).root) == expected
    with pytest.raises(ValueError, match="merged"):
        merged(tmp_path / "out", second, first, resume=True)
