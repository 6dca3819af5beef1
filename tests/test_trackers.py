"""Trackers: each gets the config, figures, images and videos of a run, under one id; a failure warns once."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import lapa
from lapa.data.video import encode_clip
from lapa.engine import trackers
from lapa.engine.config import LoopConfig, TrackerName
from lapa.engine.loop import train
from lapa.engine.trackers import Backend, Tracker
from lapa.errors import UserError
from lapa.sources.synthetic import write_synthetic_dataset
from lapa.types import Losses, TrainableModel, TrainingDataset
from torchrun import torchrun

LOOP = LoopConfig(steps=4, batch_size=2, device="cpu", log_every=1, eval_every=2)
CONFIG = {"loop": {"steps": 4, "batch_size": 2}, "data": ["here"]}
IMAGE = Image.new("RGB", (8, 6), "red")


class Points(TrainingDataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, draw: Any) -> dict[str, Any]:
        return {"index": draw[0]}


class Weight(TrainableModel, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        return Losses((self.weight - batch["index"].float().mean()).square())


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"index": torch.tensor([item["index"] for item in items])}


def run(out: Path, loop: LoopConfig, **options: Any) -> nn.Module:
    out.mkdir(exist_ok=True)
    model = Weight()
    figures = {"evaluate": lambda model: {"error": 0.5}, "draw": lambda model: {"frames": IMAGE}}
    train(model, Points(), collate, loop, out, run_config=CONFIG, description="test", **figures, **options)
    return model


def clip(path: Path) -> Path:
    frames = [np.full((16, 24, 3), 80 * number, np.uint8) for number in range(3)]
    encode_clip(path, frames, fps=5)
    return path


class Recorded(Backend):
    """Keeps what it is given. fails: the method that raises."""

    fails = ""
    calls: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __init__(self, folder: Path, run_id: str, title: str, config: Any, first_step: int) -> None:
        self._note("open", run_id, title, config, first_step)

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fails:
            raise ConnectionError("no route to the server")

    def scalars(self, step: int, values: Any) -> None:
        self._note("scalars", step, values)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._note("image", step, name)

    def video(self, step: int, name: str, path: Path) -> None:
        self._note("video", step, name, path.name)

    def close(self) -> None:
        self._note("close")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    monkeypatch.setitem(trackers.BACKENDS, "tensorboard", Recorded)
    monkeypatch.setattr(Recorded, "calls", [])
    return Recorded


def test_a_resumed_training_keeps_its_id(tmp_path: Path, recorded: type[Recorded]) -> None:
    loop = replace(LOOP, tracker="tensorboard")
    run(tmp_path / "run", replace(loop, stop_after=2))
    run(tmp_path / "run", loop, resume=True)
    first, second = (call for call in recorded.calls if call[0] == "open")
    assert first[1] == second[1] == json.loads((tmp_path / "run/training/tracker.json").read_text())["id"]
    assert (first[2:], second[2:]) == (("run", CONFIG, 0), ("run", CONFIG, 2))
    steps = [call[1] for call in recorded.calls if call[0] == "scalars" and "loss" in call[2]]
    assert steps == [1, 2, 3, 4]
    # As without the stop.
    assert [call[1:] for call in recorded.calls if call[0] == "image"] == [(2, "eval/frames"), (4, "eval/frames")]
    run(tmp_path / "another", loop)
    assert recorded.calls[-1] == ("close",)
    assert next(call for call in reversed(recorded.calls) if call[0] == "open")[1] != first[1]


@pytest.mark.parametrize("method", ["open", "scalars", "image", "close"])
def test_a_failing_tracker_warns_once_and_the_training_is_the_same(
    tmp_path: Path,
    recorded: type[Recorded],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    method: str,
) -> None:
    monkeypatch.setattr(recorded, "fails", method)
    tracked = run(tmp_path / "tracked", replace(LOOP, tracker="tensorboard"))
    assert capsys.readouterr().err.count("--tracker tensorboard failed (ConnectionError: no route to the server)") == 1
    assert [call[0] for call in recorded.calls].count(method) == 1
    assert recorded.calls[-1][0] == method
    assert torch.equal(tracked.weight, run(tmp_path / "plain", LOOP).weight)


def test_a_tracker_that_is_not_installed_is_named_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--tracker wandb: is not installed; pip install 'lapa-vla\[wandb\]'"):
        run(tmp_path / "run", replace(LOOP, tracker="wandb"))
    assert not (tmp_path / "run" / "training").exists()


def test_tensorboard_reads_back_what_was_reported(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    loop = replace(LOOP, tracker="tensorboard")
    run(tmp_path / "run", replace(loop, stop_after=3))
    run(tmp_path / "run", loop, resume=True)
    events = events_of(tmp_path / "run" / "training")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [(event.step, event.value) for event in events.Scalars("eval/error")] == [(2, 0.5), (4, 0.5)]
    assert [(event.step, event.width, event.height) for event in events.Images("eval/frames")] == [(2, 8, 6), (4, 8, 6)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == CONFIG


def test_a_video_is_a_gif_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = Tracker("tensorboard", tmp_path, "test", CONFIG)
    tracker.video(3, "rollouts/a", clip(tmp_path / "a.mp4"))
    tracker.close()
    (event,) = events_of(tmp_path).Images("rollouts/a")
    assert (event.step, event.width, event.height) == (3, 24, 16)
    (tmp_path / "a.gif").write_bytes(event.encoded_image_string)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.format, gif.n_frames, gif.info["duration"]) == ("GIF", 3, 200)


def test_one_of_two_processes_reports(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    torchrun(__file__, "tensorboard", tmp_path / "run")
    assert len(list((tmp_path / "run" / "training").glob("events.out.*"))) == 1
    events = events_of(tmp_path / "run" / "training")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Images("eval/frames")] == [2, 4]


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_an_evaluation_reports_rates_and_videos(tmp_path: Path, recorded: type[Recorded]) -> None:
    options = {"env": "synthetic", "tasks": "all", "episodes": 1, "videos": 1, "max_steps": 3, "workers": 0}
    lapa.evaluate(policy="random", out=tmp_path / "out", tracker="tensorboard", **options)
    opened, closed = recorded.calls[0], recorded.calls[-1]
    assert (opened[2], opened[3]["env"], closed) == ("out", "synthetic", ("close",))
    scalars = [name for call in recorded.calls if call[0] == "scalars" for name in call[2]]
    tasks = {name.removeprefix("success_rate/") for name in scalars if "/" in name}
    assert tasks and "success_rate" in scalars
    assert {call[2] for call in recorded.calls if call[0] == "video"} == {f"rollouts/{task}-0" for task in tasks}


def test_a_latent_action_model_shows_its_predictions(tmp_path: Path, recorded: type[Recorded]) -> None:
    write_synthetic_dataset(tmp_path / "videos", episodes=4)
    lapa.train_latent(preset="debug", data=tmp_path / "videos", out=tmp_path / "out", steps=2, tracker="tensorboard")
    assert ("image", 2, "eval/predictions") in recorded.calls
    assert recorded.calls[0][3]["loop"]["steps"] == 2


def test_wandb_offline_keeps_figures_images_and_videos(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    in_a_process("wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{id_in(tmp_path)}.wandb"] * 2
    for path in files:
        contents = path.read_bytes()
        assert all(text in contents for text in (b"loss", b"error", b"batch_size"))
        assert {found.suffix for found in path.parent.rglob("media/**/*.*")} == {".png", ".mp4"}


def test_trackio_keeps_config_figures_images_and_videos(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    in_a_process("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "database"))


def in_a_process(name: str, folder: Path, **environment: str) -> None:
    """wandb has written all when its process ends, and trackio reads its environment when it is imported."""
    subprocess.run([sys.executable, __file__, name, folder], env={**os.environ, **environment}, check=True)


def report(name: TrackerName, folder: Path) -> None:
    """One step, and another after a resume."""
    for first_step in (0, 1):
        tracker = Tracker(name, folder, "test", CONFIG, first_step)
        tracker.scalars(first_step + 1, {"loss": 0.25, "eval/error": 0.5})
        tracker.image(first_step + 1, "eval/frames", IMAGE)
        tracker.video(first_step + 1, "rollouts/a", clip(folder / "a.mp4"))
        tracker.close()
        assert tracker._backend is not None


def id_in(folder: Path) -> str:
    return json.loads((folder / "tracker.json").read_text())["id"]


def report_to_trackio(folder: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    report("trackio", folder)
    (run,) = SQLiteStorage.get_run_records("lapa")
    assert run["name"] == f"test-{id_in(folder)}"
    assert SQLiteStorage.get_run_config("lapa", run["name"], run_id=run["id"])["loop"] == CONFIG["loop"]
    logs = SQLiteStorage.get_logs("lapa", run["name"], run_id=run["id"])
    for name in ("loss", "eval/frames", "rollouts/a"):
        assert [row["step"] for row in logs if name in row] == [1, 2]


if __name__ == "__main__":
    if sys.argv[1] == "trackio":
        report_to_trackio(Path(sys.argv[2]))
    elif sys.argv[1] == "wandb":
        report("wandb", Path(sys.argv[2]))
    else:
        run(Path(sys.argv[2]), replace(LOOP, tracker="tensorboard"))


@pytest.mark.parametrize("text", ["[]", "{}", '{"id": 5}', "{"])
def test_a_damaged_id_of_a_run_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / trackers.ID).write_text(text)
    with pytest.raises(UserError, match=rf"{trackers.ID}: "):
        trackers._run_id(tmp_path, resuming=True)
    assert trackers._run_id(tmp_path, resuming=False) == trackers._run_id(tmp_path, resuming=True)
