"""Form of `--data` and `lapa.open_dataset`: a dataset, where it is, how it is read and how often it is drawn.

    data/clips                                     a dataset folder
    s3://bucket/clips                              the same, elsewhere (fsspec)
    lerobot/pusht@main                             on the hub, as lerobot:lerobot/pusht@main; @REVISION may be left out
    bridge=data/bridge:0.5                         by a name of its own, drawn half as often
    rlds:bridge_dataset/1.0.0,camera=image_0       another source, in place, with options of its own
    ego=narrated:videos,horizon=2.4:1.0            frame pairs 2.4 s apart

`[NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]`. A path that exists as it is written is taken as that path.

Other distributions add sources by entry points of the group `lapa.sources`: NAME = "package.module:Reading", where
Reading is a dataclass of reading options (lapa.data.source).
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TypeVar

from lapa.config import typed
from lapa.data.dataset import Dataset
from lapa.data.lerobot import LeRobotDataset
from lapa.errors import UserError, unknown
from lapa.files import as_path
from lapa.hub.download import as_hub_id

ENTRY_POINTS = "lapa.sources"
# Source -> its reading options. `lapa data SOURCE` converts from the same.
SOURCES = {
    "rlds": "lapa.sources.rlds.source:RldsReading",
    "videos": "lapa.sources.videos:VideosReading",
    "webdataset": "lapa.sources.webdataset:WebDatasetReading",
    "frames": "lapa.sources.frames:FramesReading",
    "sthv2": "lapa.sources.sthv2:Sthv2Reading",
    "narrated": "lapa.sources.narrated:NarratedReading",
    "lerobot": "lapa.sources.lerobot:LeRobotReading",
    "lapa-jsonl": "lapa.sources.lapa_jsonl:LapaJsonlReading",
}
# The source that reads a dataset by its id on the hub.
HUB_SOURCE = "lerobot"
NAME = re.compile(r"([A-Za-z0-9][\w.-]*)=(?=.)")
WEIGHT = re.compile(r":([0-9.]+(?:e-?[0-9]+)?)$")
OPTION = re.compile(r",([a-z][a-z_-]*)=([^,]*)$")

Options = TypeVar("Options")


def open_dataset(data: Path | str) -> Dataset:
    """Opens a dataset folder (LeRobotDataset v3.0 or v2.1), one of the hub by its id, or any source by a spec.

    The form is `[NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]`.
    Raises UserError naming the file, what is wrong with it, and how to fix it.
    """
    sources = known_sources()
    spec = DataSpec.parse(str(data), sources)
    if spec.source is None and as_hub_id(spec.path) is not None:
        spec = dataclasses.replace(spec, source=HUB_SOURCE)
    options = dict(spec.options)
    horizon = options.pop("horizon", None)
    dataset: Dataset
    if spec.source is None:
        if options:
            raise UserError(f"--data {data}: a dataset folder has no option {', '.join(options)}, only horizon")
        dataset = LeRobotDataset(as_path(spec.path), spec.name)
    else:
        reading = typed_options(sources[spec.source].load(), spec.path, options, f"{spec.source}:{spec.path}")
        dataset = reading.open().dataset(spec.name)
    if horizon is not None:
        dataset.horizon = typed(float, horizon, f"--data {data}: horizon", text=True)
        if not 0 < dataset.horizon < float("inf"):
            raise UserError(f"--data {data}: the horizon must be above 0 seconds, got {horizon}")
    dataset.weight = 1.0 if spec.weight is None else spec.weight
    return dataset


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
        """Parses a spec. Raises UserError with the expected form."""
        if _exists(text):
            return cls(text)
        rest, name, weight = text, None, None
        if match := NAME.match(rest):
            name, rest = match[1], rest[match.end() :]
        if not _exists(rest) and (match := WEIGHT.search(rest)):
            weight, rest = _weight(match[1], text), rest[: match.start()]
        source, _, after = rest.partition(":")
        known = source in sources and not after.startswith("//")
        rest = after if known else rest
        # From the last option on: a path may hold commas and colons, and ends where it exists.
        options: dict[str, str] = {}
        while not _exists(rest) and (match := OPTION.search(rest)):
            options = {match[1].replace("-", "_"): match[2], **options}
            rest = rest[: match.start()]
        if not known and re.fullmatch(r"[a-z][a-z0-9-]+:(?!//).+", rest) and not _exists(rest):
            raise UserError(f"--data {text}: {unknown('source', source, sources)}")
        if not rest:
            raise UserError(f"--data {text}: names no path; expected [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]")
        return cls(rest, source if known else None, name, options, weight)


def typed_options(cls: type[Options], path: str, options: Mapping[str, str], source: str) -> Options:
    """Returns a dataclass of reading options from the texts of a spec; its first field takes the path.

    Raises UserError for an option that it does not have, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    first, *known = (item.name for item in dataclasses.fields(cls))  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            raise unknown(f"option of {source}", key, known)
    values = {key: typed(hints[key], value, f"{source},{key}={value}", text=True) for key, value in options.items()}
    return cls(**{first: typed(hints[first], path, source, text=True), **values})


def known_sources() -> dict[str, EntryPoint]:
    """Returns all sources by name: those of this package, and those that other distributions bring."""
    ours = [EntryPoint(name, value, ENTRY_POINTS) for name, value in SOURCES.items()]
    return {entry.name: entry for entry in [*entry_points(group=ENTRY_POINTS), *ours]}


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    # A spec may be longer than any name of a file, or hold a character that no name may.
    except (OSError, ValueError):
        return False


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        raise UserError(f"--data {text}: {number!r} is not a weight; expected a number such as 0.5") from None
    if not math.isfinite(weight) or weight <= 0:
        raise UserError(f"--data {text}: a weight must be above 0; leave the dataset out instead")
    return weight
