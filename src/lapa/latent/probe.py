"""Measures latent action models without a robot, one or several side by side.

lapa latent probe LAM --data DATASET               # probe.json, grid.png and a table
lapa latent probe LAM --data DATASET --protocol lary   # also LARYBench's probes (lapa.latent.lary)
lapa latent compare LAM1 LAM2 ... --data DATASET   # compare.json and a table

Is the codebook used, does the decoder read the codes, do they mean the same in another scene, and do they predict the
true action and the instruction? docs/metrics.md explains each figure. The probe of a dataset that the model was trained
on reads its validation split. When several models are compared, each reads pairs of its own image size and horizon with
the same first frames, of the episodes that none of them was trained on.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lapa import config as configs
from lapa.console import finish, print_results, say, warn
from lapa.data.dataset import Dataset
from lapa.data.pairs import FramePairs, PairsConfig, horizon_frames
from lapa.data.sampling import episodes_of_training, recorded_split
from lapa.data.spec import open_dataset
from lapa.engine.distributed import pick_device
from lapa.engine.metrics import versions_and_hardware
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output, distinct_names, write_json
from lapa.latent import lary
from lapa.latent.config import CompareConfig, MeasureConfig, ProbeConfig
from lapa.latent.metrics import (
    Sample,
    consistency_figures,
    drawn_pairs,
    encode,
    information_figures,
    reconstruction_figures,
    regression_figures,
    returned_action_r2,
    take_sample,
    task_figures,
    transfer,
    usage_figures,
)
from lapa.latent.model import CONFIG, DATASETS, LatentAction, LatentActionModel, horizon_for
from lapa.latent.motion import motion, require_opencv
from lapa.latent.show import probe_sheet
from lapa.latent.train import suggestions, verdict_of
from lapa.locks import locks_output


@dataclass(frozen=True)
class Row:
    """A line of the table: the figure at `path` in probe.json, divided by the one at `over`, and its meaning."""

    name: str
    path: str
    reading: str
    over: str | None = None
    digits: str = ".2f"

    def value(self, figures: dict[str, Any]) -> str:
        """As text; empty if the figure is not measured, "-" if it is not defined."""
        value, over = (_look_up(figures, path) if path else 1.0 for path in (self.path, self.over))
        if isinstance(value, str) or isinstance(over, str):
            return ""
        return "-" if value is None or not over else format(value / over, self.digits)


# Other inputs of the same regressions, and how their figures are read.
OTHERS = {
    "published": "with the noise of training",
    "continuous": "before quantisation",
    "pixel_difference": "yardstick",
    "raw_features": "of all frames: know the whole state",
    "first_frame": "what the scene alone predicts",
    "second_frame": "what leaks with a frame",
    "shuffled": "of another pair: as if nothing was known",
    "mean": "the scale",
}


def _group(name: str, path: str, reading: str) -> tuple[Row, ...]:
    """The figure from the quantised latent action and, below it, those from OTHERS. path: with {} for the input."""
    others = (Row(f"  {kind.replace('_', ' ')}", path.format(kind), how) for kind, how in OTHERS.items())
    return (Row(f"{name}, quantised", path.format("quantized"), reading), *others)


ROWS = (
    Row("reconstruction (MSE)", "reconstruction.mse", "of the second frame", digits=".5f"),
    Row("  / copying the first frame", "reconstruction.mse", "below 1: predicts change", "reconstruction.mse_copy"),
    Row("  / mean frame", "reconstruction.mse", "scale of the frames", "reconstruction.mse_mean"),
    Row("  shuffled / own", "reconstruction.mse_shuffled", "1: actions are ignored", "reconstruction.mse"),
    Row(
        "moving pixels: / copying",
        "reconstruction.moving_mse",
        "the same where something moves",
        "reconstruction.moving_mse_copy",
    ),
    Row(
        "moving pixels: shuffled / own",
        "reconstruction.moving_mse_shuffled",
        "1: actions are ignored",
        "reconstruction.moving_mse",
    ),
    Row("codes used by over 1%", "usage.codes_used", "100%: nothing has collapsed", digits=".0%"),
    Row("perplexity, mean of positions", "usage.perplexity", "at most the codebook size", digits=".1f"),
    Row("joint perplexity", "usage.joint_perplexity", "of whole latent actions", digits=".1f"),
    Row("transfer: same code returns", "transfer.same_code", "1: means the same in any scene"),
    Row("  by chance", "transfer.same_code_chance", "the code of another pair"),
    Row("  same action read again (R2)", "transfer.action_r2", "1: the probe reads the same"),
    Row("  donor's share of the result", "transfer.donor_share", "near 1: carries the frame, not the motion"),
    *_group("action R2, linear", "action.linear.{}.r2", "on test episodes; 0: mean action"),
    *_group("action R2, MLP", "action.mlp.{}.r2", "on test episodes; 0: mean action"),
    Row("LP-MSE", "action.lp_mse", "unit variance; 1: mean action"),
    Row("action known from a code", "information.known", "share of its information; 0: chance"),
    Row("action known from all codes", "information.known_joint", "unsure where most are rare"),
    *_group("motion R2, grid, MLP", "motion.grid.mlp.{}.r2", "of optical flow in 4 x 4 cells"),
    *_group("motion R2, whole, MLP", "motion.whole.mlp.{}.r2", "of optical flow, mean of the image"),
    *_group("instruction, linear", "task.{}", "accuracy on test episodes"),
    Row("  by chance", "task.chance", "the most frequent one"),
    *_group("LARY MSE, absolute", "lary.regression.absolute.{}.mse", "LARYBench, standardised actions"),
    *_group("LARY MSE, relative", "lary.regression.relative.{}.mse", "last minus first action"),
    Row("  / best without latent action", "lary.relative_error_over_frames", "1: no more than one frame knows"),
    *_group("LARY accuracy", "lary.classification.{}.accuracy", "the instruction, of clips"),
    Row("  by chance", "lary.classification.chance", "the most frequent one"),
    Row("offset of z", "consistency.offset_share", "near 1: ignore the next three"),
    Row("S-PCFC", "consistency.s_pcfc", "low: past and future differ"),
    Row("reversal error", "consistency.reversal_error", "0: back is minus there; 2: unrelated"),
    Row("composition error", "consistency.composition_error", "0: halves add up; 3: unrelated"),
)


@locks_output
def run(config: ProbeConfig) -> None:
    """`lapa latent probe`. Raises UserError on bad input."""
    _check(config)
    model = LatentActionModel.from_pretrained(config.lam).to(pick_device(config.device)).eval()
    dataset = open_dataset(config.data)
    # A model from the hub has no folder here to write into.
    out = config.out or (config.lam if config.lam.is_dir() else Path()) / f"probe_{dataset.name}"
    inputs = [config.lam, dataset.root]
    claim_output(
        out, complete=(out / "probe.json").exists(), overwrite=config.overwrite, resumable=False, inputs=inputs
    )
    horizon = horizon_for(config.lam, dataset, model)
    pairs = pairs_of(model, dataset, config.camera, horizon)
    drawn = draw_unseen([model], pairs, config.num_pairs, config.seed)
    sample = take_sample(pairs, drawn.indices, actions=True)
    # The horizon is a whole number of frames.
    apart = pairs.horizon_frames[0] / dataset.fps
    say(f"{len(sample.frames_BTCHW)} pairs, {apart:.3g} s apart, of {dataset.name}")
    if drawn.unseen and not drawn.seen:
        say(f"{config.lam} was trained on {dataset.name}: the pairs are of the {drawn.unseen} episodes kept from it")
    encoded = encode(model, sample.frames_BTCHW)
    figures = probe(model, sample, encoded, config.seed, motions=config.motion)
    if config.protocol is not None:
        figures["lary"] = lary_figures(config, model, pairs, drawn.indices, sample, encoded)
    with atomic_path(out / "grid.png") as path:
        probe_sheet(model, sample, encoded, apart).save(path)
    verdict = verdict_of(figures, model.config)
    if drawn.seen:
        verdict = verdict.at_best_doubtful("it was trained on these clips")
    context = {"config": configs.to_dict(config), "horizon_seconds": horizon, **versions_and_hardware()}
    found = {**figures, "verdict": verdict.as_json(), **context}
    write_json(out / "probe.json", found)
    print_results(found, table_of({"value": figures}, "latent action model"), str(verdict), as_json=config.json)
    next_commands = suggestions(config.lam, config.data, model.config, verdict, dataset.in_place)
    finish("probe.json and grid.png", out, next_commands)


def lary_figures(
    config: ProbeConfig,
    model: LatentActionModel,
    pairs: FramePairs,
    indices: Sequence[int],
    sample: Sample,
    encoded: LatentAction,
) -> dict[str, Any]:
    """LARYBench's regression, where there are actions, and its classification, where there are instructions."""
    assert config.protocol is not None
    sizes, dataset, figures = lary.SIZES[config.protocol], pairs.datasets[0], dict[str, Any]()
    episodes = sorted(set(sample.episodes_B.tolist()))
    if sample.actions_BA is not None and len(episodes) > 1:
        say(f"{config.protocol}: regression to the {pairs.horizon_frames[0]} actions between the frames")
        chunks_BKA = np.stack([pairs.actions_between(index) for index in indices])
        space = dataset.action_space
        delta = space is not None and space.control == "delta"
        figures["regression"] = lary.regression_figures(
            model, sample, encoded, chunks_BKA, sizes, delta=delta, seed=config.seed
        )
        figures["relative_error_over_frames"] = lary.relative_error_over_frames(figures)
    else:
        say(f"{config.protocol}: no regression, which needs actions, and pairs of two episodes")
    most = max(2, config.num_pairs // (lary.CLIP_FRAMES - 1))
    say(f"{config.protocol}: classification of at most {most} clips by their instruction")
    classes = lary.classification_figures(model, dataset, config.camera, episodes, sizes, most=most, seed=config.seed)
    if classes is None:
        say(f"{config.protocol}: no classification, which needs two instructions of two episodes each")
        return figures
    return {**figures, "classification": classes}


@locks_output
def compare(config: CompareConfig) -> None:
    """`lapa latent compare`. Raises UserError on bad input."""
    if len(set(config.lams)) < max(2, len(config.lams)):
        raise UserError("give two or more different latent action models to compare, as LAM1 LAM2")
    _check(config)
    dataset = open_dataset(config.data)
    models = [LatentActionModel.from_pretrained(lam) for lam in config.lams]
    out = config.out or Path(f"compare_{dataset.name}")
    inputs = [*config.lams, dataset.root]
    claim_output(
        out, complete=(out / "compare.json").exists(), overwrite=config.overwrite, resumable=False, inputs=inputs
    )
    horizons = [horizon_for(lam, dataset, model) for lam, model in zip(config.lams, models, strict=True)]
    longest = int(np.argmax(horizons))
    pairs = pairs_of(models[longest], dataset, config.camera, horizons[longest])
    drawn = draw_unseen(models, pairs, config.num_pairs, config.seed)
    places = [pairs.location(index) for index in drawn.indices]
    if drawn.seen:
        warn(f"every episode of {dataset.name} was trained on by some of these models: compare them on other episodes")
    elif drawn.unseen:
        say(f"the pairs are of the {drawn.unseen} episodes of {dataset.name} that no model was trained on")
    figures: dict[str, dict[str, Any]] = {}
    for name, model, horizon in zip(distinct_names(config.lams), models, horizons, strict=True):
        say(f"{name}: {len(places)} pairs, {horizon:g} s apart, of {dataset.name}")
        own = pairs_of(model, dataset, config.camera, horizon)
        sample = take_sample(own, [own.index_of(*place) for place in places], actions=True)
        placed = model.to(pick_device(config.device)).eval()
        figures[name] = probe(placed, sample, seed=config.seed, motions=config.motion)
        model.cpu()
    apart = dict(zip(figures, horizons, strict=True))
    context = {"config": configs.to_dict(config), **versions_and_hardware()}
    result = {"models": figures, "horizon_seconds": apart, "trained_on_these_clips": drawn.seen, **context}
    write_json(out / "compare.json", result)
    print_results(result, table_of(figures, f"latent action models on {dataset.name}"), as_json=config.json)
    probes = [shlex.join(["lapa", "latent", "probe", str(lam), "--data", str(config.data)]) for lam in config.lams]
    finish("compare.json", out, probes)


def _check(config: MeasureConfig) -> None:
    if config.num_pairs < 1:
        raise UserError("--num-pairs must be at least 1")
    if config.motion:
        require_opencv()


def pairs_of(model: LatentActionModel, dataset: Dataset, camera: str | None, horizon: float) -> FramePairs:
    """All pairs of a dataset at this horizon, at the model's image size, with middle frames if the horizon has any.

    Nothing is cached: few of the pairs are read, each once.
    """
    middle = horizon_frames(horizon, dataset.fps) >= 2
    size = model.config.image_size
    config = PairsConfig(size=size, horizon=horizon, camera=camera, held_out=0.0, cache_gib=0.0, middle=middle)
    return FramePairs([dataset], config, split="all")


def kept_from_training(model: LatentActionModel, dataset: Dataset) -> np.ndarray | None:
    """The episodes of a dataset that a model was not trained on; None where its config.json does not list the dataset.

    Raises UserError where config.json is damaged.
    """
    notes, every = model.notes, np.arange(len(dataset))
    fingerprints, known = notes.get("dataset_fingerprints", []), notes.get(DATASETS, {})
    if not isinstance(fingerprints, list) or not isinstance(known, dict):
        raise UserError(f"{CONFIG} of the model: dataset_fingerprints or {DATASETS} is damaged; copy it again")
    try:
        if dataset.fingerprint in fingerprints:
            return np.setdiff1d(every, episodes_of_training(recorded_split(notes), dataset.fingerprint, len(dataset)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{CONFIG} of the model: held_out or loop.seed is damaged ({type(error).__name__}: {error}); copy it again"
        ) from None
    # Without a record of the split, any episode may have been trained on.
    return every[:0] if dataset.fingerprint in known else None


@dataclass(frozen=True)
class Draw:
    """Pairs to measure models on. indices: of the pairs. unseen: the number of episodes that they are drawn from; None
    where no model was trained on the dataset. seen: whether the pairs are of episodes that some model was trained on.
    """

    indices: list[int]
    unseen: int | None
    seen: bool


def draw_unseen(models: Sequence[LatentActionModel], pairs: FramePairs, num: int, seed: int) -> Draw:
    """Up to `num` pairs of one dataset, of the episodes that no model was trained on; of all where there are none."""
    found = [kept_from_training(model, pairs.datasets[0]) for model in models]
    kept = [episodes for episodes in found if episodes is not None]
    if not kept:
        return Draw(drawn_pairs(pairs, num, seed), None, seen=False)
    unseen = reduce(np.intersect1d, kept)
    drawn = drawn_pairs(pairs, num, seed, unseen.tolist())
    return Draw(drawn or drawn_pairs(pairs, num, seed), len(unseen), seen=not drawn)


def probe(
    model: LatentActionModel,
    sample: Sample,
    encoded: LatentAction | None = None,
    seed: int = 0,
    *,
    motions: bool = False,
) -> dict[str, Any]:
    """All figures of a model on a sample; those of codes, pixels or true actions only if there are any.

    motions: also regressions to the visible motion, which takes OpenCV (lapa.latent.motion).
    """
    encoded = encoded or encode(model, sample.frames_BTCHW)
    codebook_size = model.config.codebook_size
    codes_BL, errors = reconstruction_figures(model, sample, encoded)
    space = "pixels" if model.predicts_pixels else "features"
    figures: dict[str, Any] = {"num_pairs": len(sample.episodes_B), "space": space, "reconstruction": errors}
    fits = len(set(sample.episodes_B.tolist())) > 1
    if codes_BL is not None:
        figures["usage"] = usage_figures(codes_BL, codebook_size)
    if model.predicts_pixels:
        figures["transfer"], returned = transfer(model, sample, encoded)
        if sample.actions_BA is not None and fits:
            figures["transfer"]["action_r2"] = returned_action_r2(sample, encoded, returned, seed)
    figures["consistency"] = consistency_figures(model, sample, encoded)
    if sample.actions_BA is not None and fits:
        figures["action"] = regression_figures(sample.actions_BA, sample, encoded, codebook_size, seed)
    if motions and not fits:
        warn("the motion is not measured: its regressions need pairs of two episodes or more")
    elif motions:
        targets = motion(sample.with_middle())
        figures["motion"] = {
            name: regression_figures(targets_BM, sample, encoded, codebook_size, seed)
            for name, targets_BM in targets.items()
        }
    if sample.actions_BA is not None and codes_BL is not None:
        figures["information"] = information_figures(codes_BL, sample.actions_BA, seed)
    if sample.tasks_B is not None and (tasks := task_figures(sample, encoded, codebook_size, seed)) is not None:
        figures["task"] = tasks
    return figures


def table_of(columns: dict[str, dict[str, Any]], title: str) -> Table:
    """The main figures, one column per model; empty rows are left out."""
    table = Table("figure", *columns, "read it as", title=title)
    for row in ROWS:
        values = [row.value(figures) for figures in columns.values()]
        if any(values):
            table.add_row(row.name, *values, row.reading)
    return table


def _look_up(figures: dict[str, Any], path: str) -> float | str | None:
    """The number at a dotted path; "" if there is none."""
    value: Any = figures
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            return ""
        value = value[name]
    return value
