"""How the demo ends: its table, what the difference of its two policies shows, an image and a movie.

The image and the movie are of the demo's own artifacts: frames of its videos with their labels, predictions of its
latent action model, and rollouts of its policies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from lapa import config as configs
from lapa.console import finish, print_results
from lapa.data.labels import Labels
from lapa.data.lerobot import LeRobotDataset
from lapa.data.transforms import resize_and_crop
from lapa.data.video import decode_clip, encode_clip, probe
from lapa.demo.config import ARMS, IMAGE, MOVIE, RESULTS, WORLDS, DemoConfig
from lapa.drawing import Row, captioned, grid, heat_map, largest
from lapa.errors import UserError
from lapa.evaluation.episodes import VIDEO_FPS
from lapa.evaluation.rollout import as_percent, played, read_results
from lapa.files import atomic_path, read_json_lines, write_json
from lapa.latent.model import LatentActionModel
from lapa.latent.show import decode_each, difference, pixels
from lapa.study.results import SECONDS, Rollout, require_played
from lapa.study.statistics import Estimate, estimate, shared

# Images in a row of the image, and columns of the movie.
ACROSS, MOST_TASKS = 6, 4
COMPARED = ("from scratch", "pretrained")
TRAINED = {"from scratch": "trained from scratch", "pretrained": "pretrained on videos"}
# The rollouts of both policies that are recorded: name -> arm -> success.
Goals: TypeAlias = dict[str, dict[str, bool]]


def conclude(config: DemoConfig, world: str) -> None:
    """Prints the table and what it shows, draws the image and the movie, and writes demo.json last."""
    out, path = config.out, config.out / RESULTS
    results = {name: read_results(out / "results" / who) for name, who in ARMS.items()}
    for name, who in ARMS.items():
        require_played(results[name]["episodes"], out / "results" / who)
    table = Table(f"success in {WORLDS[world]} (95% interval)", *results)
    for task in next(iter(results.values()))["tasks"]:
        table.add_row(task, *(_rate(result["tasks"][task]) for result in results.values()))
    table.add_section()
    table.add_row("all tasks", *(_rate(result["overall"]) for result in results.values()))
    gain = gain_of(config, results)
    shown = sentence(config, gain)
    found = {
        "config": configs.to_dict(config),
        "world": world,
        "results": results,
        "gain": configs.to_dict(gain),
        "seconds": seconds_of_stages(out),
    }
    goals = recorded(out, results)
    with atomic_path(out / IMAGE) as temporary:
        draw_image(out, goals, shown).save(temporary, "PNG")
    drawn = [out / IMAGE]
    if goals:
        encode_clip(out / MOVIE, movie_frames(out, goals), VIDEO_FPS)
        drawn.append(out / MOVIE)
    write_json(path, found)
    print_results(found, table, shown, as_json=config.json)
    finish("images and movies of the demo", ", ".join(map(str, drawn)))
    finish(
        "the demo's table",
        path,
        [
            "lapa data videos FOLDER --caption TEXT --out DATASET      # your own videos",
            "lapa latent train --preset base --data DATASET --out LAM  # and on",
        ],
    )


def seconds_of_stages(demo: Path) -> dict[str, float]:
    """The seconds of each stage by its title, of all its attempts together."""
    found: dict[str, float] = {}
    for row in read_json_lines(demo / SECONDS, title=str, seconds=float):
        found[row["title"]] = round(found.get(row["title"], 0.0) + row["seconds"], 1)
    return found


def _rate(result: Mapping[str, Any]) -> str:
    low, high = result["interval"]
    return f"{as_percent(result)} ({100 * low:.0f} to {high:.0%})"


@dataclass(frozen=True)
class _Run:
    """One arm's rollouts, as lapa.study.statistics takes them."""

    seed: int
    rollouts: list[Rollout]


def gain_of(config: DemoConfig, results: Mapping[str, Mapping[str, Any]]) -> Estimate:
    """Success of the pretrained policy minus that of the other, paired by rollouts with the same goal."""
    arms = [
        [
            Rollout(row["task"], row["episode"], row["success"], row["steps"])
            for row in played(results[name]["episodes"])
        ]
        for name in COMPARED
    ]
    rollouts = shared(*([_Run(config.seed, arm)] for arm in arms))
    if rollouts is None:
        raise UserError(f"{config.out / 'results'}: all rollouts ended in an error; see {config.out / 'logs'}")
    return estimate(rollouts, (-1, 1))


