"""What `--data` may say: a dataset, where it is, how it is read and how often it is drawn.

    data/clips                                     a dataset folder
    s3://bucket/clips                              the same, elsewhere (fsspec)
    bridge=data/bridge:0.5                         by a name of its own, drawn half as often
    rlds:bridge_dataset/1.0.0,camera=image_0       another source, in place, with options of its own
    ego=narrated:videos,horizon=2.4:1.0            frame pairs 2.4 s apart

`[NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]`. A path that exists as it is written is taken as that path.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lapa.config import typed
from lapa.data.dataset import Dataset
from lapa.data.lerobot import LeRobotDataset
from lapa.data.source import Reading
from lapa.errors import UserError, unknown
from lapa.files import as_path

NAME = re.compile(r"([A-Za-z0-9][\w.-]*)=(?=.)")
WEIGHT = re.compile(r":([0-9.]+(?:e-?[0-9]+)?)$")
OPTION = re.compile(r",([a-z][a-z_-]*)=([^,]*)$")

Options = TypeVar("Options")


@dataclass(frozen=True)
class DataSpec:
    """One dataset of a command. source: None for a dataset folder; weight: None where none is given."""

    path: str
    source: str | None = None
    name: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    weight: float | None = None

    @classmethod
    def parse(cls, text: str, sources: Collection[str]) -> DataSpec:
        """UserError, with the form that is expected, where `text` cannot be read so."""
        text = str(text)
        if _exists(text):
            return cls(text)
        rest, name, weight = text, None, None
        if match := NAME.match(rest):
            name, rest = match[1], rest[match.end() :]
        if not _exists(rest) and (match := WEIGHT.search(rest)):
            weight, rest = _weight(match[1], text), rest[: match.start()]
        # The last first: a path may hold commas and colons, and is one as soon as it is there.
        options: dict[str, str] = {}
        source, _, after = rest.partition(":")
        known = source in sources and not after.startswith("//")
        rest = after if known else rest
        while not _exists(rest) and (match := OPTION.search(rest)):
            options = {match[1].replace("-", "_"): match[2], **options}
            rest = rest[: match.start()]
        if not known:
            if re.fullmatch(r"[a-z][a-z0-9-]+:(?!//).+", rest) and not _exists(rest):
                raise UserError(f"--data {text}: {unknown('source', source, sources)}")
            source = ""
        if not rest:
            raise UserError(f"--data {text}: names no path; expected [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]")
        return cls(rest, source or None, name, options, weight)


def typed_options(cls: type[Options], path: str, options: Mapping[str, str], source: str) -> Options:
    """A dataclass of reading options from the texts of a spec; its first field takes the path.

    UserError for an option that it does not have, or a value that is none of its type.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    known = [item.name for item in fields[1:]]
    for key in options:
        if key not in known:
            raise unknown(f"option of {source}", key, known)
    values = {key: typed(hints[key], value, f"{source},{key}={value}", text=True) for key, value in options.items()}
    return cls(**{fields[0].name: typed(hints[fields[0].name], path, source, text=True), **values})


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    # A spec may be longer than any name of a file.
    except OSError:
        return False


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        raise UserError(f"--data {text}: {number!r} is no weight") from None
    if not math.isfinite(weight) or weight <= 0:
        raise UserError(f"--data {text}: a weight must be above 0; leave the dataset out instead")
    return weight


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
        dataset.horizon = typed(float, horizon, f"--data {data}: horizon", text=True)
        if not 0 < dataset.horizon < float("inf"):
            raise UserError(f"--data {data}: the horizon must be above 0 seconds, got {horizon}")
    dataset.weight = 1.0 if spec.weight is None else spec.weight
    return dataset


def open_source(reading: Reading, name: str | None = None) -> Dataset:
    """A source as a dataset, in place."""
    return reading.open().dataset(name)
