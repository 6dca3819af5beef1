"""Writes episodes of your own robot as a dataset to finetune on.

    python examples/own_robot.py DATASET

Replace `episodes` by a function that reads your recordings. Images are uint8 RGB of even height and width. Row t of
the actions is the robot's action after image t, in the robot's own units.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import lapa

ACTION_NAMES = ("dx", "dy", "dz", "gripper")


def episodes() -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    """Yields name, images [T, H, W, 3], actions [T, A] and instruction of each episode: random ones here."""
    rng = np.random.default_rng(0)
    for number in range(3):
        frames_THWC = rng.integers(0, 256, (20, 96, 128, 3), dtype=np.uint8)
        moves_T3, gripper_T1 = rng.uniform(-1, 1, (20, 3)), rng.choice([0.0, 1.0], (20, 1))
        actions_TA = np.concatenate([moves_T3, gripper_T1], axis=1).astype(np.float32)
        yield f"recording_{number}", frames_THWC, actions_TA, "lift the cup"


def main(out: Path) -> None:
    writer = lapa.DatasetWriter(
        out,
        fps=10,
        cameras={"front": (96, 128)},
        action_names=ACTION_NAMES,
        binary_actions=("gripper",),
        control="delta",
        robot_type="mine",
    )
    for name, frames_THWC, actions_TA, instruction in episodes():
        writer.add_episode({"front": frames_THWC}, instruction, actions=actions_TA, source=name)
    dataset = writer.finish()
    print(f"{out}: {len(dataset)} episodes, {dataset.num_frames} frames")
    print(f"next: lapa policy finetune --preset PRESET --policy LATENT_POLICY --data {out} --out POLICY")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
