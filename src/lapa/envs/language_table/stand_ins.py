"""Stand-ins for what Language Table's simulator imports and hardly uses: TensorFlow, TF-Agents, the old Gym, a plotter.

Its files keep the modules that they import, so `stand_ins()` is needed only around the imports.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class PyPolicy:
    """The base class of the oracle, of which only the plans are used."""

    def __init__(self, *_: object) -> None:
        pass


def _modules() -> dict[str, ModuleType]:
    names = (
        "tensorflow", "tf_agents", "tf_agents.policies", "tf_agents.policies.py_policy", "tf_agents.trajectories",
        "tf_agents.trajectories.policy_step", "tf_agents.trajectories.time_step",
        # It draws plans for debugging, with matplotlib and imageio.
        "language_table.environments.oracles.plot",
    )  # fmt: skip
    made = {"gym": importlib.import_module("gymnasium"), **{name: ModuleType(name) for name in names}}
    vars(made["tf_agents.policies.py_policy"])["PyPolicy"] = PyPolicy
    return made


@contextmanager
def stand_ins() -> Iterator[None]:
    """While it lasts, imports find the stand-ins."""
    ours = _modules()
    theirs = {name: sys.modules[name] for name in ours if name in sys.modules}
    sys.modules.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del sys.modules[name]
        sys.modules.update(theirs)
