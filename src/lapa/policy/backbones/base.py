"""Backbone interface: vision encoder and causal language model; with it, the processor of images and prompts.

After the observation, all inputs and outputs of a policy are tokens of its vocabulary. So the language model stays an
ordinary one of transformers, and one decoding function serves every backbone.

Axes: B batch, V cameras, P observation (image and text tokens), F tokens after it, S = P + F, D width, R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache
from transformers.utils import logging

from lapa.engine.memory import require_memory
from lapa.files import find_files
from lapa.policy.vocabulary import Segment, Vocabulary

Tags = tuple[tuple[int, ...], tuple[int, ...]]
# Caches of fixed size come in multiples of this many tokens, so that prompts of about one length share one.
CACHE_STEP = 64
# The commands report their progress themselves.
logging.disable_progress_bar()


class Processor(Protocol):
    """Turns images and prompts into tensors, on the CPU. DataLoader workers call it, so it must be picklable."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(
        self, images: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]], prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """A batch as tensors: `tokens_BT` and `mask_BT`, padded on the left, and those of the images.

        images: of each sample, of any size, in the order of the image slots.
        """

    def tags(self, segment: Segment) -> Tags:
        """Text tokens that open and close a field of this segment; by default none."""
        return (), ()

    def grow(self, vocabulary: Vocabulary) -> None:
        """Adds the vocabulary's segments to the tokenizer; by default they follow its own tokens."""
        return

    def save(self, folder: Path) -> None:
        """Writes the files that `load` of its module reads."""


@dataclass
class Memory:
    """State of a cached decoding. next_B1: the position of the next token; mask_BS: 0 is padding."""

    cache: Cache
    mask_BS: Int[Tensor, "B S"]
    next_B1: Int[Tensor, "B 1"]

    def grow(self, tokens_BF: Int[Tensor, "B F"]) -> Int[Tensor, "B F"]:
        """Makes room for more tokens and returns their positions."""
        count = tokens_BF.shape[1]
        if not isinstance(self.cache, StaticCache):
            self.mask_BS = F.pad(self.mask_BS, (0, count), value=1)
        positions_BF = self.next_B1 + torch.arange(count, device=tokens_BF.device)
        self.next_B1 = self.next_B1 + count
        return positions_BF


