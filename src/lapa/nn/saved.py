"""What the files of a saved model hold, read before the model is built, since a stranger may have made them.

A config is compared with the shapes in the header of its weights, so that a config of a gigantic model next to a small
file allocates nothing, and a damaged file is an error of one line.

    require_sizes(folder / "config.json", values, shapes_of_file(folder / "model.safetensors"))
    require_fit(lambda: Model(config), folder / "config.json", folder / "model.safetensors")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lapa.errors import UserError

# A config may hold numbers that are no sizes (a longest sequence, a token's id) up to this, however small its weights.
LARGEST_PLAIN = 1 << 20
# Elements that a model may have beyond those of its weights, as a share and as a number: buffers, tied weights.
MOST_EXTRA, PLAIN_EXTRA = 1.0, 1 << 26
# Endings of the names of what there is a tensor for each, and of sides of images.
LAYERS, SIDES = ("layers", "depth", "depths", "num_res_blocks"), ("image_size", "resolution")
LARGEST_SIDE = 8192
LARGEST_LABELS = 1 << 16
LONGEST_REASON = 300
# Endings of names of numbers that make nothing larger.
NO_SIZES = ("theta", "window_layers")


@contextmanager
def damaged(what: str, remedy: str = "", *, even_named: bool = False) -> Iterator[None]:
    """Turns whatever a library raises on a damaged or hostile file into a UserError: `what`, why, and the remedy.

    even_named: also a UserError, which otherwise stays as it is.
    """
    try:
        yield
    except UserError as error:
        if even_named:
            raise UserError(f"{what} ({error}){remedy}") from None
        raise
    # transformers raises errors of many kinds, and the tokenizers library a plain Exception or a panic of Rust.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # transformers lists all models that it knows.
        reason = reason if len(reason) < LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
        raise UserError(f"{what} ({reason}){remedy}") from error


def shapes_of_folder(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in the safetensors files of a folder. Raises UserError where a file is damaged."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(folder).glob("[!.]*.safetensors")):
        shapes |= shapes_of_file(path)
    return shapes


def shapes_of_file(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file, from its header alone. Raises UserError where it is damaged."""
    if not path.is_file():
        raise UserError(f"{path}: missing; the folder is incomplete, copy or train the model again")
    what = f"{path}: does not fit the config next to it, since it is no file of weights"
    with damaged(what, "; copy or train the model again"), safe_open(path, "pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def require_sizes(path: Path, values: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError where a number of the config `path` is larger than any size of a model with such weights.

    shapes: of the weights; of none, nothing is checked.
    """
    if not shapes:
        return
    most = max(LARGEST_PLAIN, sum(math.prod(shape) for shape in shapes.values()))
    for name, number in _numbers(values):
        limit = len(shapes) if name.endswith(LAYERS) else LARGEST_SIDE if name.endswith(SIDES) else most
        if name == "num_labels":
            # transformers names each, and copies the names.
            limit = LARGEST_LABELS
        if abs(number) > limit and not name.endswith(NO_SIZES):
            raise UserError(
                f"{path}: {name} {_short(number)} does not fit its weights ({len(shapes)} tensors, {most:,} numbers at "
                "most); copy the model again"
            )


def require_fit(build: Callable[[], nn.Module], config: Path, weights: Path) -> None:
    """Raises UserError where a model of our own, built without memory, has other tensors than its file of weights.

    config: the file that `build` follows.
    """
    shapes, what = shapes_of_file(weights), f"{weights}: does not fit the config next to it"
    with damaged(what), torch.device("meta"):
        planned = build()
    wanted = planned.state_dict()
    if extra := sorted(shapes.keys() - wanted.keys()):
        raise UserError(f"{what} ({extra[0]} is in no such model)")
    for name, tensor in wanted.items():
        if shapes.get(name) != tuple(tensor.shape):
            found = f"of shape {list(shapes[name])}" if name in shapes else "missing"
            raise UserError(f"{what} ({name} is {found}, not {list(tensor.shape)})")
    require_few(config, sum(buffer.numel() for buffer in planned.buffers()), shapes)


def require_few(path: Path, num: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError where the model of the config `path` has many more numbers than its weights."""
    held = sum(math.prod(shape) for shape in shapes.values())
    if num > held + max(MOST_EXTRA * held, PLAIN_EXTRA):
        raise UserError(
            f"{path}: describes a model of {num:,} numbers, its weights hold {held:,}; copy the model again"
        )


def _numbers(values: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers in nested values, each with the name of its key."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _numbers(value, str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value, name)
    elif isinstance(values, int):
        yield name, values


def _short(number: int) -> str:
    return f"{number:,}" if abs(number) < 10**18 else "of more than 18 digits"
