"""Weights of a module in a file of safetensors, written atomically, and refused on reading where one is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lapa.errors import UserError
from lapa.files import atomic_path


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes a module's state as safetensors, atomically."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})


def load_weights(module: nn.Module, path: Path) -> None:
    """Reads a file of `save_weights`. Raises UserError naming the file where it is missing, damaged or does not fit."""
    try:
        weights = load_file(path)
        require_finite_weights(path, weights.items())
        module.load_state_dict(weights)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the folder is incomplete, copy or train the model again") from None
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: does not fit the config next to it ({' '.join(str(error).split())})") from error


def require_finite_weights(path: Path | str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError naming `path` and the first tensor with a number that is not finite."""
    for _ in finite_weights(path, weights):
        pass


def finite_weights(path: Path | str, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights, each once it is known to be finite; as `require_finite_weights` where one is not."""
    for name, tensor in weights:
        if tensor.is_floating_point() and not is_finite(tensor):
            raise UserError(
                f"{path}: {name} holds numbers that are not finite (NaN or infinity): the file is damaged, or training "
                "diverged; use another model"
            )
        yield name, tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    # Much faster than isfinite, and without a copy; NaN goes through minimum and maximum.
    numbers = tensor.detach() if tensor.element_size() > 1 else tensor.detach().half()
    return not numbers.numel() or all(bool(end.isfinite()) for end in torch.aminmax(numbers))