class Backbone(nn.Module, ABC):
    """A vision tower and a causal language model of transformers.

    config: a dataclass with `kind` and `image_size`, the side in pixels of the square images that it reads.
    language: has an input embedding and a bias-free head with a row for each token of the vocabulary.
    """

    config: Any
    language: PreTrainedModel

    def __init__(self) -> None:
        super().__init__()
        self._compiled_step: Callable[..., Any] | None = None
        self._caches: dict[tuple[int, int], StaticCache] = {}

    @property
    @abstractmethod
    def vision(self) -> nn.Module:
        """The vision tower without its projection to the language model's width: the part that may be frozen."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated layers; each is a unit of sharding."""

    @property
    def full_precision(self) -> list[nn.Module]:
        """Submodules whose weights keep their precision, whatever --weights is."""
        return []

    @abstractmethod
    def read(
        self, batch: Mapping[str, Tensor], tokens_BF: Int[Tensor, "B F"]
    ) -> tuple[Float[Tensor, "B S D"], Int[Tensor, "B S"]]:
        """The hidden states (after the final norm) of the observation and the tokens after it, and the mask of both."""

    @abstractmethod
    def begin(
        self, batch: Mapping[str, Tensor], context_BC: Int[Tensor, "B C"], room: int
    ) -> tuple[Float[Tensor, "B 1 D"], Memory]:
        """Reads the observation and the tokens after it into a cache. Returns the last hidden state, and the memory.

        room: number of tokens that may follow.
        """

    @abstractmethod
    def advance(self, memory: Memory, tokens_BF: Int[Tensor, "B F"]) -> Float[Tensor, "B F D"]:
        """The hidden states of more tokens. Changes `memory`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the weights into `folder`."""

    def save_config(self, folder: Path) -> None:
        """Writes what `load` of its module reads without weights; by default nothing beyond the policy's config."""
        return

    def compile_steps(self, backend: str = "inductor") -> None:
        """Compiles `advance`, on a GPU as a CUDA graph, with caches of fixed size that are kept.

        The first calls for a batch size take long. Decoding returns the same as before, up to rounding.
        """
        mode = "reduce-overhead" if backend == "inductor" else None
        self._compiled_step = torch.compile(self.language.base_model.forward, backend=backend, mode=mode, dynamic=False)

    def step(self, **inputs: Any) -> Float[Tensor, "B F D"]:
        """The language model's last hidden states; compiled if `compile_steps` was called."""
        run = self._compiled_step or self.language.base_model
        if self._compiled_step is not None:
            torch.compiler.cudagraph_mark_step_begin()
        hidden_BFD: Tensor = run(**inputs).last_hidden_state
        # A CUDA graph writes its next result into the same memory.
        return hidden_BFD.clone() if self._compiled_step else hidden_BFD

    def new_memory(self, mask_BP: Int[Tensor, "B P"], next_B1: Int[Tensor, "B 1"], room: int) -> Memory:
        """An empty memory for an observation and `room` tokens after it; if compiled, its cache has a fixed size.

        The mask of a cache of fixed size includes the tokens to come, which causality hides.
        """
        if self._compiled_step is None:
            return Memory(DynamicCache(config=self.language.config), mask_BP, next_B1)
        batch_size, num_observed = mask_BP.shape
        length = -(-(num_observed + room) // CACHE_STEP) * CACHE_STEP
        if (batch_size, length) not in self._caches:
            self._caches[batch_size, length] = StaticCache(self.language.config, max_cache_len=length)
        cache = self._caches[batch_size, length]
        cache.reset()
        return Memory(cache, F.pad(mask_BP, (0, length - num_observed), value=1), next_B1)

    def logits(self, hidden_BFD: Float[Tensor, "B F D"], rows: range) -> Float[Tensor, "B F R"]:
        """Logits of only these rows of the vocabulary, in float32."""
        head: Any = self.language.get_output_embeddings()
        return F.linear(hidden_BFD, head.weight[rows.start : rows.stop].to(hidden_BFD.dtype)).float()

    def resize(self, vocabulary: Vocabulary) -> None:
        """Grows embedding and head to the vocabulary, in place; existing rows stay as they are."""
        embedding: Any = self.language.get_input_embeddings()
        if vocabulary.size > len(embedding.weight):
            self.language.resize_token_embeddings(vocabulary.size, mean_resizing=False)


class PrefixBackbone(Backbone):
    """A backbone that puts embeddings of the observation before those of the tokens of a causal language model."""

    @abstractmethod
    def prefix(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B P D"], Int[Tensor, "B P"]]:
        """The observation's embeddings, padded on the left, and their mask."""

    def read(
        self, batch: Mapping[str, Tensor], tokens_BF: Int[Tensor, "B F"]
    ) -> tuple[Float[Tensor, "B S D"], Int[Tensor, "B S"]]:
        inputs, mask = self._sequence(batch, tokens_BF)
        output = self.language.base_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions(mask), use_cache=False
        )
        return output.last_hidden_state, mask

    def begin(
        self, batch: Mapping[str, Tensor], context_BC: Int[Tensor, "B C"], room: int
    ) -> tuple[Float[Tensor, "B 1 D"], Memory]:
        inputs, mask = self._sequence(batch, context_BC)
        position_ids = positions(mask)
        memory = self.new_memory(mask, position_ids[:, -1:] + 1, room)
        output = self.language.base_model(
            inputs_embeds=inputs,
            attention_mask=memory.mask_BS,
            position_ids=position_ids,
            past_key_values=memory.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1:], memory

    def advance(self, memory: Memory, tokens_BF: Int[Tensor, "B F"]) -> Float[Tensor, "B F D"]:
        position_ids = memory.grow(tokens_BF)
        return self.step(
            inputs_embeds=self._embed(tokens_BF),
            attention_mask=memory.mask_BS,
            position_ids=position_ids,
            past_key_values=memory.cache,
            use_cache=True,
        )

    def _sequence(
        self, batch: Mapping[str, Tensor], tokens_BF: Int[Tensor, "B F"]
    ) -> tuple[Float[Tensor, "B S D"], Int[Tensor, "B S"]]:
        """The embeddings of the observation and the tokens after it, and their mask."""
        prefix_BPD, mask_BP = self.prefix(batch)
        inputs = torch.cat([prefix_BPD, self._embed(tokens_BF).to(prefix_BPD.dtype)], dim=1)
        return inputs, F.pad(mask_BP, (0, tokens_BF.shape[1]), value=1)

    def _embed(self, tokens_BF: Int[Tensor, "B F"]) -> Float[Tensor, "B F D"]:
        embedded: Tensor = self.language.get_input_embeddings()(tokens_BF)
        return embedded


def positions(mask_BS: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Positions that do not count the padding, so that padding does not change a sequence."""
    return (mask_BS.cumsum(-1) - 1).clamp(min=0)


def require_room(folder: Path, name: str) -> None:
    """Raises UserError, before anything is read, where a model's weights need more memory than there is."""
    needed = sum(path.stat().st_size for path in find_files(folder, "*.safetensors"))
    remedies = ["a smaller model", "a machine with more memory", "fewer processes on this machine"]
    require_memory(needed, torch.device("cpu"), f"{name}: loading its weights", remedies)
