"""Labels: complete, resumable after any kill, the same bytes from all engines, refused where they do not belong."""

from __future__ import annotations

import ipaddress
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lapa import config as configs
from lapa.checksums import SUMS
from lapa.data.episode_decoders import EpisodeDecoders
from lapa.data.labels import EpisodeLabels, Labels, Manifest, read_shard, shard_path, write_shard
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.data.video import encode_clip
from lapa.data.writer import DatasetWriter
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import as_path, claim_output, read_json, write_json
from lapa.labelling import ray_engine, shards
from lapa.labelling.config import LabelConfig
from lapa.labelling.ray_engine import LabelActor
from lapa.labelling.run import choose_decoders, run
from lapa.labelling.shards import Labeller, Shard, make_plan
from lapa.latent.model import LatentActionModel, lam_fingerprint
from lapa.presets import LATENT
from lapa.ray_cluster import RETRIES, RayConfig, pool, rows_of
from lapa.sources.synthetic import write_synthetic_dataset
from torchrun import torchrun

EPISODES, FRAMES, HORIZON = 6, 12, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("label") / "vidéos of a square"
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
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "whole", embeddings=True))
    monkeypatch.setattr("lapa.data.episode_decoders.WINDOW", 4)
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "windows", embeddings=True))
    assert rows(tmp_path / "windows") == rows(tmp_path / "whole")
    whole, windows = (Labels.open(tmp_path / name) for name in ("whole", "windows"))
    for episode in range(6):
        assert len(whole.embeddings(episode)) > 0
        np.testing.assert_allclose(windows.embeddings(episode), whole.embeddings(episode), atol=1e-5)


def test_all_episodes_too_short_is_an_error(data: Path, tmp_path: Path) -> None:
    long_horizon = save_lam(tmp_path / "lam", seed=0, horizon_seconds=1.2)
    with pytest.raises(ValueError, match=r"all 6 episodes are too short for the model's horizon of 1\.2 s \(12 frames"):
        run(LabelConfig(lam=long_horizon, data=data))


