"""Open-loop evaluation: predicted against recorded actions. No simulator is needed.

    lapa policy measure POLICY --data ROBOT_DATASET
    lapa policy measure PRETRAINED --data DATASET --labels LABELS

Writes measure.json and prints the table. A small error is not yet success: rollouts (`lapa evaluate`) reach states that
no demonstration contains. `docs/metrics.md` explains each figure.

Axes: B batch, N evaluated steps, K action chunk, A action dimensions, T frames of an episode, S state dimensions,
L latent action length, M evaluated actions of all chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lapa import config as configs
from lapa.console import finish, print_results, progress, say, warn
from lapa.data.dataset import ActionSpace, Dataset
from lapa.data.labels import Labels
from lapa.data.spec import open_dataset
from lapa.data.steps import codes_at
from lapa.engine.distributed import pick_device
from lapa.engine.metrics import versions_and_hardware
from lapa.errors import UserError
from lapa.files import claim_output, errors_about, write_json
from lapa.locks import locks_output
from lapa.policy.config import MeasureConfig
from lapa.policy.runtime import Actor, Policy, load_actor, load_policy, policy_folder
from lapa.policy.training import require_same_codes, slot_cameras, trained_episodes
from lapa.types import Observation
from lapa.verdicts import Verdict, judge, of_policy, ratio, suggested

MEASURES = "measure.json"
# A true action has a direction where it is longer than this share of the actions' root mean square.
LEAST_MOTION = 0.1
Place = tuple[int, int]  # episode, frame


@locks_output
def run(config: MeasureConfig) -> None:
    """`lapa policy measure`. Raises UserError on bad input, before anything is evaluated."""
    configs.require_at_least(config, samples=1, batch_size=1, steps=1)
    dataset = open_dataset(config.data)
    labels = config.labels and Labels.open(config.labels, dataset_fingerprint=dataset.fingerprint)
    policy, actor = _load(config, dataset, latent=bool(labels))
    trained, all_recorded = trained_episodes(config.policy, dataset)
    chosen = _chosen(config, dataset, trained)
    places: list[Place] = []
    if actor is not None:
        check_actor(actor, dataset, config.steps)
        slot_cameras(actor.cameras, [dataset], config.cameras)
    if policy is not None and labels:
        if not policy.config.latent_length:
            raise UserError(f"{config.policy}: has no latent actions to compare with --labels; leave out --labels")
        require_same_codes(policy.config, labels.manifest, config.policy)
        slot_cameras(policy.cameras, [dataset], config.cameras)
        places = _labelled_places(labels, dataset, config, chosen)
    # A policy from the hub has no folder here to write into.
    out = config.out or (config.policy if config.policy.is_dir() else Path()) / f"measure_{dataset.name}"
    claim_output(
        out,
        complete=(out / MEASURES).exists(),
        overwrite=config.overwrite,
        resumable=False,
        inputs=[config.policy, dataset.root, *([config.labels] if config.labels else [])],
    )
    figures: dict[str, Any] = {}
    if actor is not None:
        figures |= measure_actions(actor, dataset, config, chosen)
    if policy is not None and labels:
        figures |= measure_codes(policy, dataset, labels, places, config)
    num_seen = len(np.intersect1d(chosen, trained))
    verdict = _verdict(figures, num_seen, len(chosen))
    if not all_recorded:
        verdict = verdict.at_best_doubtful("not recorded which episodes it was trained on")
    figures |= {"num_episodes": len(chosen), "num_trained_episodes": num_seen, "verdict": verdict.as_json()}
    found = {**figures, "config": configs.to_dict(config), **versions_and_hardware()}
    write_json(out / MEASURES, found)
    scored = (
        f"{len(chosen)} of {len(dataset)} episodes of {dataset.name}, {num_seen} of them trained on; "
        f"the policy was trained on {len(trained)}"
        f"{'' if all_recorded else ' or more: not all of its training is recorded'}"
    )
    print_results(found, table_of(figures, dataset.name), scored, str(verdict), as_json=config.json)
    key = ["--statistics-key", config.statistics_key] if config.statistics_key else []
    words = ["lapa", "evaluate", str(config.policy), "--env", "ENVIRONMENT", *key, "--out", "RESULTS"]
    finish(MEASURES, out, suggested(verdict, [] if actor is None else words))


def _chosen(config: MeasureConfig, dataset: Dataset, trained: np.ndarray) -> np.ndarray:
    """The episodes that `--episodes` names. Raises UserError where these are the ones trained on, and there is none."""
    every = np.arange(len(dataset))
    if config.episodes == "trained":
        if not len(trained):
            raise UserError(
                f"{config.data}: {config.policy} has no record of training on its episodes; use --episodes all"
            )
        return trained
    others = np.setdiff1d(every, trained)
    if config.episodes == "others" and not len(others):
        warn(f"{config.data}: the policy was trained on every episode; give other episodes")
        return every
    return every if config.episodes == "all" else others


def _verdict(figures: Mapping[str, Any], num_seen: int, num_episodes: int) -> Verdict:
    verdict = judge(of_policy(figures)).advised("try more episodes, or more steps")
    return (
        verdict.at_best_doubtful(f"it was trained on {num_seen} of the {num_episodes} episodes")
        if num_seen
        else verdict
    )


def measure_actions(
    actor: Actor, dataset: Dataset, config: MeasureConfig, episodes: np.ndarray | None = None
) -> dict[str, Any]:
    """Errors of the actor's chunks on recorded steps: the keys of `action_figures`. episodes: by default all."""
    places = _spread(_frames_of([np.arange(length) for length in dataset.lengths], episodes), config.samples)
    cameras = slot_cameras(actor.cameras, [dataset], config.cameras)
    say(f"{len(places)} of {dataset.num_frames} steps of {dataset.name}")
    predicted, true, counted = [], [], []
    with progress() as bar:
        line = bar.add_task("steps", total=len(places), note="")
        for group in _groups(places, config.batch_size):
            predicted.append(actor.infer(_observations(dataset, group, actor, cameras)))
            for episode, frame in group:
                actions_TA = dataset.actions(episode)
                steps_K = frame + np.arange(actor.chunk)
                true.append(actions_TA[np.minimum(steps_K, len(actions_TA) - 1)])
                counted.append(steps_K < len(actions_TA))
            bar.update(line, advance=len(group))
    mean_A = dataset.all_actions().mean(0, dtype=np.float64)
    first = slice(config.steps)
    predicted_NKA, true_NKA, counted_NK = np.concatenate(predicted), np.stack(true), np.stack(counted)
    assert dataset.action_space is not None, "check_actor refuses a dataset without actions"
    return action_figures(
        predicted_NKA[:, first], true_NKA[:, first], counted_NK[:, first], mean_A, dataset.action_space
    )


