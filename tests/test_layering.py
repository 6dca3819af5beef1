"""Who may import whom: a file imports only lower ranks or its own room (docs/design.md)."""

import ast
from pathlib import Path

import pytest

import lapa

PACKAGE = Path(lapa.__file__).parent
RANKS = {
    **dict.fromkeys(["types", "errors", "config", "files", "locks", "checksums", "console", "verdicts", "drawing"], 0),
    **dict.fromkeys(["hub", "on_import", "web", "ray_cluster", "store_cache", "stores"], 0),
    **dict.fromkeys(["nn", "engine", "data"], 1),
    **dict.fromkeys(["sources", "latent", "policy"], 2),
    **dict.fromkeys(["released", "baselines", "labelling", "envs"], 3),
    **dict.fromkeys(["evaluation", "serve"], 4),
    **dict.fromkeys(
        ["api", "automodel", "presets", "subcommand", "demo", "study", "view", "cli", "completion", "help", "__main__"],
        5,
    ),
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


def modules_of(package: Path) -> dict[str, Path]:
    """The files of a package by the name that imports give them."""
    parts = {path: path.relative_to(package.parent).with_suffix("").parts for path in package.rglob("*.py")}
    return {".".join(names).removesuffix(".__init__"): path for path, names in parts.items()}


def imported_files(modules: dict[str, Path]) -> dict[str, set[str]]:
    """For each module, those of the package that it imports anywhere, lazily or for annotations included.

    A package's __init__.py that Python runs on the way to a submodule does not count: only what is named does.
    """
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                # `from room import file` names the file; `from file import name` names the file before `import`.
                named |= {
                    full if (full := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
                }
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        edges[name] = named & set(modules) - {name}
    return edges


def circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """The groups of modules that import one another, directly or through others."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = edges[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = {name: reached(name) for name in edges}
    return {frozenset(other for other in reach[name] if name in reach[other]) for name in edges if name in reach[name]}


def test_files_import_one_another_without_circles() -> None:
    edges = imported_files(modules_of(PACKAGE))
    # The package itself names the public API for type checkers, and loads it when it is used.
    edges["lapa"] = set()
    assert circles(edges) == set()


def test_the_circle_finder_can_fail(tmp_path: Path) -> None:
    room = tmp_path / "toy" / "room"
    room.mkdir(parents=True)
    (tmp_path / "toy" / "__init__.py").write_text("")
    (room / "__init__.py").write_text("")
    (room / "a.py").write_text("from toy.room import b\n")
    (room / "b.py").write_text("def f():\n    from toy.room.c import g\n")
    (room / "c.py").write_text("import toy.room.a\nfrom toy.room.d import h\n")
    (room / "d.py").write_text("import ast\n")
    found = circles(imported_files(modules_of(tmp_path / "toy")))
    assert found == {frozenset({"toy.room.a", "toy.room.b", "toy.room.c"})}
