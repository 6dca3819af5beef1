"""The objects that cross from one room to another, what the training loop asks of a model and a dataset, and the axes.

This module imports without torch.

Axes: B batch, T time, C channel, H W image, N image tokens, L latent action length, D width,
K action chunk, A action dimensions, S state dimensions.
A tensor carries its axes in its name where that helps: `frames_BTCHW`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from lapa.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    _Module = nn.Module
    _Dataset = Dataset[Any]
else:
    _Module = _Dataset = object


class Plain:
    """Base of values without files and connections, which the processes of a training may share."""

    __slots__ = ()


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one instant.

    images: camera name -> RGB image, uint8, any size (the policy's own transform resizes it).
    instruction: the task in words; may be empty.
    state: proprioception in the robot's own units, or None.
    """

    images: Mapping[str, UInt8[np.ndarray, "H W 3"]]
    instruction: str
    state: Float[np.ndarray, "S"] | None = None


@dataclass(frozen=True)
class Losses:
    """Result of a model's forward in training.

    loss: the scalar to minimise, with gradient. parts: its named parts for the log, scalars without gradient.
    """

    loss: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class TrainableModel(_Module):
    """What `lapa.engine.loop.train` asks of a model: a base class with defaults, inherited next to nn.Module.

        class MyModel(TrainableModel, nn.Module): ...

    Its `forward(batch)` returns Losses.
    """

    sharded_methods: tuple[str, ...] = ()
    """Methods that may be called on a sharded model as its forward may (--shard)."""

    def shard_units(self) -> Sequence[nn.Module]:
        """The modules that FSDP2 shards one by one, such as the layers; by default the model is one unit."""
        return ()

    def after_sharding(self) -> None:
        """Called once the parameters are sharded, which replaces them: the place to renew what refers to them."""

    def undecayed(self) -> Sequence[nn.Parameter]:
        """Matrices without weight decay; vectors never have it."""
        return ()

    def full_precision(self) -> Sequence[nn.Module]:
        """Submodules whose weights keep the precision they have, whatever --weights is."""
        return ()

    def checkpoint_activations(self) -> None:
        """Recomputes activations in the backward pass from now on. Raises UserError where the model cannot."""
        raise UserError(f"--gradient-checkpointing: {type(self).__name__} cannot do it; leave the option out")


class TrainingDataset(_Dataset):
    """What `lapa.engine.loop.train` asks of a dataset: a base class with defaults.

    `dataset[draw]` is the sample of a `lapa.engine.batches.Draw`, as a dictionary with its number under `index`.
    """

    groups: Sequence[tuple[int, float]] | None = None
    """Of a mixture: the number of samples, which follow each other, and the weight of each part."""
    in_memory: bool = False
    """Whether samples are in memory, so that processes to read them are of no use."""
    remote: bool = False
    """Whether samples are read from a store, which takes its time to answer: many are then read at once."""

    def __len__(self) -> int:
        """Number of samples."""
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Where a sample is from, for an error message."""
        return f"sample {index}"
