"""Stage 1: trains a latent action model on frame pairs of action-free video (LAPA, https://arxiv.org/abs/2410.11758).

lapa latent train --preset tiny --data DATASET --out LAM
torchrun --nproc-per-node 8 -m lapa latent train --preset paper --data A B C --out LAM

Axes: B batch, T time, C channel, H W image, L latent action length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from torch import nn

from lapa import config as configs
from lapa.console import finish, is_main_process, say, warn
from lapa.data.dataset import Dataset
from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs
from lapa.engine.checkpoint import seed_everything
from lapa.engine.loop import LoopConfig, train
from lapa.engine.metrics import versions_and_hardware
from lapa.files import claim_output, write_json
from lapa.latent.model import CONFIG, LatentActionModel, LatentModelConfig
from lapa.latent.probe import Sample, draw_sample, reconstruction_figures, usage_figures

INITIALISATION_PAIRS = 256
EVALUATION_PAIRS = 512


@dataclass(frozen=True)
class LatentTrainConfig:
    """Train a latent action model on one or more datasets. No actions are needed."""

    data: tuple[Path, ...]
    """Datasets to learn from."""
    out: Path
    """Folder of the latent action model to write."""
    preset: str = "tiny"
    """debug, tiny, base or paper: the values that the other options start from."""
    model: Annotated[LatentModelConfig, tyro.conf.arg(name="")] = field(default_factory=LatentModelConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    camera: str | None = None
    """Which camera's pictures; by default each dataset's first."""
    held_out: float = 0.1
    """Share of the episodes kept for evaluation."""
    cache_gib: float = 4.0
    """Decoded frames are kept in memory where they fit into this much; training and held-out episodes each."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with the run that `out` holds."""


def run(config: LatentTrainConfig) -> None:
    """`lapa latent train`. Raises ValueError on bad input, FloatingPointError on a loss that is not finite."""
    if config.resume and (config.out / CONFIG).exists():
        finish("latent action model, already complete", config.out, _next_commands(config))
        return
    datasets = [Dataset.open(path) for path in config.data]
    if is_main_process():
        complete = (config.out / CONFIG).exists()
        claim_output(
            config.out, complete=complete, overwrite=config.overwrite, resume=config.resume, inputs=config.data
        )
    pairs = pairs_config(config)
    training = FramePairs(datasets, pairs, split="train", seed=config.loop.seed)
    held_out = FramePairs(datasets, pairs, split="held_out", seed=config.loop.seed)
    evaluation = draw_sample(held_out, EVALUATION_PAIRS, seed=config.loop.seed)
    seed_everything(config.loop.seed)
    model = LatentActionModel(config.model)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, LatentActionModel)
        return evaluation_figures(model, evaluation)

    def prepare(model: nn.Module) -> None:
        assert isinstance(model, LatentActionModel)
        first = draw_sample(training, INITIALISATION_PAIRS, seed=config.loop.seed)
        model.initialise(first.frames_BTCHW.to(next(model.parameters()).device))

    result = train(
        model,
        training,
        collate_pairs,
        config.loop,
        config.out,
        run_config={
            **configs.to_dict(config),
            "dataset_fingerprints": [dataset.fingerprint for dataset in datasets],
        },
        description="latent action model",
        resume=config.resume,
        prepare=prepare,
        evaluate=evaluate,
    )
    if result.finished and is_main_process():
        warn_of_collapse(result.metrics, config.model)
        write_json(config.out / "metrics.json", {**result.metrics, **versions_and_hardware()})
        model.save_pretrained(config.out, configs.to_dict(config))
        finish("latent action model", config.out, _next_commands(config))


def pairs_config(config: LatentTrainConfig) -> PairsConfig:
    """Pairs as the model wants them: its image size and its horizon."""
    return PairsConfig(
        size=config.model.image_size,
        horizon=config.model.horizon_seconds,
        camera=config.camera,
        held_out=config.held_out,
        cache_gib=config.cache_gib,
    )


def evaluation_figures(model: LatentActionModel, sample: Sample) -> dict[str, float]:
    """What is watched while training: reconstruction against its baselines, and how the codebook is used."""
    codes_BL, errors = reconstruction_figures(model, sample)
    usage = usage_figures(codes_BL, model.config.codebook_size)
    return {**errors, **{name: value for name, value in usage.items() if isinstance(value, float)}}


def warn_of_collapse(figures: dict[str, float], model: LatentModelConfig) -> None:
    """Says so where the codes are few, or where the decoder does not read them, and what to try."""
    say(
        f"held-out pairs: reconstruction {figures['mse']:.5f}, copying the first frame {figures['mse_copy']:.5f}, "
        f"shuffled codes {figures['mse_shuffled']:.5f}; {figures['codes_used']:.0%} of the codes used, "
        f"perplexity {figures['perplexity']:.1f}"
    )
    steady = {
        "--quantizer fsq": model.quantizer == "fsq",
        "--standardize-z": model.standardize_z,
        "--predict change": model.predict == "change",
        "--action-input attend_and_add": model.action_input == "attend_and_add",
    }
    untried = [option for option, given in steady.items() if not given]
    advice = f"try {' '.join(untried)}" if untried else "train for longer, or on more videos"
    if figures["joint_codes_used"] <= 1:
        warn(f"the codebook has collapsed: every pair has the same latent action; {advice}")
    elif figures["mse_shuffled"] < 1.05 * figures["mse"]:
        warn(f"on held-out episodes, the codes of another pair reconstruct as well as the right ones; {advice}")


def _next_commands(config: LatentTrainConfig) -> list[str]:
    return [
        f"lapa latent probe {config.out} --data {config.data[0]}",
        f"lapa label --lam {config.out} --data {config.data[0]}",
    ]
