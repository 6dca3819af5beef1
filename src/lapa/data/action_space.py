"""What a dataset declares of its actions: names, which dimensions are binary, delta or absolute control.

The names are those of the `action` feature in meta/info.json. The rest is in meta/lapa.json, which LeRobot does not
read and the dataset's fingerprint does not cover: it may be written by hand at any time, and labels stay valid.

    {"action_space": {"binary": ["gripper"], "control": "delta"}}

A binary dimension is a switch, such as a gripper that opens or shuts. It has two values, and a policy says exactly
one of them. `delta` control moves by the action, `absolute` control moves to it.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lapa.errors import UserError, unknown

if TYPE_CHECKING:
    from lapa.data.dataset import Dataset

Control = Literal["delta", "absolute"]
CONTROLS = typing.get_args(Control)
KEY = "action_space"


@dataclass(frozen=True)
class ActionSpace:
    """What the numbers of an action are. control: None where it is not declared."""

    names: tuple[str, ...]
    binary: tuple[bool, ...]
    control: Control | None = None

    def __post_init__(self) -> None:
        if len(self.names) != len(self.binary):
            raise UserError(f"{len(self.names)} action names and {len(self.binary)} flags of binary dimensions")
        if self.control not in (*CONTROLS, None):
            raise unknown("control", str(self.control), CONTROLS)

    @property
    def action_dim(self) -> int:
        return len(self.names)

    @classmethod
    def named(cls, names: Sequence[str], binary: Sequence[str] = (), control: Control | None = None) -> ActionSpace:
        """binary: the names of the binary dimensions. UserError for a name that is not there."""
        for name in binary:
            if name not in names:
                raise unknown("binary action dimension", str(name), names)
        return cls(tuple(names), tuple(name in binary for name in names), control)

    def declared(self) -> dict[str, Any]:
        """What meta/lapa.json says of it; nothing where nothing is declared beyond the names."""
        binary = [name for name, switch in zip(self.names, self.binary, strict=True) if switch]
        return {KEY: {"binary": binary, "control": self.control}} if binary or self.control else {}


def read_action_space(feature: Mapping[str, Any], extra: Mapping[str, Any], source: str) -> ActionSpace:
    """The action space of a dataset, given its `action` feature and what meta/lapa.json (`source`) holds.

    Raises UserError naming `source` where what it declares does not fit the feature.
    """
    names = _names(feature)
    declared = extra.get(KEY, {})
    if not isinstance(declared, Mapping) or not set(declared) <= {"binary", "control"}:
        raise UserError(f'{source}: {KEY} must be like {{"binary": ["gripper"], "control": "delta"}}, got {declared}')
    binary = declared.get("binary") or []
    if not isinstance(binary, list):
        raise UserError(f"{source}: `binary` must be a list of names of action dimensions, got {binary!r}")
    try:
        return ActionSpace.named(names, binary, declared.get("control"))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def common_action_space(datasets: Sequence[Dataset]) -> ActionSpace:
    """The action space of datasets that are to be learned together; the names are the first's.

    Raises UserError where one has no actions, or they differ in the number of dimensions, in which of them are
    binary, or in control (undeclared control goes with any).
    """
    if not datasets:
        raise UserError("no dataset was given to take the action space of")
    first = datasets[0]
    spaces = [_space(dataset) for dataset in datasets]
    for dataset, space in zip(datasets, spaces, strict=True):
        if space.action_dim != spaces[0].action_dim:
            raise UserError(
                f"{dataset.root}: has actions of {space.action_dim} dimensions ({', '.join(space.names)}), "
                f"{first.root} of {spaces[0].action_dim} ({', '.join(spaces[0].names)}); "
                "finetune on datasets of one robot"
            )
        if space.binary != spaces[0].binary:
            raise UserError(
                f"{dataset.root}: declares {_switches(space)} binary, {first.root} {_switches(spaces[0])}; "
                f'correct "{KEY}": {{"binary": [...]}} in the meta/lapa.json of one of them'
            )
    controls = {space.control: dataset.root for dataset, space in zip(datasets, spaces, strict=True) if space.control}
    if len(controls) > 1:
        told = ", ".join(f"{root} {control}" for control, root in controls.items())
        raise UserError(f"datasets differ in control: {told}; finetune on those of one kind")
    return ActionSpace(spaces[0].names, spaces[0].binary, next(iter(controls), None))


def _space(dataset: Dataset) -> ActionSpace:
    if dataset.action_space is None:
        raise UserError(f"{dataset.root}: has no actions; finetuning needs a dataset with an `action` feature")
    return dataset.action_space


def _switches(space: ActionSpace) -> str:
    names = [name for name, switch in zip(space.names, space.binary, strict=True) if switch]
    return ", ".join(names) or "nothing"


def _names(feature: Mapping[str, Any]) -> list[str]:
    """One name a dimension, as LeRobot's datasets give them (a list, a list under a title, places by name); else

    `action_0` and so on.
    """
    width, names = int(np.prod(feature["shape"])), feature.get("names")
    if isinstance(names, Mapping):
        places = {name: place for name, place in names.items() if isinstance(place, int)}
        lists = [group for group in names.values() if isinstance(group, list)]
        names = sorted(places, key=lambda name: places[name]) or [name for group in lists for name in group]
    told = [str(name) for name in names] if isinstance(names, list) else []
    return told if len(told) == width else [f"action_{number}" for number in range(width)]
