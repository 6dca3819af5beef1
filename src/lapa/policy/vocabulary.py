"""One vocabulary with segments: text | image codes | latent actions | robot action bins | state bins | queries.

A token is a row of the language model's embedding and head; a code is its number within a segment. Latent actions
are L tokens of the latent segment and robot actions A tokens of the bin segment, with rows shared by all positions,
as in LAPA (https://arxiv.org/abs/2410.11758). So the model stays an ordinary causal language model, and a segment is
added by adding rows at the end. Not every policy has every segment: only a backbone with discrete images has image
codes, only a policy that reads the robot's state has its bins, and only the `chunk` head has queries, at whose
positions it reads the model's hidden states.

    vocabulary = Vocabulary(text=512, latent=8, bins=256)
    vocabulary.tokens("latent", codes_BL)     # 512 + codes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch

from lapa.errors import UserError

Segment = Literal["text", "vision", "latent", "bins", "state", "query"]
SEGMENTS: tuple[Segment, ...] = get_args(Segment)

Integers = TypeVar("Integers", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class Vocabulary:
    """Number of rows of each segment, in their order."""

    text: int
    vision: int = 0
    latent: int = 0
    bins: int = 0
    state: int = 0
    query: int = 0

    def __post_init__(self) -> None:
        if self.text < 1 or min(self._sizes.values()) < 0:
            raise UserError(f"a vocabulary needs text rows and no negative sizes, got {self}")

    @property
    def size(self) -> int:
        return sum(self._sizes.values())

    def rows(self, segment: Segment) -> range:
        """The tokens of a segment."""
        first = sum(self._sizes[name] for name in SEGMENTS[: SEGMENTS.index(segment)])
        return range(first, first + self._sizes[segment])

    def tokens(self, segment: Segment, codes: Integers) -> Integers:
        """Codes of a segment as tokens. Raises UserError for a code that the segment does not have."""
        self._require(segment, codes, range(len(self.rows(segment))), "codes")
        return codes + self.rows(segment).start

    def codes(self, segment: Segment, tokens: Integers) -> Integers:
        """The inverse of `tokens`. Raises UserError for a token of another segment."""
        self._require(segment, tokens, self.rows(segment), "tokens")
        return tokens - self.rows(segment).start

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: int(getattr(self, name)) for name in SEGMENTS}

    def _require(self, segment: Segment, values: Integers, allowed: range, what: str) -> None:
        count = int(np.prod(values.shape))
        if count and not (allowed.start <= int(values.min()) and int(values.max()) < allowed.stop):
            raise UserError(
                f"{what} of the {segment} segment lie in [{allowed.start}, {allowed.stop}), "
                f"got {int(values.min())} to {int(values.max())}"
            )