def measure_codes(
    policy: Policy, dataset: Dataset, labels: Labels, places: Sequence[Place], config: MeasureConfig
) -> dict[str, Any]:
    """Greedily predicted latent actions against the labels of these frames: the keys of `code_figures`."""
    cameras = slot_cameras(policy.cameras, [dataset], config.cameras)
    predicted = []
    with progress() as bar:
        line = bar.add_task("labelled frames", total=len(places), note="")
        for group in _groups(places, config.batch_size):
            predicted.append(policy.predict_codes(_observations(dataset, group, policy, cameras)))
            bar.update(line, advance=len(group))
    true_NL = np.stack([codes_at(labels, episode, frame)[0] for episode, frame in places])
    return code_figures(np.concatenate(predicted), true_NL)


def action_figures(
    predicted_NKA: np.ndarray, true_NKA: np.ndarray, counted_NK: np.ndarray, mean_A: np.ndarray, space: ActionSpace
) -> dict[str, Any]:
    """Errors of predicted chunks in the robot's units, and those of always predicting the mean action.

    counted_NK: False where the episode had ended. mean_A: the mean action. A figure that is not defined is None: the R2
    and the normalised error of a dimension that never changes, the direction and the length where nothing moves.
    """
    predicted_MA, true_MA = predicted_NKA[counted_NK].astype(np.float64), true_NKA[counted_NK].astype(np.float64)
    errors_MA, mean_errors_MA = np.abs(predicted_MA - true_MA), np.abs(mean_A - true_MA)
    variance_A = true_MA.var(0)
    unexplained_A = ((predicted_MA - true_MA) ** 2).mean(0)
    dimensions = {}
    for number, name in enumerate(space.names):
        error, mean_error = float(errors_MA[:, number].mean()), float(mean_errors_MA[:, number].mean())
        dimensions[name] = {
            "action_error": error,
            "mean_action_error": mean_error,
            "normalised_error": ratio(error, mean_error),
            "r2": None if variance_A[number] < 1e-12 else float(1 - unexplained_A[number] / variance_A[number]),
        }
    defined = [values["r2"] for values in dimensions.values() if values["r2"] is not None]
    error, mean_error = float(errors_MA.mean()), float(mean_errors_MA.mean())
    moving = [number for number, name in enumerate(space.names) if _moves(name, space.binary[number])]
    first_NA = true_NKA[:, 0, moving].astype(np.float64)
    return {
        "num_steps": len(predicted_NKA),
        "chunk_steps": predicted_NKA.shape[1],
        "action_error": error,
        "mean_action_error": mean_error,
        "normalised_error": ratio(error, mean_error),
        "r2": float(np.mean(defined)) if defined else None,
        "direction": _direction(predicted_NKA[:, 0, moving], first_NA),
        "mean_action_direction": _direction(np.broadcast_to(mean_A[moving], first_NA.shape), first_NA),
        "length": ratio(_mean_length(predicted_NKA[:, 0, moving]), _mean_length(first_NA)),
        "mean_action_length": ratio(_mean_length(mean_A[None, moving]), _mean_length(first_NA)),
        "action_error_by_step": [
            float(np.abs(predicted_NKA - true_NKA)[:, step][counted_NK[:, step]].mean())
            for step in range(predicted_NKA.shape[1])
            if counted_NK[:, step].any()
        ],
        "dimensions": dimensions,
    }


