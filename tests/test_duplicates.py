"""Perceptual hashes of episodes, and their search against comparing all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from lapa.data import duplicates
from lapa.data.duplicates import BITS, DIFFERENT_BITS, LEAST_BITS, LENGTHS, Duplicates, image_bits, looks_of
from lapa.data.motion import SIDE


def test_a_hash_by_hand() -> None:
    small_HW = np.zeros((SIDE, SIDE), np.uint8)
    small_HW[:4, 4:8] = 100
    small_HW[4:8, 28:] = 100
    # Of seven steps a row: the first one rises in row 0, the last one in row 1.
    assert image_bits(small_HW) == bytes([0b10000000, 0b00000100, 0, 0, 0, 0, 0])
    other_HW = np.zeros_like(small_HW)
    looks = looks_of([small_HW, other_HW, other_HW, other_HW])
    assert looks == image_bits(small_HW).hex() + "00" * 21
    assert looks == looks_of([image_bits(image) for image in (small_HW, other_HW, other_HW, other_HW)])
    assert looks_of([small_HW]) == image_bits(small_HW).hex() * 4


def test_the_search_finds_what_comparing_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "RECENT", 32)
    rng = np.random.default_rng(0)
    bases = rng.integers(0, 2, (100, BITS), dtype=np.uint8)
    seen, kept, num_alike = Duplicates(), [], 0
    for _ in range(600):
        bits, length = bases[rng.integers(len(bases))].copy(), int(rng.integers(97, 106))
        bits[rng.choice(BITS, rng.integers(DIFFERENT_BITS + 3), replace=False)] ^= 1
        looks = np.packbits(bits).tobytes().hex()
        alike = [
            number
            for number, (other, frames) in enumerate(kept)
            if (other != bits).sum() <= DIFFERENT_BITS and abs(frames - length) <= LENGTHS * max(frames, length)
        ]
        assert seen.first(looks, length) == (alike[0] if alike else None)
        num_alike += bool(alike)
        if not alike:
            kept.append((bits, length))
            seen.add(looks, length)
    assert len(seen) == len(kept) > 4 * 32 and num_alike > 100


def test_what_shows_too_little_is_like_nothing() -> None:
    for num, found in ((LEAST_BITS - 1, None), (LEAST_BITS, 0)):
        bits, seen = np.zeros(BITS, np.uint8), Duplicates()
        bits[:num] = 1
        seen.add(np.packbits(bits).tobytes().hex(), 10)
        assert seen.first(np.packbits(bits).tobytes().hex(), 10) == found
