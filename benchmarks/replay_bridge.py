"""Replays recorded actions of BridgeData in SIMPLER's WidowX and compares where the hand ends: a check of conventions.

    python benchmarks/replay_bridge.py rlds:bridge_dataset/1.0.0,camera=image_0       # minutes on a CPU

The arm starts where the recording does, by inverse kinematics on the recorded state. The objects are SIMPLER's, not the
recording's, so contacts differ. `unmoved` is the error of an arm that stays at its start.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from scipy.spatial.transform import Rotation

import lapa
from lapa.console import say
from lapa.envs.simpler import CAMERAS, CLOSED, DOWN, OPEN, SIMPLER, Simulator, to_simulator

# How an action could be given to ManiSkill's controller.
READINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as lapa converts them": to_simulator,
    "angles unchanged": lambda action: np.r_[action[:6], to_simulator(action)[6:]],
    "in the world's frame": lambda action: to_simulator(action) * (-1, -1, 1, -1, -1, 1, 1),
}


def place(environment: Simulator, state: np.ndarray) -> None:
    """Puts the arm where a recorded state is."""
    import torch
    from mani_skill.utils.structs.pose import Pose

    environment.reset(0, episode=0)
    agent = environment._environment.agent
    arm = agent.controller.controllers["arm"]
    rotation = Rotation.from_euler("xyz", state[3:6]) * DOWN
    position, quaternion = torch.tensor(state[None, :3]), torch.tensor(rotation.as_quat(scalar_first=True)[None])
    joints = agent.robot.get_qpos().clone()
    solved = arm.kinematics.compute_ik(Pose.create_from_pq(position, quaternion.float()), joints)
    assert solved is not None, "the recorded pose is out of the arm's reach"
    joints[0, :6] = solved[0]
    joints[0, 6:] = float(CLOSED + (OPEN - CLOSED) * state[6])
    agent.reset(init_qpos=joints)
    arm._target_pose = arm.ee_pose_at_base


def errors(state: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Returns the distance in mm and the angle in degrees between two states."""
    turn = Rotation.from_euler("xyz", state[3:6]).inv() * Rotation.from_euler("xyz", other[3:6])
    return 1000 * float(np.linalg.norm(state[:3] - other[:3])), np.degrees(turn.magnitude())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="BridgeData, as --data takes it")
    dataset = lapa.open_dataset(parser.parse_args().data)
    SIMPLER.check_machine()
    environment = Simulator("widowx_carrot_on_plate", size=64, cameras=CAMERAS)
    found: dict[str, list[tuple[float, float]]] = {"unmoved": []}
    for episode in range(len(dataset)):
        states_TS, actions_TA = dataset.states(episode), dataset.actions(episode)
        found["unmoved"].append(errors(states_TS[-1], states_TS[0]))
        for name, reading in READINGS.items():
            place(environment, states_TS[0])
            for action in actions_TA[:-1]:
                environment._environment.step(reading(action))
            found.setdefault(name, []).append(errors(states_TS[-1], environment.observe().state))
    say(f"{len(dataset)} episodes of {dataset.num_frames} frames; the median error at an episode's end")
    for name, pairs in found.items():
        distance, angle = np.median(pairs, axis=0)
        say(f"{name:24s} {distance:6.1f} mm {angle:6.2f} degrees")


if __name__ == "__main__":
    main()
