"""Your own robot's episodes as a dataset to finetune on.

    python examples/own_robot.py DATASET

Replace `episodes` by whatever reads your recordings. Pictures are uint8 RGB of even height and width, row t of the
actions is what the robot did after picture t, in its own units.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lapa.data.writer import DatasetWriter

ACTION_NAMES = ("dx", "dy", "dz", "gripper")


def episodes() -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    """Name, pictures [T, H, W, 3], actions [T, A] and instruction of each episode: made up here."""
    rng = np.random.default_rng(0)
    for number in range(3):
        frames_THWC = rng.integers(0, 256, (20, 96, 128, 3), dtype=np.uint8)
        moves_T3, gripper_T1 = rng.uniform(-1, 1, (20, 3)), rng.choice([0.0, 1.0], (20, 1))
        actions_TA = np.concatenate([moves_T3, gripper_T1], axis=1).astype(np.float32)
        yield f"recording_{number}", frames_THWC, actions_TA, "lift the cup"


def main(out: Path) -> None:
    writer = DatasetWriter(
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
    print(f"{out}: {len(dataset.episodes)} episodes, {dataset.num_frames} frames")
    print(f"next: lapa policy finetune --policy LATENT_POLICY --data {out} --out POLICY")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
