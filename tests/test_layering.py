"""Who may import whom: a file imports only lower ranks or its own room (docs/design.md)."""

import ast
from pathlib import Path

import pytest

import lapa

PACKAGE = Path(lapa.__file__).parent
RANKS = {
    **dict.fromkeys(["types", "errors", "config", "files", "console"], 0),
    **dict.fromkeys(["nn", "engine", "data"], 1),
    **dict.fromkeys(["sources", "latent", "policy"], 2),
    **dict.fromkeys(["released", "baselines", "label", "envs"], 3),
    **dict.fromkeys(["evaluate"], 4),
    **dict.fromkeys(["presets", "stages", "demo", "study", "cli", "__main__"], 5),
}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a file names in any import, lazy ones included."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            modules = [node.module or ""]
            if node.module == "lapa":
                modules = [f"lapa.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {module.split(".")[1] for module in modules if module.startswith("lapa.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_lower_ranks_or_its_own_room(path: Path) -> None:
    own = room(path)
    for other in imported_rooms(path) - {own}:
        # Rank 0 and rank 5 are the ends of the flow, not rooms of one rank that must stay apart.
        allowed = RANKS[other] < RANKS[own] or RANKS[other] == RANKS[own] in (0, 5)
        assert allowed, f"{path.relative_to(PACKAGE)} (rank {RANKS[own]}) imports lapa.{other} (rank {RANKS[other]})"


def test_every_room_has_a_rank() -> None:
    assert {room(path) for path in FILES} == set(RANKS)


def test_the_rule_can_fail(tmp_path: Path) -> None:
    offender = tmp_path / "offender.py"
    offender.write_text("def f():\n    from lapa.cli import main\n    from lapa import demo\n")
    assert imported_rooms(offender) == {"cli", "demo"}
