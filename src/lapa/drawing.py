"""The look of all images: colours, font and sizes; grids of images with words, heat maps, captioned frames, curves.

    grid([Row("0: open the drawer", frames_NHWC, ["frame", "predicted"])]).save("grid.png")
    charts({"loss": {"run": [(0, 1.0), (100, 0.5)]}}, across="steps").save("curves.png")

Axes: N images of a row, T time, C channel, H W image.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lapa.errors import printable
from lapa.files import atomic_path

# Of Okabe and Ito, which the colour-blind can distinguish.
SERIES = BLUE, ORANGE, GREEN, PINK, VERMILION, SKY, GREY = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f7f7f",
)  # fmt: skip
PAPER, INK, MUTED, RULE = "#ffffff", "#1a1a1a", "#666666", "#d9d9d9"
# What went well or is chosen, and what failed.
GOOD, BAD = "#1e8e3e", "#c5221f"
# Pixels: the width of a grid's cells, the gap between them, the margin, and letters of titles and of other text.
CELL, GAP, MARGIN, TITLE, TEXT = 144, 4, 12, 19, 14
LINE = TEXT + 5
# Colours of a heat map, from no difference to the largest.
HEAT = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], np.float32)
# The size of a chart, its parts, and how much larger it is drawn, so that lines are smooth.
CHART_WIDTH, CHART_HEIGHT, CHARTS_ACROSS, SMOOTH = 400, 270, 3, 2
MAX_POINTS, WINDOWS = 60, 20
# Larger values are as good as infinite.
LARGEST = 1e30


@dataclass(frozen=True)
class Row:
    """Images of one size under a title, each below its caption; those of `marked` are framed in green."""

    title: str
    images: Sequence[np.ndarray]
    captions: Sequence[str] = ()
    marked: frozenset[int] = frozenset()


def font(size: int = TEXT, text: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns the font of all images, which comes with Pillow, or, for a text that it lacks, one that has more of it.

    Letters that no font of this machine has are drawn as boxes.
    """
    return _font(size, frozenset(letter for letter in text if not letter.isascii()))


