"""Labels: complete, resumable after any kill, and refused where they do not belong."""

import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lapa import config as configs
from lapa.data.labels import EpisodeLabels, Labels, Manifest, shard_path, write_shard
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.data.video import encode_clip
from lapa.data.writer import DatasetWriter
from lapa.files import as_path, claim_output, read_json, write_json
from lapa.label.config import LabelConfig
from lapa.label.run import run
from lapa.latent.model import LatentActionModel, lam_fingerprint
from lapa.presets import LATENT
from lapa.sources.synthetic import write_synthetic_dataset

EPISODES, FRAMES, HORIZON = 6, 12, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("label") / "videos"
    write_synthetic_dataset(root, episodes=EPISODES, frames=FRAMES, size=32, fps=10)
    return root


@pytest.fixture(scope="module")
def lam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lam(tmp_path_factory.mktemp("label") / "lam", seed=0)


def save_lam(folder: Path, seed: int, **changes: object) -> Path:
    torch.manual_seed(seed)
    LatentActionModel(replace(LATENT["debug"].model, **changes)).save_pretrained(folder)
    return folder


def rows(labels: Path) -> list[tuple[int, int, tuple[int, ...]]]:
    found = []
    for path in sorted(labels.glob("episodes-*.parquet")):
        table = pq.read_table(path).to_pydict()
        found += [
            (e, f, tuple(c))
            for e, f, c in zip(table["episode_index"], table["frame_index"], table["codes"], strict=True)
        ]
    return found


def test_every_frame_with_a_second_frame_is_labelled_as_the_model_labels_it(
    data: Path, lam: Path, tmp_path: Path
) -> None:
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "labels", batch_size=4, shard_episodes=4, embeddings=True))
    labels = Labels.open(tmp_path / "labels", lam_fingerprint=lam_fingerprint(lam))
    assert [row[:2] for row in rows(tmp_path / "labels")] == [
        (episode, frame) for episode in range(EPISODES) for frame in range(FRAMES - HORIZON)
    ]
    model, dataset = LatentActionModel.from_pretrained(lam), open_dataset(data)
    frame_indices, codes_TL = labels.codes(5)
    for frame, codes_L in zip(frame_indices, codes_TL, strict=True):
        frames_THWC = dataset.frames(5, [frame, frame + HORIZON])
        literal = model.codes(torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)[None])[0]
        assert literal.tolist() == codes_L.tolist()
    assert labels.embeddings(5).shape == (FRAMES - HORIZON, 4 * model.config.quant_dim)
    manifest = labels.manifest
    assert (manifest.num_rows, manifest.num_episodes, manifest.horizon_frames) == (EPISODES * 9, EPISODES, HORIZON)
    assert np.allclose(np.sum(manifest.code_usage, axis=1), 1)


def test_labels_of_another_model_or_dataset_are_refused(data: Path, lam: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    run(LabelConfig(lam=lam, data=data, out=out))
    with pytest.raises(ValueError, match="made by the latent action model"):
        Labels.open(out, lam_fingerprint="0" * 16)
    with pytest.raises(ValueError, match="labels another dataset"):
        Labels.open(out, dataset_fingerprint="0" * 16)
    other = save_lam(tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=r"begun with other settings \(lam_fingerprint was .*--overwrite to start anew"
    ):
        run(LabelConfig(lam=other, data=data, out=out, resume=True))
    with pytest.raises(ValueError, match="already holds a finished result"):
        run(LabelConfig(lam=lam, data=data, out=out))


def test_an_unfinished_folder_does_not_read_as_whole(data: Path, lam: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    run(LabelConfig(lam=lam, data=data, out=out, shard_episodes=2))
    (out / "manifest.json").rename(out / "run.json")
    with pytest.raises(ValueError, match="unfinished or not a labels folder"):
        Labels.open(out)


def test_a_lost_shard_is_noticed(data: Path, lam: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    run(LabelConfig(lam=lam, data=data, out=out, shard_episodes=2))
    next(out.glob("episodes-*.parquet")).unlink()
    with pytest.raises(ValueError, match=r"has 36 rows, 54 in manifest\.json"):
        Labels.open(out)


def test_short_episodes_are_skipped_and_counted(lam: Path, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "mixed", fps=10, cameras={"front": (32, 32)})
    for length in (HORIZON, FRAMES, 1):
        writer.add_episode({"front": np.zeros((length, 32, 32, 3), np.uint8)}, "stay")
    writer.finish()
    run(LabelConfig(lam=lam, data=tmp_path / "mixed", out=tmp_path / "labels"))
    manifest = Labels.open(tmp_path / "labels").manifest
    assert (manifest.num_rows, manifest.num_episodes, manifest.skipped_episodes) == (FRAMES - HORIZON, 1, 2)


def test_long_episodes_are_read_in_windows(
    data: Path, lam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "whole"))
    monkeypatch.setattr("lapa.data.episode_decoders.WINDOW", 4)
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "windows"))
    assert rows(tmp_path / "windows") == rows(tmp_path / "whole")


