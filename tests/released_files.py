"""Files as the authors of LAPA and LWM write them, small: with msgpack itself, as Flax and their code use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

msgpack = pytest.importorskip("msgpack")
GOLDEN = Path(__file__).parent / "golden"
VISION_ROWS, IMAGE_CODES = 128, 64


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A golden's facts, its tensors, and of these the parameters under their released names."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return facts, tensors, {key[6:]: value for key, value in tensors.items() if key.startswith("param.")}


def write_stream(path: Path, tensors: Mapping[str, Tensor], prefix: tuple[str, ...] = (), chunk: int = 1 << 30) -> None:
    """The streaming checkpoint: a record for each tensor."""
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            file.write(packer.pack(((*prefix, *name.split("/")), msgpack.packb(leaf(tensor, chunk)))))


def leaf(tensor: Tensor, chunk: int = 1 << 30) -> Any:
    """A tensor as Flax packs one; one of more bytes than `chunk` in pieces."""
    if tensor.nbytes > chunk:
        pieces = tensor.flatten().split(chunk // tensor.element_size())
        return {
            "__msgpack_chunked_array__": True,
            "shape": {str(axis): size for axis, size in enumerate(tensor.shape)},
            "chunks": {str(number): leaf(piece, chunk) for number, piece in enumerate(pieces)},
        }
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, msgpack.packb((tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), raw)))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Nested NumPy arrays, which the authors' image tokenizer was pickled as."""
    return nested({name: np.asarray(tensor.numpy()) for name, tensor in tensors.items()})


def write_tokenizer(path: Path, size: int = 300) -> None:
    """A small sentencepiece model of Llama's kind: byte-pair encoding with bytes to fall back to, no normalisation."""
    import sentencepiece

    words = "You are a helpful assistant. USER: What action should the robot take to `pick up the milk` ASSISTANT:"
    text = path.with_suffix(".txt")
    text.write_text("\n".join([words, "<vision> </vision> <delta> </delta> <action> </action>"] * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    path.with_suffix(".model").rename(path)
