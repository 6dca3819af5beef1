"""What a policy says of recorded episodes, beside what was done there: no simulator is needed.

    lapa policy measure POLICY --data ROBOT_DATASET
    lapa policy measure PRETRAINED --data DATASET --labels LABELS

Writes measure.json and prints the table. A small error is no success yet: rollouts (`lapa evaluate`) meet states that
no demonstration holds. `docs/metrics.md` says how to read each figure.

Axes: B batch, N measured steps, K action chunk, A action dimensions, T frames of an episode, S state dimensions,
L latent action length.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.table import Table

from lapa import config as configs
from lapa.console import console, finish, progress, say
from lapa.data.dataset import Dataset
from lapa.data.labels import Labels
from lapa.data.spec import open_dataset
from lapa.data.steps import codes_at
from lapa.engine.distributed import pick_device
from lapa.engine.metrics import versions_and_hardware
from lapa.errors import UserError, unknown
from lapa.files import claim_output, errors_about, write_json
from lapa.policy.acting import Actor, load_actor
from lapa.policy.checkpoint import PolicyParts, load_policy
from lapa.policy.figures import action_figures, code_figures
from lapa.policy.runtime import Policy
from lapa.policy.training import require_same_codes
from lapa.types import Observation

MEASURES = "measure.json"
Place = tuple[int, int]


@dataclass(frozen=True)
class MeasureConfig:
    """Measure a policy on recorded episodes."""

    policy: Annotated[Path, tyro.conf.Positional]
    """Folder of a policy."""
    data: str
    """Dataset to measure on; with actions, or with --labels.

    docs/1-data.md has the form: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT].
    """
    out: Path | None = None
    """Folder of measure.json; by default POLICY/measure_DATASET."""
    labels: str | None = None
    """Labels of the dataset, to measure latent actions; all there is to measure of a policy that does not act yet."""
    samples: int = 512
    """Steps measured, spread evenly over all episodes."""
    steps: int | None = None
    """Of each chunk the first so many actions count; by default all."""
    cameras: tuple[str, ...] = ()
    """Which of the dataset's cameras fill the image slots; by default those of the same names, or the only one."""
    prompt_of: str | None = None
    """Whose prompt the policy reads, of the datasets it learned from; by default --statistics-key's, or its own."""
    statistics_key: str | None = None
    """By which dataset's statistics the policy acts, where it learned from several with actions."""
    batch_size: int = 64
    """Observations answered at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace what `out` holds."""


def run(config: MeasureConfig) -> None:
    """`lapa policy measure`. Raises UserError on bad input, before anything is measured."""
    if min(config.samples, config.batch_size) < 1 or (config.steps is not None and config.steps < 1):
        raise UserError("--samples, --batch-size and --steps must be at least 1")
    dataset = open_dataset(config.data)
    labels = None
    if config.labels is not None:
        labels = Labels.open(config.labels, dataset_fingerprint=dataset.fingerprint)
    parts = _parts(config) if labels is not None else None
    actor = _actor(parts, config)
    places: list[Place] = []
    if actor is not None:
        check_actor(actor, dataset, config.steps)
        _slots(actor.cameras, dataset, config.cameras)
    if parts is not None and labels is not None:
        _check_latent(parts, labels, config)
        _slots(parts.model.config.cameras, dataset, config.cameras)
        places = _labelled_places(labels, dataset, config)
    out = config.out or config.policy / f"measure_{dataset.name}"
    claim_output(
        out,
        complete=(out / MEASURES).exists(),
        overwrite=config.overwrite,
        resumable=False,
        inputs=[config.policy, dataset.root, *([config.labels] if config.labels else [])],
    )
    figures: dict[str, Any] = {}
    if actor is not None:
        figures |= measure_actions(actor, dataset, config)
    if parts is not None and labels is not None:
        figures |= measure_codes(parts, dataset, labels, places, config)
    console.print(table_of(figures, dataset.name))
    write_json(out / MEASURES, {**figures, "config": configs.to_dict(config), **versions_and_hardware()})
    key = ["--statistics-key", config.statistics_key] if config.statistics_key else []
    words = ["lapa", "evaluate", str(config.policy), "--env", "ENVIRONMENT", *key, "--out", "RESULTS"]
    finish(MEASURES, out, [] if actor is None else [shlex.join(words)])


