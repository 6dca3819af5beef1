"""Adds lapa_client.py to the distributions: the client in lapa's own tree, or its copy where an sdist is unpacked."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ClientHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        in_sdist = Path(self.root, "lapa_client.py")
        in_tree = Path(self.root).parents[1] / "src/lapa/serve/client.py"
        build_data["force_include"][str(in_sdist if in_sdist.exists() else in_tree)] = "lapa_client.py"