def test_all_episodes_too_short_is_an_error(data: Path, tmp_path: Path) -> None:
    long_horizon = save_lam(tmp_path / "lam", seed=0, horizon_seconds=1.2)
    with pytest.raises(ValueError, match=r"all 6 episodes are too short for the model's horizon of 1\.2 s \(12 frames"):
        run(LabelConfig(lam=long_horizon, data=data))


KILLED = """
import sys, time
from pathlib import Path
from lapa.label import run as label, shards
write = shards.write_shard
def slow(path, episodes, notes):
    write(path, episodes, notes)
    print("shard", flush=True)
    time.sleep(60)
shards.write_shard = slow
label.run(label.LabelConfig(lam=Path(sys.argv[1]), data=Path(sys.argv[2]), out=Path(sys.argv[3]), shard_episodes=1))
"""


def test_killed_and_restarted_no_row_is_lost_or_doubled(data: Path, lam: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(LabelConfig(lam=lam, data=data, out=whole, shard_episodes=1))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(lam), str(data), str(killed)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "shard\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list(killed.glob("episodes-*.parquet"))) == 1
    with pytest.raises(ValueError, match="--resume to go on with it"):
        run(LabelConfig(lam=lam, data=data, out=killed, shard_episodes=1))
    run(LabelConfig(lam=lam, data=data, out=killed, shard_episodes=1, resume=True))
    assert rows(killed) == rows(whole)
    assert (killed / "manifest.json").read_text() == (whole / "manifest.json").read_text()
    run(LabelConfig(lam=lam, data=data, out=killed, shard_episodes=1, resume=True))


def test_a_full_disk_leaves_no_half_shard(
    data: Path, lam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(table: object, path: Path, **options: object) -> None:
        path.write_bytes(b"PAR1 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lapa.data.labels.pq.write_table", full)
    with pytest.raises(OSError, match="No space left"):
        run(LabelConfig(lam=lam, data=data, out=tmp_path / "labels"))
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["run.json"]
    monkeypatch.undo()
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "labels", resume=True))
    assert Labels.open(tmp_path / "labels").manifest.num_rows == EPISODES * (FRAMES - HORIZON)


