"""During tests the shapes of boundary objects are checked, and the Hugging Face hub is not contacted."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Before anything imports lapa.types: its annotations become checks.
install_import_hook(["lapa.types"], "beartype.beartype")
