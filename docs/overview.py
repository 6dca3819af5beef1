"""The image with which README.md opens, from what `lapa demo` writes: videos, codes, what a code does, rollouts.

    make demo
    python docs/overview.py runs/demo docs/images/overview.webp

Everything is as the demo made it: frames of its videos with their labels, predictions of its latent action model, and
successful rollouts of its policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from lapa.data.labels import Labels
from lapa.data.lerobot import LeRobotDataset
from lapa.data.transforms import resize_and_crop
from lapa.data.video import decode_clip, probe
from lapa.drawing import Row, grid, heat_map, largest
from lapa.files import read_json_lines
from lapa.latent.model import LatentActionModel
from lapa.latent.show import decode_each, difference, pixels

ACROSS = 6


@dataclass(frozen=True)
class OverviewConfig:
    """Draw the image of the README."""

    demo: Annotated[Path, tyro.conf.Positional]
    """The folder of `lapa demo`."""
    out: Annotated[Path, tyro.conf.Positional]
    """The WebP file to write."""
    episode: int = -20
    """The video whose frames are shown."""
    task: str = "door-open"
    """The task of the rollout."""


def main(config: OverviewConfig) -> None:
    dataset = LeRobotDataset(config.demo / "videos")
    labels = Labels.open(config.demo / "labels", dataset_fingerprint=dataset.fingerprint)
    model = LatentActionModel.from_pretrained(config.demo / "lam").eval()
    rows = [
        *video_rows(dataset, labels, model, range(len(dataset))[config.episode]),
        rollout_row(config.demo / "results" / "policy", config.task, dataset.fps),
    ]
    grid(rows).save(config.out, "WEBP", quality=82, method=6)
    print(f"wrote {config.out}: {config.out.stat().st_size / 1000:.0f} kB")


def video_rows(dataset: LeRobotDataset, labels: Labels, model: LatentActionModel, episode: int) -> list[Row]:
    """Frames one horizon apart with the codes between them, and the frames that the model predicts from these."""
    frames_T, codes_TL = labels.codes(episode)
    horizon, seconds = labels.manifest.horizon_frames, labels.manifest.horizon_seconds
    rows = np.arange((len(frames_T) - 1) % horizon, len(frames_T), horizon)[1 - ACROSS :]
    shown = [*frames_T[rows].tolist(), int(frames_T[rows[-1]]) + horizon]
    images = dataset.frames(episode, shown)
    small = resize_and_crop(images, model.config.image_size)
    before_NCHW = torch.from_numpy(small[:-1].transpose(0, 3, 1, 2).copy())
    predicted = pixels(decode_each(model, before_NCHW, torch.from_numpy(codes_TL[rows])))
    changes = difference(predicted, small[:-1])
    codes = ["-".join(map(str, codes_L)) for codes_L in codes_TL[rows].tolist()]
    captions = [f"{frame / dataset.fps:.1f} s: {code}" for frame, code in zip(shown[:-1], codes, strict=True)]
    captions.append(f"{shown[-1] / dataset.fps:.1f} s")
    blank, most = np.full_like(small[0], 255), largest(changes)
    title = (
        f"2. What codes do: the next frame, {seconds:g} s later, as a model predicts it from the frame before and codes"
    )
    return [
        Row("1. Video without actions. A few codes say what changes from each frame to the next", images, captions),
        Row(title, [blank, *predicted], ["", *(f"with {code}" for code in codes)]),
        Row("", [blank, *(heat_map(change, most) for change in changes)], ["", *["what they change"] * len(changes)]),
    ]


def rollout_row(results: Path, task: str, fps: float) -> Row:
    """Frames of the first successful rollout of a task that is recorded. fps: steps a second."""
    rollouts = sorted(read_json_lines(results / "episodes.jsonl"), key=lambda each: each["episode"])
    videos = [(each["steps"], results / "videos" / f"{task}-{each['episode']}.mp4") for each in rollouts
              if each["task"] == task and each["success"]]  # fmt: skip
    num_steps, file = next((steps, file) for steps, file in videos if file.exists())
    info = probe(file)
    steps = np.linspace(0, num_steps, ACROSS).round().astype(int)
    # Of the video's end, where the outcome is shown for a while, only the first frame.
    places = np.minimum(np.ceil(steps * info.fps / fps), info.num_frames - 1).astype(int)
    # Below the square image is its caption.
    images = list(decode_clip(file, places.tolist(), info.fps)[:, : info.width])
    captions = [f"step {step}" for step in steps[:-1]] + [f"step {steps[-1]}: success"]
    title = f"3. A policy that learnt to predict codes, and then actions from 15 labelled episodes, acts ({task})"
    return Row(title, images, captions, frozenset({ACROSS - 1}))


if __name__ == "__main__":
    main(tyro.cli(OverviewConfig))
