"""Frames of text against frames of a camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from lapa.data.cards import STRIDE, CardMeter, is_card
from lapa.data.transforms import resize_and_crop
from lapa.data.video import decode_times, encode_clip

LIST = "1. Take the cup\n2. Put it down\n3. Open the drawer\n4. Close the drawer\n5. Done"
COLOURS = [((0, 0, 0), (255, 255, 255)), ((255, 255, 255), (0, 0, 0)), ((20, 40, 120), (255, 255, 0))]


def card(text: str, size: int, colours: tuple[tuple[int, ...], tuple[int, ...]]) -> np.ndarray:
    image = Image.new("RGB", (640, 360), colours[0])
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    draw.multiline_text((320, 180), text, fill=colours[1], font=font, anchor="mm", align="center")
    return resize_and_crop(np.asarray(image)[None], 256)[0]


def room(seed: int) -> np.ndarray:
    """A shaded wall, a table, and things on it, with the noise of a sensor."""
    rng = np.random.default_rng(seed)
    down, right = np.mgrid[:256, :256]
    image = np.repeat((90 + 0.3 * down + 0.2 * right)[..., None], 3, axis=2)
    image[150:] = (120 - 0.2 * right)[150:, :, None]
    for _ in range(5):
        top, left = rng.integers(100, 220, 2)
        image[top : top + 30, left - 30 : left] = rng.integers(0, 255, 3)
    return (image + rng.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize(("text", "size"), [("THE END", 64), ("Chapter 2", 24), (LIST, 24), (LIST, 40)])
def test_cards_in_several_colours_and_layouts(text: str, size: int, colours: tuple, tmp_path: Path) -> None:
    image_HWC = card(text, size, colours)
    assert is_card(image_HWC)
    encode_clip(tmp_path / "card.mp4", [image_HWC] * 2, 10.0)
    assert is_card(decode_times(tmp_path / "card.mp4", {0: 0.0}, 0.01)[0])


@pytest.mark.parametrize("seed", range(3))
def test_what_a_camera_shows_is_no_card(seed: int) -> None:
    assert not is_card(room(seed))
    assert not is_card(np.random.default_rng(seed).integers(0, 256, (256, 256, 3), np.uint8))


def test_the_share_is_of_the_frames_that_are_looked_at() -> None:
    meter = CardMeter()
    assert meter.share == 0
    for number in range(4 * STRIDE):
        meter.add(card("THE END", 48, COLOURS[0]) if number < STRIDE else room(number))
    assert meter.share == 0.25
