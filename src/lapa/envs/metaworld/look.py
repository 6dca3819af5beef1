"""Another look for a Meta-World scene: colours, textures and lights drawn from a number; no motion changes.

    lapa data metaworld --tasks mt10 --look 3 --cameras corner3 --out VIDEOS

Table, floor, wall, robot and lights are the same in all tasks of a look. Goal markers (sites) keep their colours; every
new colour is far from those, from the table's, and from the one that it replaces.

Axes: H W texture, N candidates, C colour (3: red, green, blue in [0, 1]), K colours to avoid.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lapa.errors import UserError

# Textures of the scene around the task, and the colours of the robot: arm, pedestal, hand, and the two fingers.
SURFACES = ("T_table", "T_floor", "T_wallmetal")
ROBOT = ((0.5, 0.1, 0.1), (0.2, 0.2, 0.2), (0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0))
# MuJoCo's colour of a geom without one, which shows its material's.
UNPAINTED = (0.5, 0.5, 0.5, 1.0)
# The colours of Meta-World's goal markers.
MARKERS = ((0, 0.8, 0), (0.8, 0, 0), (1, 0, 0), (0, 0, 0.8), (0, 0, 1))
CANDIDATES = 256
SKYBOX = 2


def change_look(model: Any, look: int) -> None:
    """Paints a `mujoco.MjModel`, in place. The same number gives the same look.

    Call it before an OpenGL context is made, which copies the textures. Raises UserError for a negative number.
    """
    if look < 0:
        raise UserError(f"the look must not be negative, got {look}")
    table = _paint_surfaces(model, look)
    _paint_objects(model, look, table)
    _light(model, look)


def _paint_surfaces(model: Any, look: int) -> np.ndarray:
    """Paints table, floor, wall and sky, and returns the table's colour."""
    avoid: list[np.ndarray] = []
    for name in SURFACES:
        rng = _generator(look, name)
        texture = model.texture(name).id
        pixels_HWC = _pixels(model, texture)
        before_C = pixels_HWC.mean((0, 1)) / 255
        colour_C = _draw(rng, (0.15, 0.45), (0.35, 0.9), [before_C, *avoid], apart=0.25)
        pixels_HWC[:] = _pattern(pixels_HWC, rng)[..., None]
        for material in np.flatnonzero((model.mat_texid == texture).any(1)):
            model.mat_rgba[material, :3] = colour_C
        avoid.append(colour_C)
    rng = _generator(look, "sky")
    for texture in np.flatnonzero(model.tex_type == SKYBOX):
        pixels_HWC = _pixels(model, int(texture))
        sky_C = _draw(rng, (0.1, 0.5), (0.4, 1.0), [], apart=0.0)
        pixels_HWC[:] = (_pattern(pixels_HWC)[..., None] * sky_C).astype(np.uint8)
    return avoid[0]


def _paint_objects(model: Any, look: int, table_C: np.ndarray) -> None:
    """Paints the robot and the task's objects: parts of one colour get one new colour."""
    surfaces = {model.texture(name).id for name in SURFACES}
    rows: dict[tuple[float, ...], list[np.ndarray]] = {key: [] for key in ROBOT}
    for material in range(model.nmat):
        textures = {int(texture) for texture in model.mat_texid[material] if texture >= 0}
        if textures & surfaces:
            continue
        key = _key(model.mat_rgba[material, :3])
        for texture in textures:
            pixels_HWC = _pixels(model, texture)
            # Materials of one colour differ by their textures: multiply by the texture's mean colour.
            key = _key(np.array(key) * pixels_HWC.mean((0, 1)) / 255)
        rows.setdefault(key, []).append(model.mat_rgba[material])
    for texture in set(range(model.ntex)) - surfaces - set(np.flatnonzero(model.tex_type == SKYBOX).tolist()):
        pixels_HWC = _pixels(model, texture)
        pixels_HWC[:] = _pattern(pixels_HWC)[..., None]
    for geom in range(model.ngeom):
        if model.geom_matid[geom] < 0 or tuple(model.geom_rgba[geom].tolist()) != UNPAINTED:
            rows.setdefault(_key(model.geom_rgba[geom, :3]), []).append(model.geom_rgba[geom])
    avoid = [np.array(colour, float) for colour in MARKERS] + [table_C]
    # The robot first, so that it is the same in every task.
    for key in [*ROBOT, *sorted(set(rows) - set(ROBOT))]:
        colour_C = _draw(_generator(look, str(key)), (0.2, 0.9), (0.25, 0.95), [np.array(key), *avoid], apart=0.35)
        for rgba in rows[key]:
            rgba[:3] = colour_C
        avoid.append(colour_C)


def _light(model: Any, look: int) -> None:
    """Rotates the lights about the vertical axis, and scales their brightness and tint."""
    rng = _generator(look, "light")
    angle = rng.uniform(-np.pi, np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    tint_C = rng.uniform(0.85, 1.15, 3)
    model.light_pos[:, :2] @= turn.T
    model.light_dir[:, :2] @= turn.T
    model.light_diffuse[:] *= rng.uniform(0.7, 1.2, (model.nlight, 1)) * tint_C
    headlight = model.vis.headlight
    headlight.ambient[:] *= rng.uniform(0.8, 1.1) * tint_C
    headlight.diffuse[:] *= rng.uniform(0.7, 1.1)


def _draw(
    rng: np.random.Generator,
    saturation: tuple[float, float],
    value: tuple[float, float],
    avoid_KC: Sequence[np.ndarray],
    *,
    apart: float,
) -> np.ndarray:
    """Draws a colour at least `apart` from those to avoid: the first such candidate, else the farthest."""
    hsv_NC = rng.uniform((0, saturation[0], value[0]), (1, saturation[1], value[1]), (CANDIDATES, 3))
    colours_NC = np.array([colorsys.hsv_to_rgb(*hsv_C) for hsv_C in hsv_NC])
    distances_N = np.full(CANDIDATES, np.inf)
    for other_C in avoid_KC:
        distances_N = np.minimum(distances_N, np.linalg.norm(colours_NC - other_C, axis=1))
    return colours_NC[np.argmax(np.minimum(distances_N, apart))]


def _pattern(pixels_HWC: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """The texture's own grain in grey, uint8 [H, W]; with `rng` plain, striped or checked."""
    grey_HW = pixels_HWC.mean(-1)
    pattern_HW = np.clip(grey_HW / max(grey_HW.mean(), 1.0), 0.4, 1.2) / 1.2
    if rng is not None:
        kind, count, shade = rng.choice(["grain", "stripes", "checks"]), rng.integers(2, 7), rng.uniform(0.6, 0.85)
        down_H, across_W = (np.arange(size) * 2 * count // size % 2 for size in pattern_HW.shape)
        dark_HW = {
            "grain": np.zeros((1, 1), bool),
            "stripes": across_W[None] == 1,
            "checks": (down_H[:, None] + across_W[None]) == 1,
        }[str(kind)]
        pattern_HW = pattern_HW * np.where(dark_HW, shade, 1.0)
    return (255 * pattern_HW).astype(np.uint8)


def _pixels(model: Any, texture: int) -> np.ndarray:
    """A view of a texture's pixels, uint8 [H, W, C]."""
    shape = model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture]
    first = model.tex_adr[texture]
    return model.tex_data[first : first + int(np.prod(shape, dtype=np.int64))].reshape(shape)


def _key(colour_C: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(channel), 2) for channel in colour_C)


def _generator(look: int, name: str) -> np.random.Generator:
    """Returns a generator for each name, so that parts that a task lacks do not change the others."""
    return np.random.default_rng([look, zlib.crc32(name.encode())])
