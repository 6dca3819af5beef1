"""PushT, a Gymnasium environment of others (https://github.com/huggingface/gym-pusht), for `lapa evaluate`.

    pip install ./examples/pusht
    lapa evaluate random --env pusht --tasks all --episodes 5 --out RESULTS

A distribution of your own has these lines for your environment, and names them in its pyproject.toml.
"""

import gym_pusht  # noqa: F401  registers the environment
import gymnasium

from lapa.envs.gymnasium import gymnasium_kind


class Described(gymnasium.Wrapper):
    """Has the instruction that PushT lacks. An environment with a `task_description` needs no wrapper."""

    task_description = "push the T onto its outline"


def make() -> gymnasium.Env:
    return Described(gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos"))


PUSHT = gymnasium_kind("PushT", {"push-t": make}, packages=("gym-pusht",))
