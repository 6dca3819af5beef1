"""A folder of stand-in assets for SIMPLER's tasks in ManiSkill 3: boxes on a plain table, and a WidowX made of boxes.

SIMPLER's own meshes and photographs come from a hub. The boxes have their sizes and the arm its lengths, so the tasks
run. They have nothing of the looks, so success rates say nothing of a policy: the file `STAND_IN` makes the results say
that they are not SIMPLER's.

    python tests/simpler_stand_in.py FOLDER && MS_ASSET_DIR=FOLDER lapa envs
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lapa.envs.simpler import ROBOT_FILE, STAND_IN, TASK_FOLDER

# Model -> size along each axis (metres), density (kg/m^3), colour.
MODELS = {
    "bridge_carrot_generated_modified": ((0.115, 0.032, 0.038), 700, (0.9, 0.4, 0.1)),
    "bridge_plate_objaverse_larger": ((0.11, 0.11, 0.006), 1000, (0.8, 0.9, 0.4)),
    "bridge_spoon_generated_modified": ((0.14, 0.0346, 0.026), 1200, (0.2, 0.7, 0.3)),
    "table_cloth_generated_shorter": ((0.1, 0.1, 0.01), 330, (0.5, 0.3, 0.7)),
    "eggplant": ((0.0783, 0.0374, 0.038), 400, (0.4, 0.1, 0.5)),
    "sink": ((0.269, 0.393, 0.01), 100000, (0.6, 0.6, 0.6)),
    "dummy_sink_target_plane": ((0.13, 0.08, 0.002), 100000, (0.9, 0.8, 0.1)),
    "baked_green_cube_3cm": ((0.03, 0.03, 0.03), 1000, (0.1, 0.7, 0.2)),
    "baked_yellow_cube_3cm": ((0.03, 0.03, 0.03), 1000, (0.9, 0.8, 0.1)),
}
# The top of the table in metres: below the plate, which the task puts down at 0.8695.
TABLE_HEIGHT = 0.866
# Where ManiSkill puts the scene's mesh, which is y up.
TABLE_OFFSET = (2.0634, 2.8313)
# Corners of a box's faces, counted from 1, anticlockwise from outside.
FACES = ((1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4))
# A link's parent, its joint to the parent (name, type, axis), the joint's place on the parent in metres, and its box:
# size and centre. Lengths and limits are those of Interbotix's WidowX 250 6DOF.
ARM = (
    ("shoulder_link", "base_link", ("waist", "revolute", "0 0 1"), (0, 0, 0.072), ((0.07, 0.07, 0.06), (0, 0, 0))),
    ("upper_arm_link", "shoulder_link", ("shoulder", "revolute", "0 1 0"), (0, 0, 0.03865),
     ((0.05, 0.04, 0.25), (0.02, 0, 0.125))),
    ("upper_forearm_link", "upper_arm_link", ("elbow", "revolute", "0 1 0"), (0.04975, 0, 0.25),
     ((0.17, 0.04, 0.04), (0.085, 0, 0))),
    ("lower_forearm_link", "upper_forearm_link", ("forearm_roll", "revolute", "1 0 0"), (0.175, 0, 0),
     ((0.07, 0.04, 0.04), (0.035, 0, 0))),
    ("wrist_link", "lower_forearm_link", ("wrist_angle", "revolute", "0 1 0"), (0.075, 0, 0),
     ((0.06, 0.03, 0.03), (0.03, 0, 0))),
    ("gripper_link", "wrist_link", ("wrist_rotate", "revolute", "1 0 0"), (0.065, 0, 0),
     ((0.04, 0.06, 0.03), (0.02, 0, 0))),
    ("fingers_link", "gripper_link", ("ee_bar", "fixed", "1 0 0"), (0.0715, 0, 0), None),
    ("left_finger_link", "fingers_link", ("left_finger", "prismatic", "0 1 0"), (0, 0, 0),
     ((0.06, 0.01, 0.02), (0.02, 0.005, 0))),
    ("right_finger_link", "fingers_link", ("right_finger", "prismatic", "0 -1 0"), (0, 0, 0),
     ((0.06, 0.01, 0.02), (0.02, -0.005, 0))),
    ("ee_gripper_link", "fingers_link", ("ee_gripper", "fixed", "1 0 0"), (0.027575, 0, 0), None),
)  # fmt: skip


def write_assets(folder: Path) -> Path:
    """Writes all files that the four tasks read below MS_ASSET_DIR, and returns the folder."""
    robot, tasks = folder / "data" / ROBOT_FILE, folder / "data" / TASK_FOLDER
    for directory in (robot.parent, tasks / "custom", tasks / "real_inpainting", tasks / "stages"):
        directory.mkdir(parents=True)
    robot.write_text(_robot())
    (tasks / STAND_IN).write_text("boxes for tests\n")
    for name, baked in (("info_bridge_custom_v0.json", False), ("info_bridge_custom_baked_tex_v0.json", True)):
        models = {model: _info(model) for model in MODELS if model.startswith("baked") == baked}
        (tasks / "custom" / name).write_text(json.dumps(models))
    for model, (size, _, colour) in MODELS.items():
        _write_box(tasks / "custom" / "models" / model, size, colour)
    for name, colour in (("bridge_real_eval_1.png", (140, 90, 60)), ("bridge_sink.png", (60, 90, 140))):
        Image.new("RGB", (640, 480), colour).save(tasks / "real_inpainting" / name)
    for name in ("bridge_table_1_v1.glb", "bridge_table_1_v2.glb"):
        _write_table(tasks / "stages" / name)
    return folder


def _info(model: str) -> dict:
    size, density, _ = MODELS[model]
    half = [length / 2 for length in size]
    return {"bbox": {"min": [-length for length in half], "max": half}, "scales": [1.0], "density": density}


def _write_box(folder: Path, size: Sequence[float], colour: Sequence[float]) -> None:
    folder.mkdir(parents=True)
    corners = np.stack(np.meshgrid(*[(-1, 1)] * 3, indexing="ij"), axis=-1).reshape(8, 3) * np.array(size) / 2
    lines = [f"v {x} {y} {z}" for x, y, z in corners] + ["f " + " ".join(map(str, face)) for face in FACES]
    (folder / "collision.obj").write_text("\n".join(["o box", *lines, ""]))
    (folder / "textured.obj").write_text("\n".join(["mtllib box.mtl", "o box", "usemtl box", *lines, ""]))
    (folder / "box.mtl").write_text(f"newmtl box\nKd {' '.join(map(str, colour))}\n")


def _write_table(path: Path) -> None:
    """A block around the world's origin, up to the table's height, in the axes of SIMPLER's scenes."""
    import trimesh

    east, north = TABLE_OFFSET
    centre = trimesh.transformations.translation_matrix([-east, TABLE_HEIGHT / 2, north])
    trimesh.creation.box((1.6, TABLE_HEIGHT, 1.6), transform=centre).export(path)


