"""Stand-ins for what Language Table's simulator imports and hardly uses: TensorFlow, TF-Agents, the old Gym, a plotter.

Its files keep the modules that they import, so `stand_ins()` is needed only around the imports.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class PyPolicy:
    """The base class of the oracle."""

    def __init__(self, *_: object) -> None:
        pass


def _modules() -> dict[str, ModuleType]:
    names = ("tensorflow", "tf_agents", "tf_agents.policies", "tf_agents.trajectories")
    contents: dict[str, dict[str, Any]] = {
        **{name: {} for name in names},
        "tf_agents.policies.py_policy": {"PyPolicy": PyPolicy},
        "tf_agents.trajectories.policy_step": {},
        "tf_agents.trajectories.time_step": {},
        # It draws plans for debugging, with matplotlib and imageio.
        "language_table.environments.oracles.plot": {},
    }
    made = {"gym": importlib.import_module("gymnasium")}
    for name, attributes in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(attributes)
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