def measure_actions(actor: Actor, dataset: Dataset, config: MeasureConfig) -> dict[str, Any]:
    """How far the actor's chunks are from what was done: the keys of `action_figures`."""
    places = _spread([np.arange(length) for length in dataset.lengths], config.samples)
    cameras = _slots(actor.cameras, dataset, config.cameras)
    say(f"{len(places)} of {dataset.num_frames} steps of {dataset.name}")
    said, true, counted = [], [], []
    with progress() as bar:
        line = bar.add_task("steps", total=len(places), note="")
        for group in _groups(places, config.batch_size):
            said.append(actor.infer(_observations(dataset, group, cameras, bool(actor.state_dim))))
            for episode, frame in group:
                actions_TA = dataset.actions(episode)
                steps_K = frame + np.arange(actor.chunk)
                true.append(actions_TA[np.minimum(steps_K, len(actions_TA) - 1)])
                counted.append(steps_K < len(actions_TA))
            bar.update(line, advance=len(group))
    mean_A = dataset.all_actions().mean(0)
    first = slice(config.steps)
    said_NKA, true_NKA, counted_NK = np.concatenate(said), np.stack(true), np.stack(counted)
    assert dataset.action_space is not None, "check_actor refuses a dataset without actions"
    return action_figures(said_NKA[:, first], true_NKA[:, first], counted_NK[:, first], mean_A, dataset.action_space)


def measure_codes(
    parts: PolicyParts, dataset: Dataset, labels: Labels, places: Sequence[Place], config: MeasureConfig
) -> dict[str, Any]:
    """Latent actions as the policy says them, greedily, against the labels of these frames: `code_figures`' keys."""
    policy = parts.model.config
    cameras = _slots(policy.cameras, dataset, config.cameras)
    device = pick_device(config.device)
    model = parts.model.to(device).eval()
    said = []
    with progress() as bar:
        line = bar.add_task("labelled frames", total=len(places), note="")
        for group in _groups(places, config.batch_size):
            seen = _observations(dataset, group, cameras, bool(policy.state_dim))
            batch = parts.inputs.observed(
                [[observation.images[camera] for camera in policy.cameras] for observation in seen],
                [observation.instruction for observation in seen],
                [observation.state for observation in seen if observation.state is not None],
                [config.prompt_of] * len(seen),
            )
            codes_BL = model.predict_codes({name: value.to(device) for name, value in batch.items()})
            said.append(codes_BL.cpu().numpy())
            bar.update(line, advance=len(group))
    true_NL = np.stack([codes_at(labels, episode, frame)[0] for episode, frame in places])
    return code_figures(np.concatenate(said), true_NL)


def check_actor(actor: Actor, dataset: Dataset, steps: int | None = None) -> None:
    """UserError saying in what an actor does not fit a dataset, or that its chunks are shorter than `steps`."""
    if dataset.action_dim is None:
        raise UserError(
            f"{dataset.root}: has no actions to compare with; give robot episodes, or --labels for latent actions"
        )
    if actor.action_dim != dataset.action_dim:
        raise UserError(
            f"{dataset.root}: has actions of {dataset.action_dim} dimensions, the policy says {actor.action_dim}; "
            "give episodes of its robot"
        )
    if actor.state_dim not in (0, dataset.state_dim):
        raise UserError(
            f"{dataset.root}: has a state of {dataset.state_dim or 0} dimensions, the policy is told "
            f"{actor.state_dim}; give episodes of its robot"
        )
    if steps is not None and steps > actor.chunk:
        raise UserError(f"--steps {steps}: the policy says chunks of {actor.chunk} actions; give at most that")


def table_of(figures: dict[str, Any], name: str) -> Table:
    """The figures as a table, those that were measured."""
    table = Table("figure", "value", "yardstick", "read it as", title=name)

    def row(title: str, value: float | None, yardstick: float | None = None, reading: str = "") -> None:
        table.add_row(title, _text(value), "" if yardstick is None else _text(yardstick), reading)

    if "action_error" in figures:
        row(
            "action error", figures["action_error"], figures["mean_action_error"], "robot units; always the mean action"
        )
        row("  normalised", figures["normalised_error"], 1.0, "0: as was done")
        row("action R2", figures["r2"], 0.0, "mean of the dimensions; 1: as was done")
        row(
            "direction",
            figures["direction"],
            figures["mean_action_direction"],
            "cosine of the first action; 1: the same",
        )
        for dimension, values in figures["dimensions"].items():
            row(f"  {dimension}", values["action_error"], values["mean_action_error"], f"R2 {_text(values['r2'])}")
    if "token_accuracy" in figures:
        row("token accuracy", figures["token_accuracy"], figures["most_frequent_token"], "always the most frequent")
        pairs = zip(figures["token_accuracy_per_position"], figures["most_frequent_token_per_position"], strict=True)
        for position, (accuracy, most) in enumerate(pairs):
            row(f"  position {position}", accuracy, most)
        row("whole latent action", figures["latent_action_accuracy"], figures["most_frequent_latent_action"])
    return table


