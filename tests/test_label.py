"""Labels: complete, resumable after any kill, and refused where they do not belong."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lapa.data.dataset import Dataset
from lapa.data.labels import Labels
from lapa.data.sources.synthetic import write_synthetic_dataset
from lapa.data.writer import DatasetWriter
from lapa.label.run import LabelConfig, run
from lapa.latent.model import LatentActionModel, lam_fingerprint
from lapa.presets import LATENT

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
    model, dataset = LatentActionModel.from_pretrained(lam), Dataset.open(data)
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
    with pytest.raises(ValueError, match=r"36 rows where manifest\.json says 54"):
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
    monkeypatch.setattr("lapa.data.windows.WINDOW", 4)
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "windows"))
    assert rows(tmp_path / "windows") == rows(tmp_path / "whole")


def test_all_episodes_too_short_is_an_error(data: Path, tmp_path: Path) -> None:
    long_horizon = save_lam(tmp_path / "lam", seed=0, horizon_seconds=1.2)
    with pytest.raises(ValueError, match=r"all 6 episodes are too short for the model's horizon of 1\.2 s \(12 frames"):
        run(LabelConfig(lam=long_horizon, data=data))


KILLED = """
import sys, time
from pathlib import Path
from lapa.label import run as label
write = label.write_shard
def slow(path, episodes):
    write(path, episodes)
    print("shard", flush=True)
    time.sleep(60)
label.write_shard = slow
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
    def full(table: object, path: Path) -> None:
        path.write_bytes(b"PAR1 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lapa.data.labels.pq.write_table", full)
    with pytest.raises(OSError, match="No space left"):
        run(LabelConfig(lam=lam, data=data, out=tmp_path / "labels"))
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["run.json"]
    monkeypatch.undo()
    run(LabelConfig(lam=lam, data=data, out=tmp_path / "labels", resume=True))
    assert Labels.open(tmp_path / "labels").manifest.num_rows == EPISODES * (FRAMES - HORIZON)
