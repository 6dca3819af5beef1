"""The same videos with other actions or none: nothing that is kept changes, nothing is lost without a message."""

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapa.data import replace_actions as rewrite
from lapa.data.config import HideActionsConfig
from lapa.data.dataset import ActionSpace, Dataset
from lapa.data.metadata import EXTRA, INFO, JOURNAL, STATS
from lapa.data.replace_actions import claim_rewrite, rewrite_actions
from lapa.data.spec import open_dataset
from lapa.data.video import encode_clip
from lapa.errors import UserError
from lapa.files import read_json
from lapa.sources.synthetic import write_synthetic_dataset

pytestmark = pytest.mark.usefixtures("edited_datasets")

SPACE = ActionSpace.named(["x", "grip"], ["grip"], "delta")


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(tmp_path_factory.mktemp("rewrite") / "robot", 4, frames=8, size=32, actions=True)


def hide(dataset: Dataset, out: Path, **changes) -> Dataset:
    rewrite.run(HideActionsConfig(data=dataset.root, out=out, **changes))
    return open_dataset(out)


def new_actions(dataset: Dataset, episode: int) -> np.ndarray:
    steps_T = np.arange(dataset.lengths[episode], dtype=np.float32)
    return np.stack([episode + steps_T / 10, steps_T % 2], axis=1)


def rewritten(dataset: Dataset, out: Path, without: tuple[int, ...] = (), keep_states: bool = True) -> Dataset:
    claim_rewrite(out, [dataset], {"made_by": "a test"}, overwrite=False, resume=False)
    return rewrite_actions(
        dataset,
        out,
        actions=lambda episode: None if episode in without else new_actions(dataset, episode),
        action_space=SPACE,
        keep_states=keep_states,
        note={"made_by": "a test"},
    )