def code_figures(predicted_NL: np.ndarray, true_NL: np.ndarray) -> dict[str, Any]:
    """Accuracy of tokens and of whole latent actions, and that of always predicting the most frequent ones."""
    right_NL = predicted_NL == true_NL
    most_L = [Counter(column).most_common(1)[0][1] / len(true_NL) for column in true_NL.T.tolist()]
    most_whole = Counter(map(tuple, true_NL.tolist())).most_common(1)[0][1] / len(true_NL)
    return {
        "num_labels": len(true_NL),
        "token_accuracy": float(right_NL.mean()),
        "token_accuracy_per_position": [float(share) for share in right_NL.mean(0)],
        "most_frequent_token": float(np.mean(most_L)),
        "most_frequent_token_per_position": most_L,
        "latent_action_accuracy": float(right_NL.all(1).mean()),
        "most_frequent_latent_action": most_whole,
    }


def check_actor(actor: Actor, dataset: Dataset, steps: int | None = None) -> None:
    """Raises UserError where an actor does not fit a dataset, or its chunks are shorter than `steps`."""
    if dataset.action_dim is None:
        raise UserError(
            f"{dataset.root}: has no actions to compare with; give robot episodes, or --labels for latent actions"
        )
    if actor.action_dim != dataset.action_dim:
        raise UserError(
            f"{dataset.root}: has actions of {dataset.action_dim} dimensions, the policy predicts {actor.action_dim}; "
            "give episodes of its robot"
        )
    if actor.state_dim not in (0, dataset.state_dim):
        raise UserError(
            f"{dataset.root}: has a state of {dataset.state_dim or 0} dimensions, the policy reads "
            f"{actor.state_dim}; give episodes of its robot"
        )
    if steps is not None and steps > actor.chunk:
        raise UserError(f"--steps {steps}: the policy predicts chunks of {actor.chunk} actions; give at most that")


def table_of(figures: dict[str, Any], name: str) -> Table:
    """The figures as a table with the baseline of each."""
    table = Table("figure", "value", "baseline", "meaning", title=name)

    def row(title: str, value: float | None, baseline: float | None = None, meaning: str = "") -> None:
        table.add_row(title, _text(value), "" if baseline is None else _text(baseline), meaning)

    if "action_error" in figures:
        row(
            "action error",
            figures["action_error"],
            figures["mean_action_error"],
            "robot units; baseline: mean action",
        )
        row("  normalised", figures["normalised_error"], 1.0, "0: as recorded")
        row("action R2", figures["r2"], 0.0, "mean of the dimensions; 1: as recorded")
        row(
            "direction",
            figures["direction"],
            figures["mean_action_direction"],
            "cosine of the first action; 1: as recorded",
        )
        row(
            "length",
            figures["length"],
            figures["mean_action_length"],
            "of the first action, over the recorded; below 1: hesitates",
        )
        for dimension, values in figures["dimensions"].items():
            row(f"  {dimension}", values["action_error"], values["mean_action_error"], f"R2 {_text(values['r2'])}")
    if "token_accuracy" in figures:
        row("token accuracy", figures["token_accuracy"], figures["most_frequent_token"], "baseline: the most frequent")
        pairs = zip(figures["token_accuracy_per_position"], figures["most_frequent_token_per_position"], strict=True)
        for position, (accuracy, most) in enumerate(pairs):
            row(f"  position {position}", accuracy, most)
        row("whole latent action", figures["latent_action_accuracy"], figures["most_frequent_latent_action"])
    return table


