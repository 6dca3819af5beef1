"""What images are made of: words that fit, heat maps, captions below frames, charts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from lapa.drawing import (
    BAD,
    BLUE,
    CELL,
    GAP,
    GOOD,
    MARGIN,
    ORANGE,
    TEXT,
    Row,
    captioned,
    charts,
    drawable,
    font,
    grid,
    heat_map,
    largest,
    save_animation,
    wrapped,
)


def holds(image: Image.Image, colour: str) -> bool:
    distance = np.abs(np.asarray(image).astype(int) - ImageColor.getrgb(colour)).max(-1)
    return bool((distance < 30).any())


@pytest.mark.parametrize(
    "text", ["", "word", "a sentence of several words that takes two lines", "w" * 500, "x " * 500]
)
def test_text_fits_its_width(text: str) -> None:
    lines = wrapped(text, 150)
    assert len(lines) <= 2
    assert all(font(TEXT).getlength(line) <= 150 for line in lines)
    assert lines[0].startswith(text[:4]) and text.startswith(lines[0].removesuffix("..."))


def test_text_is_one_line_without_control_characters() -> None:
    assert drawable("O\u0308ffne die\nTür 打开 \x1b[31m") == "Öffne die Tür 打开 \\x1b[31m"


def test_text_that_the_font_lacks_is_drawn_with_another_one() -> None:
    pytest.importorskip("matplotlib", reason="its font has Latin, Greek and Cyrillic letters")
    box = bytes(font(TEXT, "é").getmask("\uffff"))
    for text in ("Öffne die Tür", "Ouvre la fenêtre", "откройте дверь", "άνοιξε"):
        assert all(bytes(font(TEXT, text).getmask(letter)) not in (box, b"") for letter in text if letter != " ")
    assert font(TEXT, "open the door").getname() == font(TEXT).getname() != font(TEXT, "Tür").getname()


def test_text_that_no_font_has_is_drawn_as_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapa.drawing._font_files", lambda letters: [])
    assert font(TEXT + 1, "ü").getmask("ü").getbbox() == font(TEXT + 1).getmask("\uffff").getbbox() is not None


def test_a_grid_has_every_image_and_a_frame_around_the_marked_one() -> None:
    colours = [(200, 0, 0), (0, 0, 200)]
    images = [np.full((8, 16, 3), colour, np.uint8) for colour in colours]
    sheet = grid([Row("a title", images, ["one", "two"], frozenset({1}))], "title", "a note", heat=0.5)
    assert sheet.width == 2 * MARGIN + 2 * (CELL + GAP) - GAP
    assert [count for count, colour in sheet.getcolors(1 << 20) if colour == colours[0]] == [CELL * CELL // 2]
    assert holds(sheet, GOOD) and not holds(grid([Row("", images)]), GOOD)


def test_a_heat_map_grows_brighter_up_to_its_end() -> None:
    shades = heat_map(np.array([[0, 0.1, 0.2, 0.4, 0.5, 0.9]]), 0.5).astype(int).sum(-1)[0]
    assert (np.diff(shades[:5]) > 0).all() and shades[4] == shades[5]
    assert largest(np.linspace(0, 0.31, 1000)) == 0.35
    assert largest(np.zeros(9)) == 0.05


@pytest.mark.parametrize("shape", [(48, 64), (47, 63)])
def test_a_caption_hides_nothing_of_a_frame(shape: tuple[int, int]) -> None:
    frame_HWC = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    framed = captioned(frame_HWC, ["one", "a line that is longer than the frame"], BAD)
    assert (framed[: shape[0], : shape[1]] == frame_HWC).all()
    assert framed.shape[0] % 2 == framed.shape[1] % 2 == 0
    assert tuple(framed[-1, 0]) == ImageColor.getrgb(BAD)


def test_an_animation_has_every_image(tmp_path: Path) -> None:
    images = [Image.new("RGB", (40, 20), (shade, 0, 0)) for shade in (0, 100, 200)]
    save_animation(tmp_path / "a.webp", images, 0.5)
    with Image.open(tmp_path / "a.webp") as read:
        assert (read.n_frames, read.size) == (3, (40, 20))


def test_charts_draw_each_line_in_its_colour() -> None:
    steps = range(0, 1000, 2)
    panels = {
        "loss": {"a": [(step, 100 / (step + 1)) for step in steps], "b": [(step, 3.0) for step in steps]},
        "one point": {"a": [(5.0, 0.0)]},
        "damaged": {"b": [(1, float("nan")), (2, float("inf"))]},
        "empty": {"b": []},
    }
    drawn = charts(panels, "steps")
    assert holds(drawn, BLUE) and holds(drawn, ORANGE)
    assert not holds(charts({"loss": {"a": [(0, 1.0), (9, 2.0)]}}, "steps"), ORANGE)


@pytest.mark.parametrize("values", [(0, 0), (1e-9, 1e9), (-5, 5), (1e29, -1e29), (7,), (1e-300, 2e-300)])
def test_a_chart_of_any_values(values: tuple[float, ...]) -> None:
    points = [(float(step), float(value)) for step, value in enumerate(values)]
    assert holds(charts({"any": {"a": points}}, "steps"), BLUE)
