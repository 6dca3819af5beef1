"""lapa envs: which environments work here is found out in a process of its own, with a reason and a fix where not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lapa.envs import listing, opengl
from lapa.envs.listing import EnvsConfig, run, try_out
from lapa.errors import UserError

OTHERS = """
import os, time
from dataclasses import replace
import numpy as np
from lapa.envs.synthetic import SYNTHETIC, SquareEnvironment
from lapa.errors import UserError

class Blank(SquareEnvironment):
    def observe(self):
        seen = super().observe()
        return replace(seen, images={name: np.zeros_like(image) for name, image in seen.images.items()})

class Crashing(SquareEnvironment):
    def observe(self):
        os.abort()

class Hanging(SquareEnvironment):
    def observe(self):
        time.sleep(100)

class Wrong(SquareEnvironment):
    def observe(self):
        raise KeyError("pixels")

def refuse():
    raise UserError("no driver; apt-get install driver")

FINE = replace(SYNTHETIC, check=lambda: {"renderer": "a GPU"})
BLANK, CRASHING, HANGING, WRONG = (replace(SYNTHETIC, make=kind) for kind in (Blank, Crashing, Hanging, Wrong))
LACKING = replace(SYNTHETIC, packages=("no-such-simulator",), title="Theirs")
REFUSING = replace(SYNTHETIC, check=refuse, also_needs="a driver")
"""
NAMES = ("fine", "blank", "crashing", "hanging", "wrong", "lacking", "refusing")


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers other people's environments, in this process and those that it starts."""
    (tmp_path / "theirs.py").write_text(OTHERS)
    (tmp_path / "theirs-1.0.dist-info").mkdir()
    (tmp_path / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\n")
    lines = "\n".join(f"{name} = theirs:{name.upper()}" for name in NAMES)
    (tmp_path / "theirs-1.0.dist-info" / "entry_points.txt").write_text(
        f"[lapa.environments]\n{lines}\nunmade = unmade:KIND\n"
    )
    # Made where it is imported, as gymnasium_kind makes one.
    (tmp_path / "unmade.py").write_text("raise RuntimeError('no display')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("blank", "blank: its image is blank"),
        ("crashing", "crashing: its process ended with status -6"),
        ("wrong", r"wrong: KeyError: 'pixels' \(in observe of .*theirs.py\)"),
        ("unmade", r"unmade: RuntimeError: no display \(in <module> of unmade.py\)"),
        ("lacking", "Theirs needs no-such-simulator; install it: pip install no-such-simulator"),
        ("refusing", "no driver; apt-get install driver"),
    ],
)
def test_why_an_environment_does_not_work_is_one_line(others: None, name: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        try_out(name)


def test_one_that_hangs_is_given_up(others: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LONGEST_SECONDS", 5)
    with pytest.raises(UserError, match="hanging: no image within 5 seconds"):
        try_out("hanging")


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opengl, "PROBE_SECONDS", 1)
    monkeypatch.setattr(opengl, "_PROBE", "import time; time.sleep(60)")
    with pytest.raises(UserError, match=r"MuJoCo cannot render .* \(no image within 1 seconds\)"):
        opengl.check_rendering()


def test_the_table_has_all_and_their_remarks(
    others: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "names", lambda: ("synthetic", "fine", "unmade", "refusing"))
    run(EnvsConfig())
    printed = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in (line.replace("│", " ").split() for line in printed.splitlines()) if row}
    assert rows["synthetic"] == ["8", "nothing", "yes"] and rows["fine"] == ["8", "nothing", "yes"]
    assert rows["refusing"] == ["8", "a", "driver", "no"]
    assert rows["unmade"] == ["?", "?", "no"] and "unmade: RuntimeError: no display" in printed
    with pytest.raises(UserError, match="unmade: RuntimeError: no display"):
        run(EnvsConfig("unmade"))
    assert "fine: renderer: a GPU" in printed and "refusing: no driver; apt-get install driver" in printed


def test_one_environment_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    run(EnvsConfig("synthetic"))
    printed = capsys.readouterr().out
    assert "down-left" in printed and "rate: 10 Hz" in printed and "synthetic works on this machine" in printed
    with pytest.raises(UserError, match="did you mean 'synthetic'"):
        run(EnvsConfig("syntetic"))


def test_the_table_of_environments_imports_no_simulator_and_no_torch() -> None:
    code = "import sys, lapa.envs.listing; print({'torch', 'mujoco', 'pybullet', 'libero'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
