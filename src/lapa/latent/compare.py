"""Several latent action models measured side by side, on the same pairs.

lapa latent compare LAM1 LAM2 ... --data DATASET

Each model sees the pairs at its own image size and its own horizon on this dataset (`--data PATH,horizon=SECONDS`: all
at that one): the first frames are the same for all of them. The figures
are those of `lapa latent probe` (docs/metrics.md).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from lapa import config as configs
from lapa.console import console, finish, say
from lapa.data.spec import open_dataset
from lapa.engine.distributed import pick_device
from lapa.engine.metrics import versions_and_hardware
from lapa.errors import UserError
from lapa.files import claim_output, write_json
from lapa.latent.metrics import take_sample
from lapa.latent.model import LatentActionModel, horizon_for
from lapa.latent.probe import NUM_PAIRS, pairs_of, probe, table_of


@dataclass(frozen=True)
class CompareConfig:
    """Measure several latent action models on the same pairs of a dataset."""

    lams: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the latent action models, or their ids on the hub."""
    data: str
    """Dataset to measure on. docs/1-data.md has the form: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]."""
    out: Path | None = None
    """Folder of compare.json; by default compare_DATASET here."""
    num_pairs: int = NUM_PAIRS
    """Pairs drawn from the dataset."""
    camera: str | None = None
    """Which camera's pictures; by default the dataset's first."""
    seed: int = 0
    """Draws the pairs, the held-out episodes and the start of the MLPs."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace what `out` holds."""


def run(config: CompareConfig) -> None:
    """`lapa latent compare`. Raises UserError on bad input."""
    if len(set(config.lams)) < max(2, len(config.lams)):
        raise UserError("give two or more different latent action models to compare, as LAM1 LAM2")
    if config.num_pairs < 1:
        raise UserError("--num-pairs must be at least 1")
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
    drawn = np.random.default_rng(config.seed).permutation(len(pairs))[: config.num_pairs]
    places = [pairs.location(int(index)) for index in drawn]
    figures: dict[str, dict[str, Any]] = {}
    for name, model, horizon in zip(short_names(config.lams), models, horizons, strict=True):
        say(f"{name}: {len(places)} pairs, {horizon:g} s apart, of {dataset.name}")
        own = pairs_of(model, dataset, config.camera, horizon)
        sample = take_sample(own, [own.index_of(*place) for place in places], actions=True)
        figures[name] = probe(model.to(pick_device(config.device)).eval(), sample, seed=config.seed)
        model.cpu()
    console.print(table_of(figures, f"latent action models on {dataset.name}"))
    apart = dict(zip(figures, horizons, strict=True))
    result = {"models": figures, "horizon_seconds": apart, "config": configs.to_dict(config), **versions_and_hardware()}
    write_json(out / "compare.json", result)
    probes = [shlex.join(["lapa", "latent", "probe", str(lam), "--data", str(config.data)]) for lam in config.lams]
    finish("compare.json", out, probes)


def short_names(lams: tuple[Path, ...]) -> list[str]:
    """The last part of each path, or the whole of it where two end alike."""
    names = [lam.name for lam in lams]
    return names if len(set(names)) == len(names) else [str(lam) for lam in lams]
