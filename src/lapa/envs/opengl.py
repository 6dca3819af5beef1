"""Whether a simulator can render here, tried in a process of its own; most are built on MuJoCo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from lapa.errors import UserError

DEBIAN_PACKAGES = "libegl1 libegl-mesa0 libgl1-mesa-dri libgl1"

# A first image may take a minute where a driver compiles its shaders on a busy CPU.
PROBE_SECONDS = 120

_PROBE = """
import mujoco
ball = "<mujoco><worldbody><light pos='0 0 3'/><geom size='.5' rgba='1 0 0 1'/></worldbody></mujoco>"
model = mujoco.MjModel.from_xml_string(ball)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
image = renderer.render()
renderer.close()
raise SystemExit(0 if image.std() > 1 else "the image is blank")
"""


def choose_backend() -> None:
    """Chooses EGL on Linux, unless the user chose otherwise; MuJoCo reads MUJOCO_GL once, when it is imported."""
    if sys.platform != "linux" or "MUJOCO_GL" in os.environ:
        return
    if "mujoco" in sys.modules:
        raise UserError("mujoco was imported before its backend was chosen; set MUJOCO_GL=egl before importing it")
    os.environ["MUJOCO_GL"] = "egl"


def check_rendering() -> None:
    """Raises UserError, with the fix, where images cannot be rendered.

    Renders one image in a process of its own, so that a crash of the driver does not end this one.
    """
    choose_backend()
    backend = os.environ.get("MUJOCO_GL", "the default backend")
    _, reason = run_probe(_PROBE)
    if reason:
        raise UserError(
            f"MuJoCo cannot render without a screen through {backend} ({reason}); "
            f"on Debian or Ubuntu: apt-get install {DEBIAN_PACKAGES}; MUJOCO_GL names another backend"
        )


def run_probe(code: str, environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Runs code that renders an image in a process of its own; returns what it prints, and why it failed, or "".

    environment: variables that it has more than this process.
    """
    command = [sys.executable, "-W", "ignore", "-c", code]
    variables = {**os.environ, **(environment or {})}
    try:
        probe = subprocess.run(
            command, capture_output=True, text=True, check=False, env=variables, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"no image within {PROBE_SECONDS} seconds"
    if probe.returncode == 0:
        return probe.stdout.strip(), ""
    lines = probe.stderr.strip().splitlines()
    return "", lines[-1] if lines else f"exit status {probe.returncode}"
