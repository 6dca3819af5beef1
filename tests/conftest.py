"""Shapes of boundary objects are checked while testing, and tests stay off the network."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Before anything imports the package: the annotations of lapa.types become checks.
install_import_hook(["lapa.types"], "beartype.beartype")
