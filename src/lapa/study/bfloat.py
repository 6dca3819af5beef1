"""Weights at half their size on the way: float32 tensors of a safetensors file as bfloat16, and back.

A narrowed file is the original's header, byte for byte, and after it the data of all tensors, float32 as bfloat16 (an
error of at most 1/256 of each number). Widening gives a file of the same names, types and length. Small tensors stay
as they are: codebooks, norms, and the bins and scales of actions, where rounding would hurt and saves nothing.

Neither holds more than a block of a tensor in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

import torch

from lapa.errors import UserError

# Numbers that a tensor must have at least to be narrowed.
LEAST_NUMBERS = 16384
BLOCK = 1 << 20
# Longer headers than safetensors itself reads.
LONGEST_HEADER = 100_000_000


def narrowed_size(file: IO[bytes]) -> int:
    """Bytes that `narrow` would yield. The file is read from its beginning, and left there."""
    head, tensors = _read_header(file)
    file.seek(0)
    return len(head) + sum(size // 2 if narrow else size for size, narrow in tensors)


def narrow(file: IO[bytes]) -> Iterator[bytes]:
    """The narrowed file, block by block. UserError where the file is no whole safetensors file."""
    head, tensors = _read_header(file)
    yield head
    for size, narrowed in tensors:
        for block in _blocks(file, size):
            if narrowed:
                numbers = torch.frombuffer(bytearray(block), dtype=torch.float32)
                block = numbers.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
            yield block


def widen(file: IO[bytes]) -> Iterator[bytes]:
    """The file that `narrow` was given, its large tensors rounded. UserError where it is not whole."""
    head, tensors = _read_header(file)
    yield head
    for size, narrowed in tensors:
        for block in _blocks(file, size // 2 if narrowed else size):
            if narrowed:
                numbers = torch.frombuffer(bytearray(block), dtype=torch.bfloat16)
                block = numbers.to(torch.float32).numpy().tobytes()
            yield block


def _read_header(file: IO[bytes]) -> tuple[bytes, list[tuple[int, bool]]]:
    """The header as it is, and of each tensor, in the order of the data, its bytes and whether it is narrowed."""
    length = file.read(8)
    header_size = int.from_bytes(length, "little")
    if len(length) < 8 or header_size > LONGEST_HEADER:
        raise UserError("not a safetensors file (its header's length makes no sense)")
    header = file.read(header_size)
    try:
        described = json.loads(header)
        tensors = sorted((values["data_offsets"], values["dtype"]) for n, values in described.items() if n[:2] != "__")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("not a safetensors file (its header cannot be read)") from None
    end, found = 0, []
    for (first, last), kind in tensors:
        if first != end or last < first:
            raise UserError("not a safetensors file (its tensors do not lie one after another)")
        found.append((last - first, kind == "F32" and last - first >= 4 * LEAST_NUMBERS))
        end = last
    return length + header, found


def _blocks(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size:
        block = file.read(min(BLOCK, size))
        # Numbers must not be cut in two.
        if len(block) != min(BLOCK, size):
            raise UserError("not a whole safetensors file (it ends early)")
        size -= len(block)
        yield block