def _load(config: MeasureConfig, dataset: Dataset, *, latent: bool) -> tuple[Policy | None, Actor | None]:
    """The policy whose latent actions are evaluated (None without labels), and the actor (None without actions)."""
    if not latent:
        return None, load_actor(config.policy, config.statistics_key, config.device)
    policy = load_policy(policy_folder(config.policy))
    with errors_about(config.policy):
        policy = policy.under(config.statistics_key)
    if policy.acts:
        # As `Policy.from_pretrained` does, so that actions are the same with and without --labels.
        policy.to(config.device)
        return policy, policy if dataset.action_dim is not None else None
    # A policy that only predicts latent actions has no statistics whose prompt is its own.
    policy.model.config = replace(policy.config, prompts=policy.config.prompts.acting_as([dataset.name]))
    policy.model.to(pick_device(config.device))
    return policy, None


def _labelled_places(labels: Labels, dataset: Dataset, config: MeasureConfig, episodes: np.ndarray) -> list[Place]:
    """The labelled frames to evaluate. Raises UserError where there is none."""
    frames = [labels.codes(episode)[0] for episode in range(len(dataset.lengths))]
    places = _spread(_frames_of(frames, episodes), config.samples)
    if not places and any(map(len, frames)):
        raise UserError(
            f"{config.labels}: no frame is labelled of the episodes that --episodes {config.episodes} chooses; "
            "use --episodes all"
        )
    if not places:
        raise UserError(f"{config.labels}: holds no labelled frame; label the dataset again with a shorter horizon")
    return places


def _frames_of(frames: Sequence[np.ndarray], episodes: np.ndarray | None) -> list[np.ndarray]:
    """The frames of these episodes, none of the others; episodes: None for all."""
    return [some if episodes is None or number in episodes else some[:0] for number, some in enumerate(frames)]


def _spread(frames: Sequence[np.ndarray], samples: int) -> list[Place]:
    """(episode, frame) of up to `samples` of the given frames of each episode, at even distances."""
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
    dataset: Dataset, places: Sequence[Place], policy: Actor, cameras: Sequence[str]
) -> list[Observation]:
    """The observations at these places, with the dataset's `cameras` in the policy's slots.

    The places are ordered by episode, so that each episode is opened once.
    """
    observations = []
    for episode, group in groupby(places, key=lambda place: place[0]):
        frames = [frame for _, frame in group]
        images = {
            slot: dataset.frames(episode, frames, camera) for slot, camera in zip(policy.cameras, cameras, strict=True)
        }
        states_TS = dataset.states(episode) if policy.state_dim else None
        for number, frame in enumerate(frames):
            one = {slot: images_THWC[number] for slot, images_THWC in images.items()}
            state_S = None if states_TS is None else states_TS[frame]
            observations.append(Observation(one, dataset.episodes[episode].instruction, state_S))
    return observations


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _moves(name: str, binary: bool) -> bool:
    """Whether a dimension is part of the motion; a gripper's effort would drown it in the cosine."""
    return not binary and "gripper" not in name.lower()


def _direction(predicted_NA: np.ndarray, true_NA: np.ndarray) -> float | None:
    """Mean cosine where the true action is not tiny; a prediction of zero has the cosine 0."""
    lengths_N = np.linalg.norm(true_NA, axis=1)
    counted_N = lengths_N > LEAST_MOTION * np.sqrt((lengths_N**2).mean())
    if not counted_N.any():
        return None
    predicted_NA, true_NA = predicted_NA[counted_N].astype(np.float64), true_NA[counted_N]
    lengths_N = lengths_N[counted_N]
    predicted_lengths_N = np.maximum(np.linalg.norm(predicted_NA, axis=1), 1e-12)
    return float(((predicted_NA * true_NA).sum(1) / (predicted_lengths_N * lengths_N)).mean())


def _mean_length(actions_NA: np.ndarray) -> float:
    return float(np.linalg.norm(actions_NA.astype(np.float64), axis=1).mean())