def test_static_pairs_are_left_out_and_counted(lam: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The first episode stands still in its first half, the second all the time."""
    moving = np.random.default_rng(0).integers(0, 256, (FRAMES, 32, 32, 3), dtype=np.uint8)
    half = moving.copy()
    half[:6] = moving[0]
    writer = DatasetWriter(tmp_path / "data", fps=10, cameras={"front": (32, 32)})
    for frames_THWC in (half, np.repeat(moving[:1], FRAMES, axis=0), moving):
        writer.add_episode({"front": frames_THWC}, "")
    writer.finish()
    run(LabelConfig(lam=lam, data=tmp_path / "data", out=tmp_path / "all", shard_episodes=2))
    run(LabelConfig(lam=lam, data=tmp_path / "data", out=tmp_path / "moving", shard_episodes=2, min_motion=0.05))
    wanted = [(0, frame) for frame in range(3, 9)] + [(2, frame) for frame in range(9)]
    assert rows(tmp_path / "moving") == [row for row in rows(tmp_path / "all") if row[:2] in wanted]
    manifest = Labels.open(tmp_path / "moving").manifest
    assert (manifest.min_motion, manifest.static_pairs, manifest.num_rows) == (0.05, 3 + 9, 15)
    assert (manifest.num_episodes, manifest.skipped_episodes) == (2, 0)
    assert "12 of 27 pairs left out: less than 0.05 moves in them" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"begun with other settings \(min_motion was 0\.05, is 0\.0\)"):
        run(LabelConfig(lam=lam, data=tmp_path / "data", out=tmp_path / "moving", resume=True))
    with pytest.raises(ValueError, match=r"no pair is left to label: 27 of 27 are static below --min-motion 2"):
        run(LabelConfig(lam=lam, data=tmp_path / "data", out=tmp_path / "none", min_motion=2.0))


def test_a_policy_takes_frames_without_labels(lam: Path, tmp_path: Path, data: Path) -> None:
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "labels", min_motion=0.02))
    labels, dataset = Labels.open(tmp_path / "labels"), open_dataset(data)
    assert 0 < labels.manifest.static_pairs < labels.manifest.num_rows
    steps = EpisodeSteps([dataset], 32, labels=[labels], split="all")
    assert len(steps) == labels.manifest.num_rows and all(
        item["has_codes"] for item in map(steps.__getitem__, range(9))
    )


@pytest.mark.parametrize("decoders", [0, 1])
def test_a_damaged_video_stops_or_is_left_out(
    data: Path, lam: Path, tmp_path: Path, decoders: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The fourth video is cut off in the middle, so that its first frames can be decoded."""
    damaged = shutil.copytree(data, tmp_path / "damaged")
    video = open_dataset(damaged).video_path(3)  # type: ignore[attr-defined]
    writer = DatasetWriter(tmp_path / "short", fps=10, cameras={"video": (32, 32)})
    writer.add_episode({"video": open_dataset(data).frames(3, range(8))}, "")
    shutil.copy(writer.finish().video_path(0), video)
    config = LabelConfig(lam=lam, data=damaged, out=tmp_path / "out", shard_episodes=1, batch_size=4, decoders=decoders)
    with pytest.raises(ValueError, match=rf"{video.name}.*has no frame 8.*--skip-bad .*--resume"):
        run(config)
    assert len(list((tmp_path / "out").glob("episodes-*.parquet"))) == 3
    run(replace(config, resume=True, skip_bad=True, decoders=0))
    whole = tmp_path / "whole"
    run(replace(config, data=data, out=whole, decoders=0))
    assert rows(tmp_path / "out") == [row for row in rows(whole) if row[0] != 3]
    manifest = Labels.open(tmp_path / "out").manifest
    assert (manifest.bad_episodes, manifest.num_rows, manifest.num_episodes) == ((3,), 45, 5)
    assert "1 episodes left out, since they cannot be read: 3" in capfd.readouterr().err


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_damaged_shards_are_made_again(
    data: Path, lam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Shards that a dying disk has emptied, cut short or bent, or that lack rows, among whole ones."""
    config = LabelConfig(lam=lam, data=data, out=tmp_path / "out", shard_episodes=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lapa.label.run.make_manifest", interrupted)
        run(config)
    paths = sorted((tmp_path / "out").glob("episodes-*.parquet"))
    contents = [path.read_bytes() for path in paths]
    bent = bytearray(contents[2])
    bent[40] ^= 4
    for path, content in zip(paths, (b"", contents[1][:-200], bytes(bent)), strict=False):
        path.write_bytes(content)
    write_shard(paths[3], {3: EpisodeLabels(np.arange(4), np.zeros((4, 4), np.int64))})
    run(replace(config, resume=True))
    assert [path.read_bytes() for path in paths] == contents
    printed = capfd.readouterr().err
    assert all(path.name in printed for path in paths[:4]) and "2 of 6 shards are there already" in printed
    assert "accounts for 4 pairs where its episodes have 9" in printed
    assert Labels.open(tmp_path / "out").manifest.num_rows == EPISODES * (FRAMES - HORIZON)
    paths[0].write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{paths[0].name}: damaged"):
        Labels.open(tmp_path / "out")


def test_labels_may_lie_on_a_store(data: Path, lam: Path, tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/labels"
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "here", shard_episodes=4, embeddings=True))
    run(LabelConfig(lam=lam, data=data, out=url, shard_episodes=4, embeddings=True))
    here, there = Labels.open(tmp_path / "here"), Labels.open(url)
    assert here.manifest == there.manifest
    for episode in range(EPISODES):
        assert np.array_equal(here.codes(episode)[1], there.codes(episode)[1])
        assert np.array_equal(here.embeddings(episode), there.embeddings(episode))
    assert sorted(path.name for path in as_path(url).iterdir()) == sorted(
        path.name for path in (tmp_path / "here").iterdir()
    )
    with pytest.raises(ValueError, match="already holds a finished result"):
        run(LabelConfig(lam=lam, data=data, out=url, shard_episodes=4))
    run(LabelConfig(lam=lam, data=data, out=url, shard_episodes=4, embeddings=True, resume=True))
    run(LabelConfig(lam=lam, data=data, out=url, overwrite=True))
    assert len(list(as_path(url).glob("episodes-*.parquet"))) == 1


class Remembering(MemoryFileSystem):
    """A store whose client remembers listings, as those of s3 and gs do; others write to it without its knowledge."""

    protocol = "remembering"
    root_marker = ""

    def ls(self, path: str, detail: bool = True, **_: object) -> list[Any]:
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True)
        return [entry if detail else entry["name"] for entry in self.dircache[path]]

    def find(self, path: str, *given: Any, **more: Any) -> Any:
        self.ls(path)
        return super().find(path, *given, **more)

    def info(self, path: str, **_: object) -> dict[str, Any]:
        path = self._strip_protocol(path)
        parent = self._parent(path)
        if parent in self.dircache and all(entry["name"] != path for entry in self.dircache[parent]):
            raise FileNotFoundError(path)
        return super().info(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()

    def put_file(self, lpath: str, rpath: str, **_: object) -> None:
        """Shards come from other machines."""
        MemoryFileSystem().put_file(lpath, rpath)
        if not rpath.endswith(".parquet"):
            self.invalidate_cache()

    def _open(self, path: str, mode: str = "rb", **_: object) -> Any:
        self.info(path)
        return super()._open(path, mode)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("remembering://", "memory://"))


def test_what_other_machines_have_written_to_a_store_is_seen(data: Path, lam: Path) -> None:
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    url = f"remembering://{uuid.uuid4().hex}/labels"
    run(LabelConfig(lam=lam, data=data, out=url, shard_episodes=4))
    assert Labels.open(url).manifest.num_rows == EPISODES * (FRAMES - HORIZON)


def test_outputs_on_a_store_are_claimed_as_on_disk() -> None:
    root = as_path(f"memory://{uuid.uuid4().hex}")
    out = root / "out"
    claim_output(out, complete=False, inputs=[root / "input", Path("/out")])
    claim_output(out, complete=False)
    (out / "file").write_text("x")
    for complete, mend in ((False, "--resume to go on with it"), (True, "--overwrite to replace it")):
        with pytest.raises(ValueError, match=mend):
            claim_output(out, complete=complete)
    claim_output(out, complete=False, resume=True)
    assert (out / "file").exists()
    with pytest.raises(ValueError, match="is a file"):
        claim_output(out / "file", complete=False)
    for inside in (out, out / "file"):
        with pytest.raises(ValueError, match="is or contains"):
            claim_output(out, complete=False, overwrite=True, inputs=[inside])
    claim_output(out, complete=False, overwrite=True, inputs=[root])
    assert not (out / "file").exists()


def test_a_dataset_in_place_needs_an_out(data: Path, lam: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for episode in range(2):
        encode_clip(folder / f"{episode}.mp4", open_dataset(data).frames(episode), 10)
    in_place = f"videos:{folder},caption=a square"
    with pytest.raises(
        ValueError, match=r"is read in place, and nothing is written into .*videos; give a folder .* with --out"
    ):
        run(LabelConfig(lam=lam, data=in_place))
    run(LabelConfig(lam=lam, data=in_place, out=tmp_path / "labels"))
    labels = Labels.open(tmp_path / "labels", dataset_fingerprint=open_dataset(in_place).fingerprint)
    assert labels.manifest.num_rows == 2 * (FRAMES - HORIZON)


def test_a_dataset_may_have_its_own_horizon(data: Path, lam: Path, tmp_path: Path) -> None:
    run(LabelConfig(lam=lam, data=f"{data},horizon=0.5", out=tmp_path / "given"))
    # As its training wrote it down, for this dataset.
    trained = shutil.copytree(lam, tmp_path / "trained")
    config = read_json(trained / "config.json")
    known = {open_dataset(data).fingerprint: {"name": "videos", "horizon_seconds": 0.5}}
    write_json(trained / "config.json", {**config, "datasets": known})
    run(LabelConfig(lam=trained, data=data, out=tmp_path / "trained_on"))
    given, trained_on = (Labels.open(tmp_path / name).manifest for name in ("given", "trained_on"))
    assert given == trained_on and (given.horizon_seconds, given.horizon_frames) == (0.5, 5)
    assert given.num_rows == EPISODES * (FRAMES - 5)
    with pytest.raises(ValueError, match=r"begun with other settings \(horizon_seconds was 0\.5, is 0\.3"):
        run(LabelConfig(lam=lam, data=data, out=tmp_path / "given", resume=True))


def test_many_episodes_need_little_memory(tmp_path: Path) -> None:
    """100,000 episodes of 40 labels would need a hundred times of what 1,000 do."""
    rng, episodes = np.random.default_rng(0), {}
    for episode in range(1000):
        episodes[episode] = EpisodeLabels(np.arange(40), rng.integers(0, 8, (40, 4)))
    write_shard(shard_path(tmp_path, 0, 999), episodes)
    usage = [[1.0] * 8] * 4
    manifest = Manifest("a", "b", "front", 0.3, 3, 4, 8, 40_000, 1000, 0, usage)
    write_json(tmp_path / "manifest.json", configs.to_dict(manifest))
    tracemalloc.start()
    labels = Labels.open(tmp_path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(labels.codes(999)[1], episodes[999].codes_TL) and not len(labels.codes(1000)[0])
    # 16 bytes a label: 64 MB for 100,000 episodes.
    assert kept < 16 * 40_000 + 200_000


def test_labels_of_more_than_a_million_episodes_are_in_order(tmp_path: Path) -> None:
    """As text, the number of episode 1,000,000 comes before that of 999,998."""
    for first in (999_998, 1_000_000):
        made = {
            episode: EpisodeLabels(np.arange(2), np.full((2, 1), episode % 7), np.full((2, 3), episode))
            for episode in (first, first + 1)
        }
        write_shard(shard_path(tmp_path, first, first + 1), made)
    manifest = Manifest("a", "b", "front", 0.3, 3, 1, 8, 8, 4, 0, [[1.0] * 8], embeddings=True)
    write_json(tmp_path / "manifest.json", configs.to_dict(manifest))
    labels = Labels.open(tmp_path)
    for episode in range(999_998, 1_000_002):
        assert labels.codes(episode)[1].ravel().tolist() == [episode % 7] * 2
        assert (labels.embeddings(episode) == episode).all()


def test_nonsense_is_refused(data: Path, lam: Path, tmp_path: Path) -> None:
    for name, value in (("batch_size", 0), ("shard_episodes", 0), ("decoders", -1), ("min_motion", -0.1)):
        with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} {value}: must be at least"):
            run(LabelConfig(lam=lam, data=data, out=tmp_path / "out", **{name: value}))