def sentence(config: DemoConfig, gain: Estimate) -> str:
    """What the difference shows, also where it shows nothing."""
    what, points = "pretraining on videos without actions", f"{100 * gain.value:+.0f} points of success"
    few = f"with {config.demonstrations} labelled episodes a task, one seed"
    if gain.low is None or gain.high is None:
        return f"{what}: {points}, too few rollouts for an interval"
    interval = f"{points} (95% interval {100 * gain.low:+.0f} to {100 * gain.high:+.0f})"
    if gain.sign == 0:
        return f"{what} is not shown to help: {interval} {few}"
    return f"{what} {'pays' if gain.sign > 0 else 'hurts'}: {interval} {few}"


def draw_image(demo: Path, goals: Goals, note: str) -> Image.Image:
    """Draws frames with codes, what the codes change, and a rollout of each policy."""
    dataset = LeRobotDataset(demo / "videos")
    labels = Labels.open(demo / "labels", dataset_fingerprint=dataset.fingerprint)
    model = LatentActionModel.from_pretrained(demo / "lam").eval()
    rows = video_rows(dataset, labels, model, len(dataset) - 1)
    return grid([*rows, *rollout_rows(demo, goals)], note=note)


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
    # A digit each: the demo's codebook has eight codes.
    codes = ["".join(map(str, codes_L)) for codes_L in codes_TL[rows].tolist()]
    captions = [f"{frame / dataset.fps:.1f} s: {code}" for frame, code in zip(shown[:-1], codes, strict=True)]
    captions.append(f"{shown[-1] / dataset.fps:.1f} s")
    blank, most = np.full_like(small[0], 255), largest(changes)
    title = (
        f"2. What codes do: the next frame, {seconds:g} s later, as a model predicts it from the frame before and codes"
    )
    return [
        Row(
            "1. Video without actions. A few codes say what changes from each frame to the next", list(images), captions
        ),
        Row(title, [blank, *predicted], ["", *["with these codes"] * len(predicted)]),
        Row("", [blank, *(heat_map(change, most) for change in changes)], ["", *["what they change"] * len(changes)]),
    ]


def recorded(demo: Path, results: Mapping[str, Mapping[str, Any]]) -> Goals:
    """Returns the rollouts of both policies that are recorded and ended without an error."""
    found: Goals = {}
    for arm in COMPARED:
        for row in played(results[arm]["episodes"]):
            name = f"{row['task']}-{row['episode']}"
            if video_of(demo, arm, name).exists():
                found.setdefault(name, {})[arm] = row["success"]
    return {name: outcomes for name, outcomes in found.items() if len(outcomes) == len(COMPARED)}


def video_of(demo: Path, arm: str, name: str) -> Path:
    return demo / "results" / ARMS[arm] / "videos" / f"{name}.mp4"


def rollout_rows(demo: Path, goals: Goals) -> list[Row]:
    """Frames of a rollout of each policy, with one goal: the first whose outcomes differ, else the first of all."""
    if not goals:
        return []
    name = next((name for name, outcomes in goals.items() if len({*outcomes.values()}) > 1), next(iter(goals)))
    rows = []
    for number, arm in enumerate(COMPARED, 3):
        frames_THWC, success = all_frames(video_of(demo, arm, name)), goals[name][arm]
        # The outcome is shown for a second after the end.
        places = np.linspace(0, max(0, len(frames_THWC) - 1 - VIDEO_FPS), ACROSS).round().astype(int)
        # Below the square image is its caption.
        images = list(frames_THWC[places, : frames_THWC.shape[2]])
        captions = ["start", *[""] * (ACROSS - 2), "success" if success else "no success"]
        marked = frozenset({ACROSS - 1} if success else ())
        rows.append(Row(f"{number}. A policy {TRAINED[arm]} acts ({name.rsplit('-', 1)[0]})", images, captions, marked))
    return rows


def movie_frames(demo: Path, goals: Goals) -> Iterator[np.ndarray]:
    """Yields frames uint8 [H, W, 3]: the first recorded goal of each task, the two policies in step."""
    first: dict[str, str] = {}
    for name in goals:
        first.setdefault(name.rsplit("-", 1)[0], name)
    names = list(first.values())[:MOST_TASKS]
    clips = [[all_frames(video_of(demo, arm, name)) for name in names] for arm in COMPARED]
    for index in range(max(len(clip) for row in clips for clip in row)):
        rows = [np.concatenate([clip[min(index, len(clip) - 1)] for clip in row], axis=1) for row in clips]
        titled = [captioned(row, [f"a policy {TRAINED[arm]}"]) for row, arm in zip(rows, COMPARED, strict=True)]
        yield np.concatenate(titled)


def all_frames(video: Path) -> np.ndarray:
    """Reads a whole video: uint8 [T, H, W, 3]."""
    info = probe(video)
    return decode_clip(video, range(info.num_frames or 0), info.fps)
