"""The examples run as they stand."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from lapa.data.spec import open_dataset
from lapa.latent.model import LatentActionModel
from lapa.presets import LATENT
from lapa.sources.synthetic import write_synthetic_dataset

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_own_robot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "own_robot.py", tmp_path / "robot")
    dataset = open_dataset(tmp_path / "robot")
    assert (len(dataset.episodes), dataset.action_dim, dataset.cameras) == (3, 4, ("front",))


def test_own_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    write_synthetic_dataset(tmp_path / "videos", episodes=2, frames=12, size=32)
    torch.manual_seed(0)
    LatentActionModel(LATENT["debug"].model).save_pretrained(tmp_path / "lam")
    run(monkeypatch, "own_videos.py", tmp_path / "lam", tmp_path / "videos")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3
    assert lines[0].startswith("episode 0, frames 0 to 3: [")