def _robot() -> str:
    links = ['<link name="base_link"><inertial><mass value="1"/>' + _inertia(0.01) + "</inertial></link>"]
    for name, parent, (joint, kind, axis), place, box in ARM:
        links.append(
            f'<link name="{name}"><inertial><mass value="0.1"/>{_inertia(0.0005)}</inertial>{_box(name, box)}</link>'
        )
        low, high = (0.015, 0.037) if kind == "prismatic" else (-3.14, 3.14)
        limit = f'<limit effort="20" lower="{low}" upper="{high}" velocity="3.14"/>'
        links.append(
            f'<joint name="{joint}" type="{kind}"><parent link="{parent}"/><child link="{name}"/>'
            f'<origin xyz="{_numbers(place)}"/><axis xyz="{axis}"/>{"" if kind == "fixed" else limit}</joint>'
        )
    return "\n".join(['<?xml version="1.0"?>', '<robot name="wx250s">', *links, "</robot>", ""])


def _box(link: str, box: tuple[Sequence[float], Sequence[float]] | None) -> str:
    """Only fingers collide: they grasp."""
    if box is None:
        return ""
    size, centre = map(_numbers, box)
    shape = f'<origin xyz="{centre}"/><geometry><box size="{size}"/></geometry>'
    collision = f"<collision>{shape}</collision>" if "finger" in link else ""
    return f"<visual>{shape}</visual>{collision}"


def _inertia(moment: float) -> str:
    return f'<inertia ixx="{moment}" ixy="0" ixz="0" iyy="{moment}" iyz="0" izz="{moment}"/>'


def _numbers(values: Sequence[float]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    write_assets(Path(sys.argv[1]))