KILLED = """
import sys, time
from pathlib import Path
from lapa.labelling import shards
from lapa.labelling import run as label
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
    with pytest.raises(ValueError, match=rf"{video.name}.*the video ends 4 frames too early.*--skip-bad .*--resume"):
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
        patch.setattr("lapa.labelling.run.make_manifest", interrupted)
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

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        MemoryFileSystem().pipe_file(self._strip_protocol(path), value, mode)
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
    for complete, remedy in ((False, "--resume to go on with it"), (True, "--overwrite to replace it")):
        with pytest.raises(ValueError, match=remedy):
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
    (trained / SUMS).unlink()
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


@pytest.mark.parametrize(
    ("codes", "complaint"),
    [
        (pa.array([[3, 70_000]] * 2, pa.list_(pa.int32(), 2)), r"its codes lie in 3 to 70000, expected 0 to 7"),
        (pa.array([[3, 65_539]] * 2, pa.list_(pa.int64(), 2)), r"its codes lie in 3 to 65539, expected 0 to 7"),
        (pa.array([[0, 8]] * 2, pa.list_(pa.int32(), 2)), r"its codes lie in 0 to 8, expected 0 to 7"),
        (pa.array([[-1, 0]] * 2, pa.list_(pa.int32(), 2)), r"its codes lie in -1 to 0, expected 0 to 7"),
        (pa.array([[0, 1, 2]] * 2, pa.list_(pa.int32(), 3)), r"its codes are 3 long, 2 in manifest\.json"),
        (pa.array([[0.0, 1.5]] * 2, pa.list_(pa.float32(), 2)), r"its codes are float32, expected whole numbers"),
        (pa.array([[0, None]] * 2, pa.list_(pa.int32(), 2)), r"codes are missing"),
    ],
)
def test_what_is_no_code_is_named_when_labels_are_opened(tmp_path: Path, codes: pa.Array, complaint: str) -> None:
    path = shard_path(tmp_path, 0, 0)
    whole = {"episode_index": pa.array([0, 0]), "frame_index": pa.array([0, 1])}
    pq.write_table(pa.table({**whole, "codes": codes}), path)
    manifest = Manifest("a", "b", "front", 0.3, 3, 2, 8, 2, 1, 0, [[1.0] * 8] * 2)
    write_json(tmp_path / "manifest.json", configs.to_dict(manifest))
    with pytest.raises(UserError, match=rf"episodes-000000-000000\.parquet: {complaint}"):
        Labels.open(tmp_path)
    pq.write_table(pa.table({**whole, "codes": pa.array([[0, 7]] * 2, pa.list_(pa.int32(), 2))}), path)
    assert Labels.open(tmp_path).codes(0)[1].tolist() == [[0, 7]] * 2


@pytest.mark.parametrize("codes", [[[-1]], [[2**31]], [[0.5]]])
def test_what_is_no_code_is_not_written(tmp_path: Path, codes: list) -> None:
    with pytest.raises(UserError, match="episode 0: its codes"):
        write_shard(shard_path(tmp_path, 0, 0), {0: EpisodeLabels(np.arange(1), np.array(codes))})


@pytest.mark.parametrize("column", ["frame_index", "episode_index"])
@pytest.mark.parametrize("value", [-1, 2**31])
def test_numbers_of_frames_and_episodes_are_not_wrapped(tmp_path: Path, column: str, value: int) -> None:
    whole = {"episode_index": pa.array([0]), "frame_index": pa.array([0]), column: pa.array([value])}
    pq.write_table(pa.table({**whole, "codes": pa.array([[0]], pa.list_(pa.int32(), 1))}), shard_path(tmp_path, 0, 0))
    manifest = Manifest("a", "b", "front", 0.3, 3, 1, 8, 1, 1, 0, [[1.0] * 8])
    write_json(tmp_path / "manifest.json", configs.to_dict(manifest))
    with pytest.raises(UserError, match=rf"\.parquet: {column} lies in {value} to {value}"):
        Labels.open(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [{"codebook_size": 10**9}, {"latent_length": 10**9}, {"codebook_size": 0}, {"num_rows": -1}]
    + [{"horizon_frames": frames} for frames in (-1, 0, 10**30)],
)
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, changed: dict[str, int]) -> None:
    manifest = Manifest("a", "b", "front", 0.3, 3, 1, 8, 0, 0, 0, [[1.0] * 8])
    write_json(tmp_path / "manifest.json", {**configs.to_dict(manifest), **changed})
    with pytest.raises(UserError, match=r"manifest\.json: its sizes cannot be"):
        Labels.open(tmp_path)


def test_nonsense_is_refused(data: Path, lam: Path, tmp_path: Path) -> None:
    for name, value in (("batch_size", 0), ("shard_episodes", 0), ("decoders", -1), ("min_motion", -0.1)):
        with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} {value}: must be at least"):
            run(LabelConfig(lam=lam, data=data, out=tmp_path / "out", **{name: value}))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two cores, for all tests of this file."""
    pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    ray.init("local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def options(data: Path, lam: Path, out: Path, **more: Any) -> LabelConfig:
    """Batches that end inside episodes, and shards that end with a half one."""
    given = {"batch_size": 7, "shard_episodes": 2, "embeddings": True, "min_motion": 0.02, "device": "cpu", **more}
    return LabelConfig(lam=lam, data=str(data), out=str(out), **given)


@pytest.fixture(scope="module")
def whole(data: Path, lam: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run of one thread gives."""
    out = tmp_path_factory.mktemp("engines") / "whole"
    run(options(data, lam, out, decoders=0))
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_decoding_in_processes_and_more_threads_change_no_bit(
    data: Path, lam: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(whole) == [SUMS, *(f"episodes-{i:06d}-{i + 1:06d}.parquet" for i in (0, 2, 4)), "manifest.json"]
    monkeypatch.setattr("lapa.data.episode_decoders.WINDOW", 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(options(data, lam, tmp_path / "out", decoders=2))
    finally:
        torch.set_num_threads(threads)
    assert files(tmp_path / "out") == whole


# Processes take seconds to start.
@pytest.mark.parametrize(("num", "horizon"), [(0, 1), (0, 3), (0, 9), (2, 9)])
def test_windows_hold_each_pair_once_and_the_frames_of_the_dataset(
    data: Path, num: int, horizon: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapa.data.episode_decoders.WINDOW", 4)
    dataset, pairs = open_dataset(data), []
    with EpisodeDecoders(dataset, horizon=horizon, size=32, num=num) as decoders:
        found = decoders.windows([4, 1])
        for window in found:
            last = window.first + len(window.frames_THWC)
            assert np.array_equal(window.frames_THWC, dataset.frames(window.episode, range(window.first, last)))
            pairs += [(window.episode, frame) for frame in range(window.first, last - horizon)]
        assert decoders.count([4, 1]) == 6
    assert pairs == [(episode, frame) for episode in (4, 1) for frame in range(FRAMES - horizon)]


def test_a_killed_decoder_is_reported_and_the_run_continues_from_there(
    data: Path, lam: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = options(data, lam, tmp_path / "out", decoders=1), shards.write_shard

    def write_and_kill(path: Path, *what: Any) -> None:
        write(path, *what)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    # So that decoding is not all done when the first shard is.
    monkeypatch.setattr("lapa.data.episode_decoders.WINDOW", 2)
    monkeypatch.setattr(shards, "write_shard", write_and_kill)
    with pytest.raises(ValueError, match=r"worker process was killed.*--resume and fewer --decoders"):
        run(config)
    monkeypatch.undo()
    kept = {name: content for name, content in files(tmp_path / "out").items() if name != "run.json"}
    assert kept and kept.items() < whole.items()
    run(replace(config, resume=True, decoders=0))
    assert files(tmp_path / "out") == whole


class DyingActor(LabelActor):
    """Is killed twice: amid its first shard, with a half written file, and after the last, before it can report."""

    def _make(self, shard: Shard, labeller: Labeller) -> None:
        folder = shard.path.parent.parent
        if shard.first == 0 and not (folder / "amid").exists():
            (folder / "amid").touch()
            for _ in labeller.label([shard]):
                (shard.path.parent / f".{shard.path.stem}.{os.getpid()}.partial.parquet").write_bytes(b"PAR1")
                os.kill(os.getpid(), signal.SIGKILL)
        super()._make(shard, labeller)
        if shard.first == 4 and not (folder / "after").exists():
            (folder / "after").write_text(str(shard.path.stat().st_mtime_ns))
            os.kill(os.getpid(), signal.SIGKILL)


LISTENS = """
import psutil
from lapa.ray_cluster import RayConfig, cluster
with cluster(RayConfig()) as ray:
    ray.get(ray.remote(lambda: 1).remote())
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        print(*(each.laddr.ip for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN))
"""


def test_rays_own_cluster_listens_on_this_machine_alone() -> None:
    pytest.importorskip("ray")
    done = subprocess.run([sys.executable, "-c", LISTENS], capture_output=True, text=True, timeout=300, check=True)
    listening = [ipaddress.ip_address(word.removeprefix("::ffff:")) for word in done.stdout.split()]
    assert len(listening) > 2 and all(address.is_loopback for address in listening), listening


def test_ray_writes_the_same_files_and_a_killed_actor_loses_nothing_and_doubles_nothing(
    ray: Any,
    data: Path,
    lam: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(ray_engine, "LabelActor", DyingActor)
    run(options(data, lam, tmp_path / "out", engine="ray", ray=RayConfig(num_cpus=0.5, num_workers=1)))
    assert files(tmp_path / "out") == whole
    # Both kills happened, and what was whole before the second one was not written again.
    assert (tmp_path / "amid").exists()
    written = (tmp_path / "out" / "episodes-000004-000005.parquet").stat().st_mtime_ns
    assert (tmp_path / "after").read_text() == str(written)
    printed = capfd.readouterr()
    assert "1 workers of Ray, each with 0.5 CPU cores" in printed.err and "pairs/s" in printed.err
    assert "Execution plan" not in printed.err + printed.out


class Killed(BaseException):
    """Ends an actor as SIGKILL would, but for the test."""


@pytest.mark.parametrize("stage", ["_begin", "_make"])
def test_an_actor_counts_how_often_it_was_killed(
    data: Path, lam: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(data, lam, tmp_path / "out")
    rows = {"path": [str(tmp_path / "episodes-000002-000003.parquet")], "first": [2], "last": [3]}

    def killed(*_: object) -> None:
        raise Killed

    def new_actor() -> LabelActor:
        return LabelActor(config, make_plan(config).identity, str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(LabelActor, stage, killed)
        for _ in range(RETRIES):
            with pytest.raises(Killed):
                new_actor()(rows)
    monkeypatch.chdir(tmp_path)
    assert not new_actor()(rows)["error"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["episodes-000002-000003.parquet"]
    with monkeypatch.context() as patch:
        patch.setattr(LabelActor, stage, killed)
        for _ in range(RETRIES + 1):
            with pytest.raises(Killed):
                new_actor()(rows)
    assert "was killed 4 times" in new_actor()(rows)["error"][0]


class PoisonedActor(LabelActor):
    """Is killed by a shard each time."""

    def _make(self, shard: Shard, labeller: Labeller) -> None:
        if shard.first == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._make(shard, labeller)


@pytest.mark.slow
def test_a_shard_that_kills_its_worker_every_time_ends_the_run(
    ray: Any, data: Path, lam: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = options(data, lam, tmp_path / "out", engine="ray", ray=RayConfig(num_cpus=0.5, num_workers=1))
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "LabelActor", PoisonedActor)
        with pytest.raises(ValueError, match=r"episodes-000002-000003.*was killed 4 times.*continue with --resume"):
            run(config)
    run(replace(config, engine="local", resume=True))
    assert files(tmp_path / "out") == whole


def test_what_ray_gives_up_on_is_one_line() -> None:
    exceptions = pytest.importorskip("ray.exceptions")

    def rows() -> Iterator[dict[str, Any]]:
        yield {"episodes": 2}
        raise exceptions.RaySystemError("in a task\n  File x\nRuntimeError: the disk is on fire\nSee the manual of Ray")

    found = rows_of(SimpleNamespace(exceptions=exceptions), SimpleNamespace(iter_rows=rows))
    assert next(found) == {"episodes": 2}
    with pytest.raises(ValueError, match=r"^Ray gave up \(RuntimeError: the disk is on fire\); .*--resume"):
        next(found)


def with_an_empty_video(data: Path, folder: Path) -> tuple[Path, str]:
    damaged = shutil.copytree(data, folder / "damaged")
    video = open_dataset(damaged).video_path(3)  # type: ignore[attr-defined]
    video.write_bytes(b"")
    return damaged, video.name


def test_an_actor_returns_its_error(data: Path, lam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    damaged, video = with_an_empty_video(data, tmp_path)
    config, identity = (
        options(damaged, lam, tmp_path / "out"),
        make_plan(options(damaged, lam, tmp_path / "out")).identity,
    )
    rows = {"path": [str(tmp_path / "episodes-000002-000003.parquet")], "first": [2], "last": [3]}
    error = LabelActor(config, identity, str(tmp_path))(rows)["error"][0]
    assert video in error and "--skip-bad to leave the episode out" in error and "--resume" in error
    error = LabelActor(config, {**identity, "dataset_fingerprint": "of another"}, str(tmp_path))(rows)["error"][0]
    assert "has another model or dataset under these names: dataset_fingerprint was 'of another'" in error
    error = LabelActor(replace(config, data="nowhere"), identity, str(tmp_path))(rows)["error"][0]
    assert error.startswith("a worker could not begin: nowhere: no such")


@pytest.mark.slow
def test_errors_with_ray_are_those_of_this_machine(ray: Any, data: Path, lam: Path, tmp_path: Path) -> None:
    damaged, video = with_an_empty_video(data, tmp_path)
    config = options(damaged, lam, tmp_path / "out", engine="ray", ray=RayConfig(num_cpus=0.5, num_workers=1))
    with pytest.raises(ValueError, match=rf"{video}.*--skip-bad to leave the episode out"):
        run(config)
    run(replace(config, resume=True, skip_bad=True))
    run(options(damaged, lam, tmp_path / "here", skip_bad=True))
    assert files(tmp_path / "out") == files(tmp_path / "here")


def test_ray_is_not_needed_unless_asked_for(
    data: Path, lam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install "lapa-vla\[ray\]"'):
        run(options(data, lam, tmp_path / "out", engine="ray"))
    run(options(data, lam, tmp_path / "out", resume=True))


def test_workers_that_do_not_fit_the_cluster_are_refused(data: Path, lam: Path, tmp_path: Path) -> None:
    config = options(data, lam, tmp_path / "out", engine="ray", device="auto")
    two = {"CPU": 16.0, "GPU": 2.0}
    assert pool(RayConfig(num_cpus=0.5), "auto", {"CPU": 2.0}, num_shards=9) == (4, 0.5, 0.0)
    assert pool(RayConfig(), "auto", two, num_shards=9) == (2, 1.0, 1.0)
    assert pool(RayConfig(num_gpus=0.25), "auto", two, num_shards=5) == (5, 1.0, 0.25)
    assert pool(RayConfig(), "cpu", two, num_shards=3) == (3, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"3 workers of 1 CPUs each do not fit a cluster that has 2; give fewer"):
        pool(RayConfig(num_workers=3), "auto", {"CPU": 2.0}, num_shards=9)
    one = {"CPU": 2.0, "GPU": 1.0}
    for device, given, has, message in (
        ("cuda", RayConfig(), {"CPU": 2.0}, r"1 workers of 1 GPUs each .* has 0; give --device cpu"),
        ("cpu", RayConfig(num_gpus=1.0), one, "--device cpu and --ray.num-gpus 1 contradict"),
        ("cuda", RayConfig(num_gpus=0.0), one, "--device cuda and --ray.num-gpus 0 contradict"),
        ("gpu", RayConfig(), {"CPU": 2.0}, "unknown device 'gpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(given, device, has, num_shards=1)
    with pytest.raises(ValueError, match="memory of this process"):
        run(replace(config, out="memory://labels"))


def test_processes_decode_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    cpu, gpu = pick_device("cpu"), torch.device("cuda", 0)
    assert [choose_decoders(None, device, 10**6) for device in (cpu, gpu)] == [3, 11]
    assert choose_decoders(None, gpu, 100) == 0 and choose_decoders(5, cpu, 100) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_decoders(None, gpu, 10**6) == 2


def test_numbers_of_episodes_may_be_far_apart(tmp_path: Path) -> None:
    """The memory is that of the rows, not of the largest number."""
    largest, frames_T = 2**31 - 1, np.arange(2)
    episodes = {number: EpisodeLabels(frames_T, np.full((2, 3), number % 7)) for number in (4, largest)}
    path = shard_path(tmp_path, 4, largest)
    write_shard(path, episodes)
    manifest = Manifest(
        lam_fingerprint="a", dataset_fingerprint="b", camera="front", horizon_seconds=0.1, horizon_frames=1,
        latent_length=3, codebook_size=8, num_rows=4, num_episodes=2, skipped_episodes=0, code_usage=[],
    )  # fmt: skip
    labels = Labels(tmp_path, manifest, [(path, read_shard(path))])
    for number, rows in {4: 2, largest: 2, 3: 0, 5: 0, -1: 0, 2**40: 0}.items():
        frames_T, codes_TL = labels.codes(number)
        assert codes_TL.tolist() == [[number % 7] * 3] * rows
        assert frames_T.tolist() == list(range(rows))


@pytest.mark.slow
def test_processes_of_torchrun_share_the_shards_out(
    data: Path, lam: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    given = ["--lam", lam, "--data", data, "--out", tmp_path / "out", "--batch-size", 7, "--shard-episodes", 2]
    more = ["--embeddings", "--min-motion", 0.02, "--device", "cpu"]
    torchrun("-m", "lapa", "label", *map(str, given), *more)
    assert files(tmp_path / "out") == whole