def _actor(parts: PolicyParts | None, config: MeasureConfig) -> Actor | None:
    """What acts: the policy that was loaded for its latent actions or else is loaded here; None if only pretrained."""
    if parts is None:
        return load_actor(config.policy, config.statistics_key, device=config.device, dataset=config.prompt_of)
    if not parts.acts:
        return None
    device = pick_device(config.device)
    # As `Policy.from_pretrained` has it, so that actions are the same with and without --labels.
    dtype = torch.bfloat16 if device.type == "cuda" else None
    return Policy(parts, device, config.prompt_of, dtype=dtype)


def _parts(config: MeasureConfig) -> PolicyParts:
    parts = load_policy(config.policy)
    with errors_about(config.policy):
        return parts.under(config.statistics_key)


def _check_latent(parts: PolicyParts, labels: Labels, config: MeasureConfig) -> None:
    policy = parts.model.config
    if not policy.latent_length:
        raise UserError(f"{config.policy}: has no latent actions to hold against --labels; leave them out")
    require_same_codes(policy, labels.manifest, config.policy)
    if config.prompt_of is not None:
        policy.prompts.require(config.prompt_of)


def _labelled_places(labels: Labels, dataset: Dataset, config: MeasureConfig) -> list[Place]:
    """The labelled frames to measure. UserError where there is none."""
    places = _spread([labels.codes(episode)[0] for episode in range(len(dataset.lengths))], config.samples)
    if not places:
        raise UserError(f"{config.labels}: holds no labelled frame; label the dataset again with a shorter horizon")
    return places


def _slots(slots: Sequence[str], dataset: Dataset, chosen: Sequence[str]) -> dict[str, str]:
    """Which camera of the dataset fills each image slot of the policy."""
    for camera in chosen:
        if camera not in dataset.cameras:
            raise unknown("camera", camera, dataset.cameras)
    if not chosen and all(slot in dataset.cameras for slot in slots):
        chosen = slots
    if not chosen and len(slots) == len(dataset.cameras) == 1:
        chosen = dataset.cameras
    if len(chosen) != len(slots):
        raise UserError(
            f"{dataset.root}: has the cameras {', '.join(dataset.cameras)}, the policy sees {', '.join(slots)}; "
            "say with --cameras which fill their places, one each"
        )
    return dict(zip(slots, chosen, strict=True))


def _spread(frames: Sequence[np.ndarray], samples: int) -> list[Place]:
    """(episode, frame) of up to so many of the frames given for each episode, at even distances."""
    ends = np.cumsum([len(some) for some in frames])
    total = int(ends[-1])
    places = []
    for row in np.unique(np.linspace(0, total - 1, min(samples, total)).round().astype(int)):
        episode = int(np.searchsorted(ends, row, side="right"))
        places.append((episode, int(frames[episode][row - ends[episode]])))
    return places


def _groups(places: Sequence[Place], size: int) -> Iterator[Sequence[Place]]:
    return (places[first : first + size] for first in range(0, len(places), size))


def _observations(
    dataset: Dataset, places: Sequence[Place], cameras: dict[str, str], with_state: bool
) -> list[Observation]:
    """What was seen at these places, which are ordered by episode: each episode is opened once."""
    by_episode: dict[int, list[int]] = {}
    for episode, frame in places:
        by_episode.setdefault(episode, []).append(frame)
    seen = []
    for episode, frames in by_episode.items():
        pictures = {slot: dataset.frames(episode, frames, camera) for slot, camera in cameras.items()}
        states_TS = dataset.states(episode) if with_state else None
        for number, frame in enumerate(frames):
            images = {slot: several_THWC[number] for slot, several_THWC in pictures.items()}
            state = None if states_TS is None else states_TS[frame]
            seen.append(Observation(images, dataset.episodes[episode].instruction, state))
    return seen


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
