"""Made-up videos with a known answer: a square that moves in one of eight directions over a noisy ground.

    lapa data synthetic --out DATASET

The preset `debug`, the tests and the environment `synthetic` use it.
Axes: N pairs, T time, C channel, H W image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int64, UInt8

from lapa.config import require_at_least
from lapa.console import finish, progress, say
from lapa.data.dataset import Dataset
from lapa.data.metadata import INFO
from lapa.data.writer import DatasetWriter
from lapa.files import claim_output
from lapa.locks import locks_output

# Direction k points at k * 45 degrees, counted from the right, anticlockwise.
DIRECTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
CAMERA = "front"
NOISE = 3.0  # Standard deviation of the pixel noise, of 255.


@dataclass(frozen=True)
class SyntheticConfig:
    """Write a small made-up dataset: a square that moves in one of eight directions."""

    out: Path
    """Folder of the dataset to write."""
    episodes: int = 32
    """Number of episodes; their directions take turns."""
    frames: int = 24
    """Frames of each episode."""
    size: int = 64
    """Height and width in pixels (even)."""
    fps: float = 10.0
    """Frames per second."""
    actions: bool = False
    """Write the true velocity (pixels a frame: right, down) as `action`, and the position as `observation.state`."""
    seed: int = 0
    """Seed of positions, colours and noise."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with what an interrupted run wrote."""


@locks_output
def run(config: SyntheticConfig) -> None:
    """`lapa data synthetic`."""
    require_at_least(config, episodes=1, frames=1, size=8, seed=0)
    out = config.out
    claim_output(out, complete=(out / INFO).exists(), overwrite=config.overwrite, resume=config.resume)
    names = ("episodes", "frames", "size", "fps", "actions", "seed", "resume")
    dataset = write_synthetic_dataset(out, **{name: getattr(config, name) for name in names})
    what = f"dataset of {len(dataset.episodes)} made-up episodes, {dataset.num_frames} frames"
    finish(what, out, [f"lapa data info {out}"])


def heading(direction: int) -> Float[np.ndarray, "2"]:
    """Returns the unit vector (right, down) of a direction."""
    angle = direction * np.pi / 4
    return np.array([np.cos(angle), -np.sin(angle)])


class Square:
    """A square and its ground. `start`, its first centre in pixels (right, down), leaves room for the whole `way`."""

    def __init__(self, rng: np.random.Generator, size: int, way: Float[np.ndarray, "2"]):
        """rng: draws place, colours and noise; size: of the image; way: where it will go, in pixels (right, down)."""
        # Sizes and colours for which copying the first frame of `moving_squares` errs by 0.011 in mean square.
        self.size, self.half = size, 0.08 * size
        low, high = self.half + np.maximum(-way, 0), size - self.half - np.maximum(way, 0)
        self.start = rng.uniform(low, high)
        self._ground, self._colour, self._rng = rng.uniform(0, 138, 3), rng.uniform(117, 255, 3), rng

    def image(self, centre: Float[np.ndarray, "2"]) -> UInt8[np.ndarray, "size size 3"]:
        """Returns the square at a place, with new noise."""
        right, down = centre
        pixels = np.arange(self.size) + 0.5
        inside_HW = (np.abs(pixels[:, None] - down) < self.half) & (np.abs(pixels[None] - right) < self.half)
        image_HWC = np.where(inside_HW[..., None], self._colour, self._ground)
        return (image_HWC + self._rng.normal(0, NOISE, image_HWC.shape)).clip(0, 255).astype(np.uint8)


def moving_squares(
    num: int, seed: int = 0, size: int = 64
) -> tuple[UInt8[np.ndarray, "N 2 3 size size"], Int64[np.ndarray, "N"]]:
    """`num` pairs of frames between which the square moves by an eighth of the image, and their directions 0..7."""
    rng = np.random.default_rng(seed)
    directions_N = rng.integers(0, len(DIRECTIONS), num)
    pairs = [_clip(rng, int(direction), 2, size, size / 8)[0] for direction in directions_N]
    frames_NTHWC = np.stack(pairs) if pairs else np.zeros((0, 2, size, size, 3), np.uint8)
    return np.ascontiguousarray(rearrange(frames_NTHWC, "n t h w c -> n t c h w")), directions_N


def write_synthetic_dataset(
    root: Path,
    episodes: int = 8,
    frames: int = 20,
    size: int = 64,
    fps: float = 10.0,
    actions: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> Dataset:
    """Writes a dataset of moving squares, one direction an episode, with the instruction "move up-left" or the like.

    actions: adds the velocity in pixels a frame (right, down) as `action`, the centre in pixels as the state.
    """
    names = ["right", "down"] if actions else None
    rng = np.random.default_rng(seed)
    writer = DatasetWriter(
        root,
        fps=fps,
        cameras={CAMERA: (size, size)},
        action_names=names,
        state_names=names,
        control="delta",
        robot_type="square",
        extra_info={"made_by": "lapa data synthetic", "episodes": episodes, "frames": frames, "seed": seed},
        resume=resume,
    )
    if writer.finished:
        say(f"{root}: already complete")
        return writer.finish()
    with progress() as bar:
        task = bar.add_task("writing", total=episodes, note="")
        for number in range(episodes):
            direction = number % len(DIRECTIONS)
            # The whole way must fit into the image.
            travel = rng.uniform(0.5, 0.7) * size
            frames_THWC, centres_T2 = _clip(rng, direction, frames, size, travel)
            source = f"{DIRECTIONS[direction]}/{number}"
            bar.advance(task)
            # Drawn all the same: the episodes after it come from the same generator.
            if source in writer.done_sources:
                continue
            velocity = np.diff(centres_T2, axis=0)
            velocity = np.concatenate([velocity, velocity[-1:]]) if len(velocity) else np.zeros_like(centres_T2)
            writer.add_episode(
                {CAMERA: frames_THWC},
                f"move {DIRECTIONS[direction]}",
                actions=velocity if actions else None,
                states=centres_T2 if actions else None,
                source=source,
            )
    return writer.finish()


def _clip(
    rng: np.random.Generator, direction: int, num_frames: int, size: int, travel: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a square moving `travel` pixels in all: frames [T, H, W, C] and its centres (right, down) [T, 2]."""
    way = heading(direction) * travel
    square = Square(rng, size, way)
    centres_T2 = (square.start + np.linspace(0, 1, num_frames)[:, None] * way).astype(np.float32)
    return np.stack([square.image(centre) for centre in centres_T2]), centres_T2
