"""Stage 1: trains a latent action model on frame pairs of action-free video (LAPA, https://arxiv.org/abs/2410.11758).

lapa latent train --preset tiny --data DATASET --out LAM
lapa latent train --data bridge=A:1.0 --data ego=narrated:B,narrations=N.csv,horizon=2.4:0.5 --mix-by equal --out LAM
torchrun --nproc-per-node 8 -m lapa latent train --preset paper --data A B C --out LAM

Axes: B batch, T time, C channel, H W image, L latent action length.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from lapa import config as configs
from lapa.console import finish, is_main_process, print_results, warn
from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs
from lapa.data.spec import open_dataset
from lapa.engine.checkpoint import already_trained, seed_everything
from lapa.engine.loop import train
from lapa.engine.memory import built
from lapa.engine.metrics import read_figures, versions_and_hardware
from lapa.files import claim_output, write_json
from lapa.latent.config import LatentModelConfig, LatentTrainConfig
from lapa.latent.metrics import Sample, draw_sample, encode, reconstruction_figures, usage_figures
from lapa.latent.model import CONFIG, DATASETS, HORIZON, LatentActionModel, load_tower
from lapa.latent.show import probe_sheet
from lapa.locks import locks_output
from lapa.store_cache import use_store_cache
from lapa.verdicts import SMALLEST_ERROR, THRESHOLDS, Verdict, judge, of_latent_actions, perplexity_name, suggested

INITIALISATION_PAIRS = 256
EVALUATION_PAIRS = 512
METRICS = "metrics.json"
# In it: figures that are always there, and beginnings of the names of all that are reported.
MEASURED = dict.fromkeys(("mse", "mse_copy", "mse_shuffled"), float)
JUDGED = ("mse", "codes_used", "perplexity")
# Episodes that the figures are of; 0: none was kept from training, and they are of the training episodes.
NUM_HELD_OUT = "num_held_out_episodes"
# Error with another pair's latent action, over that with the right one, from which the decoder reads it.
READ = 1.2


@locks_output
def run(config: LatentTrainConfig) -> None:
    """`lapa latent train`. Raises UserError on bad input, FloatingPointError on a loss that is not finite."""
    complete = (config.out / CONFIG).exists()
    use_store_cache(config.loop.store_cache, config.loop.store_cache_gib)
    datasets = [open_dataset(path) for path in config.data]
    fingerprints = {"dataset_fingerprints": [dataset.fingerprint for dataset in datasets]}
    if config.resume and complete:
        now = {**configs.to_dict(config), **fingerprints}
        # Follows from the datasets and options.
        del now["model"]["action_dim"]
        if already_trained(config.out / CONFIG, now, key=None):
            figures = read_figures(config.out / METRICS, *JUDGED, **MEASURED)
            _conclude(config, figures, "already complete", datasets[0].in_place)
            return
    if is_main_process():
        claim_output(
            config.out,
            complete=complete,
            overwrite=config.overwrite,
            resume=config.resume,
            inputs=[dataset.root for dataset in datasets],
        )
    pairs = pairs_config(config)
    training = FramePairs(datasets, pairs, split="train", seed=config.loop.seed)
    training.mixture.report(config.loop.steps * config.loop.batch_size)
    plain = replace(pairs, action_share=0.0)
    held_out = FramePairs(datasets, plain, split="held_out", seed=config.loop.seed)
    evaluation = draw_sample(held_out, EVALUATION_PAIRS, seed=config.loop.seed)
    config = replace(config, model=replace(config.model, action_dim=training.action_dim))
    seed_everything(config.loop.seed)
    tower = load_tower(config.model.vision_tower, config.model) if config.model.vision_tower is not None else None
    model, watch = built(lambda: LatentActionModel(config.model, tower)), CollapseWatch(config.model)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, LatentActionModel)
        figures = evaluation_figures(model, evaluation)
        watch.look(figures)
        return figures

    def draw(model: nn.Module) -> dict[str, Image.Image]:
        assert isinstance(model, LatentActionModel)
        encoded = encode(model, evaluation.frames_BTCHW)
        horizon = held_out.horizons[0] if len(set(held_out.horizons)) == 1 else None
        return {"predictions": probe_sheet(model, evaluation, encoded, horizon)}

    def prepare(model: nn.Module) -> None:
        assert isinstance(model, LatentActionModel)
        first = draw_sample(training, INITIALISATION_PAIRS, seed=config.loop.seed)
        model.initialise(first.frames_BTCHW.to(next(model.parameters()).device))
        if config.model.action_dim:
            model.standardise_actions(training.known_actions())

    result = train(
        model,
        training,
        collate_pairs,
        config.loop,
        config.out,
        run_config={**configs.to_dict(config), **fingerprints},
        description="latent action model",
        resume=config.resume,
        prepare=prepare,
        evaluate=evaluate,
        draw=draw,
        summary=lambda figures: summary({**figures, NUM_HELD_OUT: held_out.num_held_out}),
    )
    if result.finished and is_main_process():
        figures = {**result.metrics, NUM_HELD_OUT: held_out.num_held_out}
        write_json(config.out / METRICS, {**figures, **versions_and_hardware()})
        model.save_pretrained(config.out, {**configs.to_dict(config), **fingerprints, **learned_from(training)})
        _conclude(config, figures, "", datasets[0].in_place)


def pairs_config(config: LatentTrainConfig) -> PairsConfig:
    """Pairs of the model's image size and horizon."""
    return PairsConfig(
        size=config.model.image_size,
        horizon=config.model.horizon_seconds,
        camera=config.camera,
        held_out=config.held_out,
        cache_gib=config.cache_gib,
        action_share=config.action_share,
        mix_by=config.mix_by,
        min_motion=config.min_motion,
    )


