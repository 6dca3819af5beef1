"""During tests the shapes of boundary objects are checked, and the Hugging Face hub is not contacted."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Before anything imports lapa.types: its annotations become checks.
install_import_hook(["lapa.types"], "beartype.beartype")


@pytest.fixture
def edited_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets may be edited after they were written, as if they were of a program that writes no checksums."""
    monkeypatch.setattr("lapa.data.lerobot.each_sum", lambda root: ())


@pytest.fixture(scope="session")
def simulators() -> None:
    """Skips where Meta-World or its rendering is missing."""
    from lapa.envs.metaworld.simulator import METAWORLD

    try:
        METAWORLD.check_machine()
    except ValueError as error:
        pytest.skip(str(error))
