"""Calls functions once another module has been imported, so that `import lapa` need not import it.

after_import("transformers.models.auto.modeling_auto", "lapa.automodel:register_models")
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(module: str, function: str) -> None:
    """Calls `function` ("module:name") after `module` is imported; at once where it has been."""
    if module in sys.modules:
        _call(function)
        return
    sys.meta_path.insert(0, _Watch(module, function))


class _Watch(MetaPathFinder):
    """Finds one module as the other finders do, and has the function called at the end of its execution."""

    def __init__(self, module: str, function: str) -> None:
        self.module, self.function = module, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_call(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _call(self.function)

            spec.loader.exec_module = then_call  # type: ignore[method-assign]
        return spec


def _call(function: str) -> None:
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)()
