"""Opens whatever `--data` names: a dataset folder, here or on a store, or another source in place."""

from __future__ import annotations

import importlib
from pathlib import Path

from lapa.data.dataset import Dataset
from lapa.data.lerobot import LeRobotDataset
from lapa.data.source import Reading
from lapa.data.spec import DataSpec, typed, typed_options
from lapa.errors import UserError
from lapa.files import as_path

# Source -> the module and the dataclass of its reading options. `lapa data SOURCE` converts from the same.
SOURCES = {
    "rlds": ("lapa.sources.rlds.source", "RldsReading"),
    "videos": ("lapa.sources.videos", "VideosReading"),
    "frames": ("lapa.sources.frames", "FramesReading"),
    "sthv2": ("lapa.sources.sthv2", "Sthv2Reading"),
    "narrated": ("lapa.sources.narrated", "NarratedReading"),
    "lerobot": ("lapa.sources.lerobot", "LeRobotReading"),
    "lapa-jsonl": ("lapa.sources.lapa_jsonl", "LapaJsonlReading"),
}


def open_dataset(data: Path | str) -> Dataset:
    """The dataset that a path or a spec names. UserError naming what is wrong with it, and the mend."""
    spec = DataSpec.parse(str(data), SOURCES)
    options = dict(spec.options)
    horizon = options.pop("horizon", None)
    if spec.source is None:
        if options:
            raise UserError(f"--data {data}: a dataset folder has no option {', '.join(options)}, only horizon")
        dataset: Dataset = LeRobotDataset(as_path(spec.path), spec.name)
    else:
        module, reading = SOURCES[spec.source]
        kind: type[Reading] = getattr(importlib.import_module(module), reading)
        dataset = open_source(typed_options(kind, spec.path, options, f"{spec.source}:{spec.path}"), spec.name)
    if horizon is not None:
        dataset.horizon = typed(float, horizon, f"--data {data}: horizon")
        if not 0 < dataset.horizon < float("inf"):
            raise UserError(f"--data {data}: the horizon must be above 0 seconds, got {horizon}")
    dataset.weight = 1.0 if spec.weight is None else spec.weight
    return dataset


def open_source(reading: Reading, name: str | None = None) -> Dataset:
    """A source as a dataset, in place."""
    return reading.open().dataset(name)