@lru_cache(1000)
def _font(size: int, letters: frozenset[str]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    own = ImageFont.load_default(size)
    if not _lacking(own, letters):
        return own
    others = [ImageFont.truetype(file, size) for file in _font_files(letters)]
    return min([own, *others], key=lambda each: _lacking(each, letters))


def _lacking(letters_of: ImageFont.FreeTypeFont | ImageFont.ImageFont, letters: Iterable[str]) -> int:
    """Returns how many letters a font draws as it draws one that does not exist."""
    nothing = bytes(letters_of.getmask("\uffff"))
    return sum(bytes(letters_of.getmask(letter)) == nothing for letter in letters)


def _font_files(letters: Iterable[str]) -> list[str]:
    """Returns fonts that may have letters: matplotlib's, with Latin, Greek and Cyrillic, and fontconfig's choice."""
    files = []
    if (matplotlib := importlib.util.find_spec("matplotlib")) and matplotlib.origin:
        files.append(str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"))
    if command := shutil.which("fc-match"):
        charset = " ".join(f"{ord(letter):x}" for letter in letters)
        chosen = subprocess.run(
            [command, "--format=%{file}", f"sans:charset={charset}"], capture_output=True, text=True, check=False
        )
        files.append(chosen.stdout)
    return [file for file in files if Path(file).is_file()]


def drawable(text: object) -> str:
    """Returns a text as one line, each letter with its accents as one."""
    return unicodedata.normalize("NFC", printable(text))


def wrapped(text: str, width: float, size: int = TEXT, most: int = 2) -> list[str]:
    """Returns a text as at most `most` lines of at most `width` pixels; dots mark what is left out."""
    words, lines = drawable(text).split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size, longer).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines[most - 1 :] = [lines[most - 1] + " ..."]
    return [_shortened(line, width, size) for line in lines]


def _shortened(line: str, width: float, size: int) -> str:
    if font(size, line).getlength(line) <= width:
        return line
    line = line.removesuffix("...").strip()
    while line and font(size, line).getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."


def grid(rows: Sequence[Row], title: str = "", note: str = "", heat: float | None = None) -> Image.Image:
    """Draws rows of images under a title, a note below them, and the scale of their heat maps up to `heat`."""
    columns = max(len(row.images) for row in rows)
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    room = width - 2 * MARGIN
    titles, notes = wrapped(title, room, TITLE), wrapped(note, room, most=4) if note else []
    heights = [_row_height(row, room) for row in rows]
    top = MARGIN + (len(titles) * (TITLE + 7) if title else 0)
    foot = (LINE + 2 * GAP if heat is not None else 0) + len(notes) * LINE
    sheet = Image.new("RGB", (width, top + sum(heights) + foot + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, MARGIN, MARGIN, titles if title else [], INK, TITLE)
    for row, height in zip(rows, heights, strict=True):
        _draw_row(sheet, pen, row, top, room)
        top += height
    if heat is not None:
        _draw_scale(sheet, pen, top + GAP, heat)
        top += LINE + 2 * GAP
    _write(pen, MARGIN, top, notes, MUTED)
    return sheet


def _row_height(row: Row, room: int) -> int:
    lines = max((len(wrapped(caption, CELL)) for caption in row.captions), default=0)
    height, width = row.images[0].shape[:2]
    above = len(wrapped(row.title, room)) if row.title else 0
    return (above + lines) * LINE + round(CELL * height / width) + GAP + (LINE // 2 if above else 0)


def _draw_row(sheet: Image.Image, pen: ImageDraw.ImageDraw, row: Row, top: int, room: int) -> None:
    if row.title:
        top += LINE // 2
        lines = wrapped(row.title, room)
        _write(pen, MARGIN, top, lines, INK)
        top += len(lines) * LINE
    captions = [wrapped(caption, CELL) for caption in row.captions]
    most = max(map(len, captions), default=0)
    for column, image_HWC in enumerate(row.images):
        left = MARGIN + column * (CELL + GAP)
        if column < len(captions):
            _write(pen, left, top + (most - len(captions[column])) * LINE, captions[column], MUTED)
        cell = scaled(image_HWC, CELL)
        corner = (left, top + most * LINE)
        sheet.paste(cell, corner)
        if column in row.marked:
            pen.rectangle((*corner, corner[0] + cell.width - 1, corner[1] + cell.height - 1), outline=GOOD, width=3)


def _draw_scale(sheet: Image.Image, pen: ImageDraw.ImageDraw, top: int, most: float) -> None:
    """Draws the colours of a heat map with what they mean."""
    before, after = "difference: none", f"{most:.0%} of full brightness or more"
    pen.text((MARGIN, top), before, MUTED, font())
    left = MARGIN + round(font().getlength(before)) + 8
    sheet.paste(Image.fromarray(heat_map(np.linspace(0, most, CELL)[None].repeat(LINE - 4, 0), most)), (left, top))
    pen.text((left + CELL + 8, top), after, MUTED, font())


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[str], colour: str, size: int = TEXT) -> None:
    for number, line in enumerate(lines):
        pen.text((left, top + number * (size + (LINE - TEXT))), line, colour, font(size, line))


def scaled(image_HWC: np.ndarray, width: int) -> Image.Image:
    """Returns an image at this width."""
    image = Image.fromarray(image_HWC)
    return image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)


def heat_map(difference_HW: np.ndarray, most: float) -> np.ndarray:
    """Returns differences from 0 (black) to `most` or more (light yellow) as colours, uint8 [H, W, 3]."""
    places = np.clip(difference_HW / most, 0, 1) * (len(HEAT) - 1)
    channels = [np.interp(places, range(len(HEAT)), HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def largest(differences: np.ndarray) -> float:
    """Returns a round end for the scale of heat maps: all but the largest half percent of the differences lie below."""
    return max(0.05, math.ceil(20 * float(np.quantile(differences, 0.995))) / 20)


def captioned(frame_HWC: np.ndarray, lines: Sequence[str], colour: str = INK, width: int = 0) -> np.ndarray:
    """Returns a frame, at least `width` wide, above a bar of this colour with lines of text. Its sides are even."""
    image = scaled(frame_HWC, max(width, frame_HWC.shape[1]))
    height = image.height + len(lines) * LINE + 8
    framed = Image.new("RGB", (image.width + image.width % 2, height + height % 2), colour)
    framed.paste(image, (0, 0))
    room = image.width - 2 * GAP - 4
    _write(
        ImageDraw.Draw(framed),
        GAP + 2,
        image.height + 4,
        [_shortened(drawable(each), room, TEXT) for each in lines],
        PAPER,
    )
    return np.asarray(framed)


def save_animation(path: Path, images: Sequence[Image.Image], seconds: float) -> None:
    """Writes an animated WebP that repeats, each image for so many seconds and the last for twice as long."""
    times = [round(1000 * seconds)] * (len(images) - 1) + [round(2000 * seconds)]
    with atomic_path(path) as temporary:
        images[0].save(temporary, "WEBP", save_all=True, append_images=images[1:], duration=times, loop=0, quality=85)


Points = Sequence[tuple[float, float]]


def charts(panels: Mapping[str, Mapping[str, Points]], across: str) -> Image.Image:
    """Draws a chart for each panel, with a line for each name, in one colour and order in all of them.

    Values that are not finite are left out. Many points are drawn pale, with their mean over a window as the line. An
    axis is logarithmic where positive values differ by more than a factor of 30.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = {name: SERIES[number % len(SERIES)] for number, name in enumerate(names)}
    columns = min(CHARTS_ACROSS, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend = _legend(names, colours, columns * CHART_WIDTH * SMOOTH) if len(names) > 1 else None
    head = legend.height if legend else 0
    sheet = Image.new("RGB", (columns * CHART_WIDTH * SMOOTH, head + rows * CHART_HEIGHT * SMOOTH), PAPER)
    if legend:
        sheet.paste(legend, (0, 0))
    for number, (title, lines) in enumerate(panels.items()):
        left, top = number % columns * CHART_WIDTH * SMOOTH, head + number // columns * CHART_HEIGHT * SMOOTH
        sheet.paste(_chart(title, lines, colours, across), (left, top))
    return sheet.resize((sheet.width * 3 // 4, sheet.height * 3 // 4), Image.Resampling.LANCZOS)


def _legend(names: Sequence[str], colours: Mapping[str, str], width: int) -> Image.Image:
    """Draws the names behind their colours, in as many lines as they need."""
    line = LINE * SMOOTH
    places, left, top = [], MARGIN * SMOOTH, GAP * SMOOTH
    for name in names:
        text = drawable(name)
        taken = 3 * line + round(font(TEXT * SMOOTH, text).getlength(text))
        if left + taken > width and left > MARGIN * SMOOTH:
            left, top = MARGIN * SMOOTH, top + line
        places.append((left, top))
        left += taken
    legend = Image.new("RGB", (width, top + line), PAPER)
    pen = ImageDraw.Draw(legend)
    for name, (left, top) in zip(names, places, strict=True):
        pen.line((left, top + line // 2, left + line, top + line // 2), colours[name], 3 * SMOOTH)
        text = drawable(name)
        pen.text((left + line + GAP * SMOOTH, top), text, INK, font(TEXT * SMOOTH, text))
    return legend


def _chart(title: str, lines: Mapping[str, Points], colours: Mapping[str, str], across: str) -> Image.Image:
    width, height = CHART_WIDTH * SMOOTH, CHART_HEIGHT * SMOOTH
    left, right, top, bottom = 58 * SMOOTH, width - MARGIN * SMOOTH, (LINE + 12) * SMOOTH, height - 42 * SMOOTH
    chart = Image.new("RGB", (width, height), PAPER)
    pen, letters = ImageDraw.Draw(chart), font(12 * SMOOTH)
    heading = _shortened(drawable(title), right - left, TEXT * SMOOTH)
    pen.text((left, 6 * SMOOTH), heading, INK, font(TEXT * SMOOTH, heading))
    finite = {name: [(x, y) for x, y in points if abs(y) <= LARGEST] for name, points in lines.items()}
    values = [y for points in finite.values() for _, y in points]
    if not values:
        pen.text(((left + right) // 2, (top + bottom) // 2), "no finite value", MUTED, letters, anchor="mm")
        return chart
    logarithmic = min(values) > 0 and max(values) > 30 * min(values)
    scale = math.log10 if logarithmic else float
    low, high = _widened(scale(min(values)), scale(max(values)))
    most = max(x for points in finite.values() for x, _ in points) or 1

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / most * (right - left), bottom - (scale(y) - low) / (high - low) * (bottom - top)

    for tick in _decades(low, high) if logarithmic else _ticks(low, high):
        _, y = at(0, tick)
        pen.line((left, y, right, y), RULE, SMOOTH)
        pen.text((left - 6 * SMOOTH, y), f"{tick:.4g}", MUTED, letters, anchor="rm")
    for tick in _ticks(0, most, 4):
        x, _ = at(tick, 10**low if logarithmic else low)
        pen.line((x, bottom, x, bottom + 4 * SMOOTH), MUTED, SMOOTH)
        anchor = "rt" if x > right - 20 * SMOOTH else "mt"
        pen.text((x, bottom + 6 * SMOOTH), f"{tick:,.10g}", MUTED, letters, anchor=anchor)
    pen.line((left, bottom, right, bottom), MUTED, SMOOTH)
    pen.text(((left + right) / 2, bottom + 22 * SMOOTH), across, MUTED, letters, anchor="mt")
    for pale in (True, False):
        for name, points in finite.items():
            many = len(points) > MAX_POINTS
            colour = _pale(colours[name]) if pale else colours[name]
            drawn = [at(x, y) for x, y in (_means(points) if many and not pale else points)]
            if (many or not pale) and len(drawn) > 1:
                pen.line(drawn, colour, (1 if pale else 2) * SMOOTH, joint="curve")
            for x, y in drawn if len(drawn) <= 12 and not pale else ():
                pen.ellipse((x - 3 * SMOOTH, y - 3 * SMOOTH, x + 3 * SMOOTH, y + 3 * SMOOTH), colour)
    return chart


def _means(points: Points) -> list[tuple[float, float]]:
    """Returns the mean of the values around each point, over a window that is smaller at both ends."""
    half = len(points) // WINDOWS // 2
    totals = np.concatenate([[0.0], np.cumsum([y for _, y in points])])
    means = []
    for number, (x, _) in enumerate(points):
        reach = min(half, number, len(points) - 1 - number)
        means.append((x, float(totals[number + reach + 1] - totals[number - reach]) / (2 * reach + 1)))
    return means


def _pale(colour: str) -> tuple[int, ...]:
    return tuple(int(0.3 * int(colour[at : at + 2], 16) + 0.7 * 255) for at in (1, 3, 5))


def _widened(low: float, high: float) -> tuple[float, float]:
    """Returns the ends with a little room on both sides."""
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns at most about `most` round numbers between two ends."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Returns the powers of ten, or 1, 2 and 5 times those where there are few, between two ends as logarithms."""
    factors = (1,) if high - low > 3 else (1, 2, 5)
    values = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high)) for factor in factors]
    return [value for value in values if low <= math.log10(value) <= high]
