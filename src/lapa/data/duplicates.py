"""Episodes that look the same, found by perceptual hashes of a few of their images.

    looks = looks_of(thumbnails_THW)      # hexadecimal digits, of four of the images
    seen = Duplicates()
    seen.first(looks, length)             # None, or the number of the first one added like it
    seen.add(looks, length)

A hash has for four images, and for each of 8 x 8 squares, whether brightness rises to the square at its right (dHash).
Two hashes in which at most DIFFERENT_BITS differ agree in at least one of BANDS parts, so that a search among equal
parts finds all that are alike (Norouzi et al., 2012, "Fast Search in Hamming Space with Multi-Index Hashing").
Axes: H W thumbnail, N hashes, W words, K bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lapa.data.motion import SIDE

# Images of an episode that stand for it, as bits: whether brightness rises by STEP from one of 8 x 8 squares to the
# next. So many bits differ at most after scaling to two thirds and JPEG of quality 40 (docs/log.md).
LOOKS, SQUARES, STEP, DIFFERENT_BITS = 4, 8, 2, 9
BITS = LOOKS * SQUARES * (SQUARES - 1)
# Episodes of which fewer bits are set show too little to be compared: titles, fog, a night.
LEAST_BITS = BITS // 8
# Lengths of two episodes that are alike differ by at most this part.
LENGTHS = 0.05
BANDS = DIFFERENT_BITS + 1
# Hashes that are searched one by one, before they are sorted.
RECENT = 4096


def image_bits(small_HW: UInt8[np.ndarray, "H W"]) -> bytes:
    """Returns whether brightness rises from each square of a thumbnail to the one to its right, as packed bits."""
    width = SIDE // SQUARES
    squares_HW = small_HW.reshape(SQUARES, width, SQUARES, width).mean(axis=(1, 3))
    return np.packbits(np.diff(squares_HW, axis=1) > STEP).tobytes()


def looks_of(images: Sequence[UInt8[np.ndarray, "H W"] | bytes]) -> str:
    """Returns the hash of an episode, given the thumbnails of all its images, or `image_bits` of each."""
    chosen = [images[place] for place in np.linspace(0, len(images) - 1, LOOKS).round().astype(int)]
    return b"".join(image if isinstance(image, bytes) else image_bits(image) for image in chosen).hex()


class Duplicates:
    """Hashes of episodes in the order in which they are added, and the first one that is like another.

    Memory: about 90 bytes a hash. A search compares the hashes that share a band, and the last few thousand.
    """

    def __init__(self) -> None:
        self._num = self._num_sorted = 0
        # The bits in words of 64, and the lengths; room for more.
        self._words_NW = np.zeros((RECENT, -(-BITS // 64)), np.uint64)
        self._lengths_N = np.zeros(RECENT, np.int64)
        # Blocks of sorted bands, with the numbers of their hashes; each block is at least twice the next one.
        self._blocks: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return self._num

    def add(self, looks: str, length: int) -> None:
        """Adds an episode; its number is how many were added before."""
        if self._num == len(self._words_NW):
            self._words_NW = np.concatenate([self._words_NW, np.zeros_like(self._words_NW)])
            self._lengths_N = np.concatenate([self._lengths_N, np.zeros_like(self._lengths_N)])
        self._words_NW[self._num], self._lengths_N[self._num] = _words(looks), length
        self._num += 1
        if self._num - self._num_sorted == RECENT:
            self._sort()

    def num_different(self, number: int, looks: str) -> int:
        """Returns how many bits differ between an episode, by its number, and another one."""
        return int(np.bitwise_count(self._words_NW[number] ^ _words(looks)).sum())

    def first(self, looks: str, length: int) -> int | None:
        """Returns the number of the first episode that is like this one, None where there is none."""
        words_W = _words(looks)
        if np.bitwise_count(words_W).sum() < LEAST_BITS:
            return None
        found = []
        for band, key in enumerate(_bands(words_W[None])[:, 0]):
            for keys_KN, numbers_KN in self._blocks:
                start = np.searchsorted(keys_KN[band], key)
                stop = start + np.searchsorted(keys_KN[band, start:], key, "right")
                found.append(numbers_KN[band, start:stop])
        chosen: list[Any] = [np.unique(np.concatenate(found))] if found else []
        for numbers_N in (*chosen, slice(self._num_sorted, self._num)):
            lengths_N = self._lengths_N[numbers_N]
            alike_N = np.bitwise_count(self._words_NW[numbers_N] ^ words_W).sum(axis=1) <= DIFFERENT_BITS
            alike_N &= np.abs(lengths_N - length) <= LENGTHS * np.maximum(lengths_N, length)
            if alike_N.any():
                place = int(alike_N.argmax())
                return place + numbers_N.start if isinstance(numbers_N, slice) else int(numbers_N[place])
        return None

    def _sort(self) -> None:
        """Makes a block of the hashes that are in none, and merges blocks of one size."""
        self._blocks.append(self._block(np.arange(self._num_sorted, self._num, dtype=np.uint32)))
        self._num_sorted = self._num
        while len(self._blocks) > 1 and self._blocks[-2][1].shape == self._blocks[-1][1].shape:
            numbers = [np.sort(numbers_KN[0]) for _, numbers_KN in self._blocks[-2:]]
            self._blocks[-2:] = [self._block(np.concatenate(numbers))]

    def _block(self, numbers_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys_KN = _bands(self._words_NW[numbers_N])
        order_KN = np.argsort(keys_KN, axis=1)
        return np.take_along_axis(keys_KN, order_KN, axis=1), numbers_N[order_KN]


def _words(looks: str) -> np.ndarray:
    digits = bytes.fromhex(looks)
    return np.frombuffer(digits.ljust(-(-BITS // 64) * 8, b"\0"), np.uint64)


def _bands(words_NW: np.ndarray) -> np.ndarray:
    """Returns bands [K, N]: every tenth bit, so that each band has some of all images and of all their parts."""
    bits_NB = np.unpackbits(np.ascontiguousarray(words_NW).view(np.uint8), axis=1)
    # As many bits as BANDS parts of one size have; those past BITS are 0.
    width = -(-BITS // BANDS)
    bits_NBK = bits_NB[:, : width * BANDS].reshape(-1, width, BANDS)
    return np.einsum("nbk,b->kn", bits_NBK, 1 << np.arange(width), dtype=np.uint32, casting="unsafe")
