"""`make` on a machine whose Python is too old says so, before it makes anything; the oldest versions are tested."""

import itertools
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
OLD_PYTHON = """#!/bin/sh
exec {python} -c 'import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])' "$2"
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["setup", "test", "demo"])
def test_an_old_python_is_named_with_what_is_needed(tmp_path: Path, target: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text(OLD_PYTHON.format(python=sys.executable))
    old.chmod(0o755)
    done = subprocess.run(["make", f"PYTHON={old}", target], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "lapa needs Python 3.11 or newer" in done.stderr
    assert "is 3.9. Run: make PYTHON=python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("installed", [["libegl1"], ["libegl1", "libegl-mesa0", "libgl1-mesa-dri", "libgl1"]])
def test_rendering_is_installed_where_one_of_its_packages_lacks(tmp_path: Path, installed: list[str]) -> None:
    asked = tmp_path / "asked"
    programs = {
        "dpkg": f'shift; for name; do case " {" ".join(installed)} " in *" $name "*) ;; *) exit 1 ;; esac; done',
        "apt-get": f'echo "$@" >> {asked}',
        "id": "echo 0",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["make", "-f", str(ROOT / "Makefile"), "egl"], cwd=tmp_path, env=environment, check=True)
    assert asked.exists() == (len(installed) == 1)
    assert not asked.exists() or "libgl1-mesa-dri" in asked.read_text()


def test_the_tested_floors_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    requirements = [Requirement(line) for line in lines if not line.startswith(project["name"])]
    for name in ("constraints-floors.txt", "constraints.txt"):
        pins = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        versions = {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}
        for requirement in requirements:
            floor = Version(str(requirement.specifier).removeprefix(">="))
            version = versions[canonicalize_name(requirement.name)]
            assert version == floor if name == "constraints-floors.txt" else version >= floor, requirement