def with_shared_files(source: Dataset, root: Path) -> Dataset:
    """As LeRobot writes: one mp4 with all episodes, two chunks of data and of metadata, a feature of its own."""
    shutil.copytree(source.root, root)
    shutil.rmtree(root / "videos")
    key = "observation.images.front"
    frames = np.concatenate([source.frames(episode) for episode in range(4)])
    encode_clip(root / f"videos/{key}/chunk-000/file-000.mp4", frames, source.fps, keyframe_interval=8)
    rows = pq.read_table(root / "data/chunk-000/file-000.parquet")
    rows = rows.append_column("next.reward", pa.array(np.ones(len(rows), np.float32)))
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for number, row in enumerate(episodes):
        begins, ends = number * 8 / source.fps, (number + 1) * 8 / source.fps
        row |= {f"videos/{key}/from_timestamp": begins, f"videos/{key}/to_timestamp": ends}
        row |= {f"videos/{key}/file_index": 0}
        row |= {"data/chunk_index": number // 2, "meta/episodes/chunk_index": number // 2}
    for chunk in (0, 1):
        for folder, table in (
            ("data", rows[16 * chunk : 16 * chunk + 16]),
            ("meta/episodes", pa.Table.from_pylist(episodes[2 * chunk : 2 * chunk + 2])),
        ):
            path = root / folder / f"chunk-00{chunk}" / "file-000.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
    info = read_json(root / INFO)
    info["features"]["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    rewrite.write_json(root / INFO, info)
    return open_dataset(root)


def same_images(before: Dataset, old: int, after: Dataset, new: int) -> bool:
    return np.array_equal(before.frames(old), after.frames(new))


def test_hidden_actions_leave_images_and_instructions_as_they_are(robot: Dataset, tmp_path: Path) -> None:
    hidden = hide(robot, tmp_path / "hidden")
    assert hidden.action_dim is None and hidden.state_dim is None and hidden.action_space is None
    assert hidden.episodes == robot.episodes and hidden.cameras == robot.cameras and hidden.fps == robot.fps
    assert all(same_images(robot, episode, hidden, episode) for episode in range(4))
    with pytest.raises(ValueError, match="has no actions"):
        hidden.actions(0)
    assert hidden.extra["made_by"] == "lapa data hide-actions"
    assert hidden.extra["source_fingerprint"] == robot.fingerprint != hidden.fingerprint


def test_no_hidden_number_is_left_in_any_file(robot: Dataset, tmp_path: Path) -> None:
    root = hide(robot, tmp_path / "hidden").root
    assert {"action", "observation.state"} & (
        read_json(root / STATS).keys() | read_json(root / INFO)["features"]
    ) == set()
    for path in root.rglob("*.parquet"):
        names = pq.read_schema(path).names
        assert not [name for name in names if "action" in name or "state" in name], path
    assert not (root / JOURNAL).exists()


def test_hiding_nothing_gives_the_tables_that_the_writer_gave(tmp_path: Path) -> None:
    """The slow twin of a rewritten dataset is one that was written so."""
    videos = write_synthetic_dataset(tmp_path / "videos", 3, frames=6, size=32)
    again = hide(videos, tmp_path / "again")
    assert again.fingerprint == videos.fingerprint
    data = "data/chunk-000/file-000.parquet"
    assert pq.read_table(again.root / data).equals(pq.read_table(videos.root / data))
    before, after = read_json(videos.root / STATS), read_json(again.root / STATS)
    assert before.keys() == after.keys()
    for name, values in before.items():
        for key, value in values.items():
            np.testing.assert_allclose(after[name][key], value, rtol=1e-12)


def test_new_actions_are_read_back_and_states_stay(robot: Dataset, tmp_path: Path) -> None:
    after = rewritten(robot, tmp_path / "new")
    for episode in range(4):
        np.testing.assert_array_equal(after.actions(episode), new_actions(robot, episode))
        np.testing.assert_array_equal(after.states(episode), robot.states(episode))
    assert after.action_space == SPACE
    stats = read_json(after.root / STATS)["action"]
    every = np.concatenate([new_actions(robot, episode) for episode in range(4)])
    np.testing.assert_allclose(stats["mean"], every.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["std"], every.std(0), rtol=1e-6)


def test_episodes_left_out_are_counted_and_the_rest_renumbered(
    robot: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = with_shared_files(robot, tmp_path / "shared")
    after = rewritten(source, tmp_path / "new", without=(0, 1, 2), keep_states=False)
    message = capsys.readouterr().err
    assert "3 of 4 episodes left out" in message and "left out: observation.state, next.reward" in message
    assert [episode.instruction for episode in after.episodes] == [source.episodes[3].instruction]
    assert same_images(source, 3, after, 0)
    np.testing.assert_array_equal(after.actions(0), new_actions(source, 3))
    (path,) = (after.root / "data").rglob("*.parquet")
    rows = pq.read_table(path)
    assert rows["index"].to_pylist() == list(range(8)) and set(rows["episode_index"].to_pylist()) == {0}
    info = read_json(after.root / INFO)
    assert (info["total_episodes"], info["total_frames"], info["splits"]) == (1, 8, {"train": "0:1"})
    assert read_json(after.root / STATS)["index"]["max"] == [7]


def test_episodes_that_drift_are_found_without_those_left_out(robot: Dataset, tmp_path: Path) -> None:
    source = with_shared_files(robot, tmp_path / "shared")
    for path in (source.root / "meta/episodes").rglob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row |= {name: row[name] + 0.04 * row["episode_index"] for name in row if name.endswith("from_timestamp")}
        pq.write_table(pa.Table.from_pylist(rows), path)
    after = rewritten(open_dataset(source.root), tmp_path / "new", without=(0, 2))
    for new, old in enumerate((1, 3)):
        assert same_images(source, old, after, new)


def test_files_that_hold_several_episodes_are_kept_in_their_layout(robot: Dataset, tmp_path: Path) -> None:
    source = with_shared_files(robot, tmp_path / "shared")
    after = rewritten(source, tmp_path / "new")
    assert all(same_images(source, episode, after, episode) for episode in range(4))
    for folder in ("data", "meta/episodes", "videos"):
        names = [sorted(str(p.relative_to(d.root)) for p in (d.root / folder).rglob("*.*")) for d in (source, after)]
        assert names[0] == names[1]
    np.testing.assert_array_equal(after.actions(3), new_actions(source, 3))


def test_videos_are_linked_or_copied(robot: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = hide(robot, tmp_path / "linked")
    assert linked.video_path(0).samefile(robot.video_path(0))

    def refuse(*_) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    copied = hide(robot, tmp_path / "copied")
    assert not copied.video_path(0).samefile(robot.video_path(0))
    assert copied.video_path(0).read_bytes() == robot.video_path(0).read_bytes()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize(
    "template",
    [
        "../.bashrc",
        "{place}/../../../.bashrc",
        "/{place}.mp4",
        "a\\{place}.mp4",
        "a\n{place}.mp4",
        "{place:02000000000d}",
        "{place:013d}",
        "{place!r}",
        "{place.real}",
        "{place.__class__.__init__}",
        "{place[0]}",
        "{place:{place}}",
        "{place:>9}",
        "{}{place}",
        "{other}/{place}",
        "{place",
        "meta/info.json",
        "./meta//{place}.parquet",
        "one/{place}",
        "",
        7,
        ["data"],
        {"data": 1},
    ],
)
def test_a_template_names_files_of_the_dataset_alone(
    robot: Dataset, tmp_path: Path, key: str, template: object
) -> None:
    """Nothing is written outside --out, and nothing is removed there: neither a sibling nor a file above it."""
    root, outside = tmp_path / "work" / "d", tmp_path / "work"
    shutil.copytree(robot.root, root)
    (outside / ".bashrc").write_text("mine")
    template = template.replace("place", "file_index") if isinstance(template, str) else template
    other = {"data_path": "video_path", "video_path": "data_path"}[key]
    info = read_json(root / INFO)
    info |= {key: template} | ({other: template} if template == "one/{file_index}" else {})
    (root / INFO).write_text(json.dumps(info))
    before = tree(outside)
    with pytest.raises(UserError, match=r"info\.json: .*(data_path|video_path)") as error:
        hide(Namespace(root=root), outside / "x" / "out")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 800
    assert tree(outside) == before


@pytest.mark.parametrize("name", ["observation.images./../../../../x", "../../x", "/x", "a\0b", "a\x1b[2Jb", "a/.."])
def test_a_camera_names_no_place_outside(robot: Dataset, tmp_path: Path, name: str) -> None:
    shutil.copytree(robot.root, tmp_path / "d")
    info = read_json(robot.root / INFO)
    info["features"][name] = info["features"]["observation.images.front"]
    (tmp_path / "d" / INFO).write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"info\.json: the name of a camera: .* names no file inside"):
        open_dataset(tmp_path / "d")


def test_links_in_the_output_lead_nowhere(robot: Dataset, tmp_path: Path) -> None:
    """--resume takes a folder as it is, with the links that somebody put there."""
    note = {"made_by": "lapa data hide-actions", "source_fingerprint": robot.fingerprint}
    for link in ("meta", "data", "videos", "videos/observation.images.front", "meta/episodes", "meta/info.json"):
        out, outside = tmp_path / link / "out", tmp_path / link / "outside"
        outside.mkdir(parents=True)
        (outside / "mine").write_text("mine")
        (out / link).parent.mkdir(parents=True, exist_ok=True)
        (out / link).symlink_to(outside / "new.json" if link.endswith("json") else outside)
        if link != "meta":
            (out / "meta").mkdir(exist_ok=True)
            (out / JOURNAL).write_text(json.dumps(note) + "\n")
        with pytest.raises(UserError, match="a link leads out of"):
            hide(robot, out, resume=True)
        assert tree(outside) == {"mine": b"mine"}


def test_a_cache_of_the_hub_is_read_and_rewritten(robot: Dataset, tmp_path: Path) -> None:
    """There every file is a link into ../../blobs; a link to what is no video is not taken along."""
    snapshot, blobs = tmp_path / "datasets--a--b/snapshots/0123", tmp_path / "datasets--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in robot.root.rglob("*") if path.is_file())):
        shutil.copyfile(path, blobs / f"{number:064d}")
        link = snapshot / path.relative_to(robot.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{number:064d}", link.parent))
    cached = open_dataset(snapshot)
    hidden = hide(cached, tmp_path / "hidden")
    assert all(same_images(robot, episode, hidden, episode) for episode in range(4))
    assert not any(path.is_symlink() for path in hidden.root.rglob("*"))
    assert not list(hidden.root.rglob(".*"))
    (tmp_path / "secret").write_text("mine")
    video = cached.video_path(2)
    video.unlink()
    video.symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=str(video)):
        hide(cached, tmp_path / "again")
    assert b"mine" not in tree(tmp_path / "again").values()


def test_videos_of_a_linked_or_relative_folder_are_not_looked_into(
    robot: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(robot.root, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lapa.data.replace_actions.probe", lambda path: pytest.fail(f"looks into {path}"))
    assert hide(open_dataset("link"), tmp_path / "hidden").video_path(0).samefile(robot.video_path(0))


def test_a_rewrite_leaves_no_partial_file_where_the_video_is_there_already(robot: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "hidden"
    target = out / robot.video_path(1).relative_to(robot.root)
    note = {"made_by": "lapa data hide-actions", "source_fingerprint": robot.fingerprint}
    target.parent.mkdir(parents=True)
    (out / "meta").mkdir()
    (out / JOURNAL).write_text(json.dumps(note) + "\n")
    os.link(robot.video_path(1), target)
    assert hide(robot, out, resume=True).video_path(1).samefile(robot.video_path(1))
    assert not list(out.rglob(".*"))


def test_an_unfinished_rewrite_is_begun_again(robot: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "hidden"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rewrite, "write_marker", die)
    with pytest.raises(KeyboardInterrupt):
        hide(robot, out)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unfinished dataset"):
        open_dataset(out)
    other = write_synthetic_dataset(tmp_path / "other", 2, frames=6, size=32)
    with pytest.raises(ValueError, match="begun with other settings"):
        hide(other, out, resume=True)
    assert hide(robot, out, resume=True).episodes == robot.episodes


def test_a_finished_rewrite_is_accepted_as_it_is(robot: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "hidden"
    fingerprint = hide(robot, out).fingerprint
    assert hide(robot, out, resume=True).fingerprint == fingerprint
    assert "already complete" in capsys.readouterr().err
    other = write_synthetic_dataset(tmp_path / "other", 2, frames=6, size=32)
    with pytest.raises(ValueError, match=f"{EXTRA}: begun with other settings"):
        hide(other, out, resume=True)
    with pytest.raises(ValueError, match="already holds a finished result"):
        hide(robot, out)
    assert len(hide(other, out, overwrite=True).episodes) == 2


@pytest.mark.parametrize(
    ("where", "message"), [(".", "is or lies inside"), ("new", "is or lies inside"), ("..", "contains")]
)
def test_the_source_is_never_written_over(robot: Dataset, where: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hide(robot, robot.root / where, overwrite=True)
    assert (robot.root / INFO).exists() and not (robot.root / "new").exists()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((8, 3), np.float32), r"are \(8, 3\), expected \(8, 2\)"),
        (np.full((8, 2), np.nan, np.float32), "not finite at frame 0"),
        (None, "every one of its 4 episodes is left out"),
    ],
)
def test_actions_that_do_not_fit_are_refused(
    robot: Dataset, tmp_path: Path, actions: np.ndarray | None, message: str
) -> None:
    note = {"made_by": "a test"}
    claim_rewrite(tmp_path / "new", [robot], note, overwrite=False, resume=False)
    with pytest.raises(ValueError, match=message):
        rewrite_actions(
            robot, tmp_path / "new", actions=lambda _: actions, action_space=SPACE, keep_states=False, note=note
        )


def test_a_missing_video_is_named(robot: Dataset, tmp_path: Path) -> None:
    shutil.copytree(robot.root, tmp_path / "broken")
    broken = open_dataset(tmp_path / "broken")
    broken.video_path(2).unlink()
    with pytest.raises(ValueError, match=r"file-002\.mp4: no such file"):
        hide(broken, tmp_path / "hidden")