def learned_from(pairs: FramePairs) -> dict[str, Any]:
    """Name and horizon of each dataset, by fingerprint, for config.json; `lapa.latent.model.horizon_for` reads it.

    The horizon is null if one dataset was used with several.
    """
    noted: dict[str, dict[str, Any]] = {}
    for dataset, seconds in zip(pairs.datasets, pairs.horizons, strict=True):
        before = noted.get(dataset.fingerprint, {HORIZON: seconds})[HORIZON]
        noted[dataset.fingerprint] = {"name": dataset.name, HORIZON: seconds if before == seconds else None}
    return {DATASETS: noted}


def evaluation_figures(model: LatentActionModel, sample: Sample) -> dict[str, float]:
    """Figures while training: reconstruction against its baselines, and usage of the codebook."""
    codes_BL, figures = reconstruction_figures(model, sample)
    if codes_BL is not None:
        usage = usage_figures(codes_BL, model.config.codebook_size)
        figures |= {name: value for name, value in usage.items() if isinstance(value, float)}
    return figures


class CollapseWatch:
    """Warns of a collapsing codebook and of a decoder that no longer reads the latent action, with options to try.

    Each warning is printed once per process.
    """

    def __init__(self, model: LatentModelConfig):
        self._widest_gap = 0.0
        self._warned: set[str] = set()
        self._advice = advice(model)
        self._least_perplexity = THRESHOLDS[perplexity_name(model.codebook_size)].bad

    def look(self, figures: Mapping[str, float]) -> None:
        """Called after each evaluation. A decoder that does not read codes yet is not warned of."""
        gap = figures["mse_shuffled"] / max(figures["mse"], SMALLEST_ERROR)
        self._widest_gap = max(self._widest_gap, gap)
        least = self._least_perplexity
        if figures.get("joint_codes_used", 2.0) <= 1:
            self._warn("the codebook has collapsed: every pair has the same latent action")
        elif figures.get("perplexity", least) < least:
            self._warn(f"the codebook is collapsing: perplexity {figures['perplexity']:.2f} a position")
        elif self._widest_gap > READ and gap < THRESHOLDS["shuffled_over_own"].bad:
            self._warn("the decoder has stopped reading the latent action: another pair's gives the same error")

    def _warn(self, sign: str) -> None:
        if sign.split(":")[0] not in self._warned:
            self._warned.add(sign.split(":")[0])
            warn(f"{sign}; {self._advice}")


def advice(model: LatentModelConfig) -> str:
    """What to try where a model is not good: the options of the default recipe that it lacks, then augmentation."""
    return f"try {', '.join([*untried(model), 'more videos'])}"


def untried(model: LatentModelConfig) -> list[str]:
    """Options against collapse and overfitting that a model was not trained with."""
    given = {
        "--quantizer fsq": model.quantizer in ("fsq", "continuous"),
        "--standardize-z": model.standardize_z,
        "--no-patch-norm": not model.patch_norm,
        "--predict change": model.predict == "change",
        "--action-input attend_and_add": model.action_input == "attend_and_add",
        "--augment": model.augment,
    }
    return [option for option, tried in given.items() if not tried]


def summary(figures: Mapping[str, float]) -> str:
    """The main figures as a line: of the validation split, or of the training episodes where it is empty."""
    split, usage = "validation split" if figures.get(NUM_HELD_OUT, 1) else "training episodes", ""
    if "codes_used" in figures:
        usage = f"; {figures['codes_used']:.0%} of the codes used, perplexity {figures['perplexity']:.1f}"
    return (
        f"{split}: error {figures['mse']:.5f}, copying the first frame {figures['mse_copy']:.5f}, "
        f"another pair's latent action {figures['mse_shuffled']:.5f}{usage}"
    )


def verdict_of(figures: Mapping[str, Any], model: LatentModelConfig) -> Verdict:
    """The verdict on the figures of a probe, with what to try where it is not good."""
    return judge(of_latent_actions(figures, model.codebook_size)).advised(advice(model))


def _conclude(config: LatentTrainConfig, metrics: Mapping[str, Any], note: str, in_place: bool) -> None:
    """Reports the figures of the validation split and the verdict on them, and suggests what fits it.

    in_place: whether the first dataset is read where it lies.
    """
    verdict = verdict_of({"reconstruction": metrics, "usage": metrics}, config.model)
    if not metrics.get(NUM_HELD_OUT, 1):
        verdict = verdict.at_best_doubtful("no episode was kept from training")
    print_results({**metrics, "verdict": verdict.as_json()}, summary(metrics), str(verdict), as_json=config.json)
    name = f"latent action model{', ' if note else ''}{note}"
    data = str(config.data[0])
    probe = shlex.join(["lapa", "latent", "probe", str(config.out), "--data", data])
    finish(name, config.out, [probe, *suggestions(config.out, data, config.model, verdict, in_place)])


def suggestions(lam: Path, data: str, model: LatentModelConfig, verdict: Verdict, in_place: bool) -> list[str]:
    """The commands that fit the verdict on a model: labelling with its codes, and a look at its predicted pixels.

    in_place: whether the dataset is read where it lies, so that labels need a folder of their own.
    """
    label = ["lapa", "label", "--lam", str(lam), "--data", data, *(["--out", "LABELS"] * in_place)]
    look = ["lapa", "view", str(lam), "--data", data]
    return suggested(
        verdict, [] if model.quantizer == "continuous" else label, [] if model.targets == "features" else look
    )
