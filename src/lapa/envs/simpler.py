"""SIMPLER's four WidowX tasks of BridgeData V2, visual matching, as ManiSkill 3 has them.

SIMPLER: Li et al., CoRL 2024, arXiv 2405.05941. ManiSkill 3: Tao et al., RSS 2025, arXiv 2410.00425.

    lapa evaluate POLICY --env simpler --tasks widowx --episodes 24 --out RESULTS

A policy acts as in BridgeData (`rlds:bridge_orig/1.0.0`), 5 times a second, in the frame of the robot's base:

    action   movement x y z in metres and roll pitch yaw in radians, gripper 1 open and 0 closed
    state    position x y z and rotation roll pitch yaw of the hand, opening of the gripper from 0 to 1

The base is turned by 180 degrees: the world's x and y have the other sign. Roll, pitch and yaw turn about the base's x,
y and z, in this order; the state's are zero where the hand points straight down. The image, of the camera over the
shoulder, is squashed to a square, as the published datasets are.

The renderer needs Vulkan: a GPU's, or a driver for the CPU (`CPU_DRIVERS`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.spatial.transform import Rotation

from lapa.envs import EnvironmentKind, Task
from lapa.envs.opengl import run_probe
from lapa.errors import UserError
from lapa.types import Observation

# SIMPLER's names -> ManiSkill's. The evaluation of the paper plays the first 24 initial states of each.
NAMES = {
    "widowx_spoon_on_towel": "PutSpoonOnTableClothInScene-v1",
    "widowx_carrot_on_plate": "PutCarrotOnPlateInScene-v1",
    "widowx_stack_cube": "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    "widowx_put_eggplant_in_basket": "PutEggplantInBasketScene-v1",
}
SUITES = {
    "widowx": (
        Task("widowx_spoon_on_towel", max_steps=60, initial_states=24),
        Task("widowx_carrot_on_plate", max_steps=60, initial_states=24),
        Task("widowx_stack_cube", max_steps=60, initial_states=24),
        Task("widowx_put_eggplant_in_basket", max_steps=120, initial_states=64),
    )
}
# BridgeData's names of the one camera there is, and ManiSkill's.
CAMERAS, RENDERED_CAMERA = ("image_0", "image"), "3rd_view_camera"
POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
# Random actions, about as large as BridgeData's.
LARGEST_MOVE, LARGEST_TURN = 0.02, 0.1

# Below `asset_folder()`.
ROBOT_FILE, TASK_FOLDER = "robots/widowx/wx250s.urdf", "tasks/bridge_v2_real2sim_dataset"
MODELS = (
    *("bridge_carrot_generated_modified", "bridge_plate_objaverse_larger"),
    *("bridge_spoon_generated_modified", "table_cloth_generated_shorter"),
    *("baked_green_cube_3cm", "baked_yellow_cube_3cm"),
    *("eggplant", "sink", "dummy_sink_target_plane"),
)
ASSETS = (
    ROBOT_FILE,
    *(f"{TASK_FOLDER}/custom/info_bridge_custom_{name}v0.json" for name in ("", "baked_tex_")),
    *(f"{TASK_FOLDER}/custom/models/{name}/collision.obj" for name in MODELS),
    *(f"{TASK_FOLDER}/real_inpainting/bridge_{name}.png" for name in ("real_eval_1", "sink")),
    *(f"{TASK_FOLDER}/stages/bridge_table_1_{name}.glb" for name in ("v1", "v2")),
)
FETCH = (
    "python -m mani_skill.utils.download_asset -y bridge_v2_real2sim && "
    "python -m mani_skill.utils.download_asset -y widowx250s"
)
# A file that marks a task folder whose assets are not SIMPLER's.
STAND_IN = "stand_in.txt"

# Vulkan drivers that render on a CPU: what installs them on Debian 12, and the file that names them to the loader.
CPU_DRIVERS = {
    "apt-get install -t bookworm-backports mesa-vulkan-drivers": "/usr/share/vulkan/icd.d/lvp_icd.json",
    "apt-get install chromium (four times slower)": "/usr/lib/chromium/vk_swiftshader_icd.json",
}
# What the OpenCV needs that ManiSkill imports.
OPENCV_PACKAGES = "libgl1 libglib2.0-0"
# Either names the drivers' files to the Vulkan loader.
DRIVER_VARIABLES = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")
# Where SAPIEN finds the first Vulkan device that is no CUDA device.
FIRST_DEVICE = "pci:0"

_PROBE = f"""
import cv2
import sapien
try:
    device = sapien.Device("cuda")
except RuntimeError:
    device = sapien.Device("{FIRST_DEVICE}")
sapien.render.set_camera_shader_dir("trivial")
scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(device)])
scene.set_ambient_light([1, 1, 1])
box = scene.create_actor_builder()
box.add_box_visual(half_size=[0.2, 0.2, 0.2])
box.build_static(name="box")
camera = scene.add_camera("camera", 32, 32, 1.0, 0.01, 10)
camera.entity.set_pose(sapien.Pose([-1, 0, 0]))
scene.update_render()
camera.take_picture()
image = camera.get_picture("Color")
print(device.name)
raise SystemExit(0 if image.std() > 0.1 else "the image is blank")
"""

# The hand's rotation in the base where BridgeData's is zero: its x axis, along the fingers, points down.
DOWN = Rotation.from_matrix([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
# Distance of each finger from the middle, in metres.
CLOSED, OPEN = 0.015, 0.037


def to_simulator(action: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
    """Returns ManiSkill's action for one of BridgeData.

    Its controller turns by R_x R_y R_z, BridgeData by R_z R_y R_x; its gripper is 1 open and -1 closed.
    """
    turn = _angles(Rotation.from_euler("xyz", action[3:6]), "XYZ")
    return np.array([*action[:3], *turn, 1.0 if action[6] > 0.5 else -1.0])


def to_state(
    position: Float[np.ndarray, "3"], quaternion: Float[np.ndarray, "4"], fingers: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "7"]:
    """Returns BridgeData's state from the hand's pose in the base (metres; w x y z) and the fingers' positions."""
    rotation = Rotation.from_quat(quaternion, scalar_first=True) * DOWN.inv()
    opening = np.clip((fingers.mean() - CLOSED) / (OPEN - CLOSED), 0, 1)
    return np.array([*position, *_angles(rotation, "xyz"), opening], np.float32)


def _angles(rotation: Rotation, order: str) -> Float[np.ndarray, "3"]:
    with warnings.catch_warnings():
        # SciPy warns where angles are not unique, as those of a hand that points ahead.
        warnings.simplefilter("ignore")
        return rotation.as_euler(order)


def asset_folder() -> Path:
    """Returns the folder in which ManiSkill looks for assets."""
    return Path(os.environ.get("MS_ASSET_DIR", Path.home() / ".maniskill")) / "data"


def is_stand_in() -> bool:
    """Returns whether the assets are not SIMPLER's."""
    return (asset_folder() / TASK_FOLDER / STAND_IN).is_file()


def check() -> dict[str, str]:
    """Returns notes for the results. Raises UserError, with the fix, where assets or a Vulkan driver are missing."""
    if lacking := [name for name in ASSETS if not (asset_folder() / name).is_file()]:
        others = f" and {len(lacking) - 1} more files" if len(lacking) > 1 else ""
        raise UserError(f"{asset_folder()}: lacks {lacking[0]}{others}; fetch SIMPLER's assets: {FETCH}")
    own = "stand-ins: these figures are not SIMPLER's" if is_stand_in() else "bridge_v2_real2sim"
    return {"protocol": "visual matching, in ManiSkill 3", "assets": own, "renderer": choose_driver()}


def choose_driver() -> str:
    """Returns the name of the device that renders, tried with one image in a process of its own.

    Where the machine's own choice does not render, it chooses a driver of `CPU_DRIVERS` that is there, for this process
    and those that it starts. Raises UserError where none renders.
    """
    name, reason = _probe({})
    if not name and not any(os.environ.get(variable) for variable in DRIVER_VARIABLES):
        for file in filter(os.path.isfile, CPU_DRIVERS.values()):
            choice = {DRIVER_VARIABLES[1]: file}
            name, _ = _probe(choice)
            if name:
                os.environ.update(choice)
                break
    if not name:
        raise UserError(f"SAPIEN cannot render ({reason}); {_advice(reason)}")
    return name


def _advice(reason: str) -> str:
    if "shared object file" in reason:
        return f"on Debian: apt-get install {OPENCV_PACKAGES}"
    choices = " or ".join(f"{install}, then {DRIVER_VARIABLES[1]}={file}" for install, file in CPU_DRIVERS.items())
    return f"it needs a Vulkan driver: a GPU's, or for a CPU, on Debian 12: {choices}"


def _probe(environment: dict[str, str]) -> tuple[str, str]:
    """Returns the name of the device that has rendered an image, or "" and the reason."""
    return run_probe(_PROBE, environment)


class Simulator:
    """One task, an `Environment`. Images are rendered in `observe` only."""

    def __init__(self, task: str, size: int, cameras: Sequence[str]) -> None:
        self._size, self._cameras = size, tuple(cameras)
        self._environment = _make(NAMES[task])
        self._render = self._environment.get_obs
        # Every step would render.
        self._environment.get_obs = lambda *_, **__: {}

    def reset(self, seed: int, episode: int) -> None:
        """Starts at the initial state with the episode's number; nothing is random."""
        self._environment.reset(options={"episode_id": episode})

    def observe(self) -> Observation:
        seen_HWC = self._render({})["sensor_data"][RENDERED_CAMERA]["rgb"][0].cpu().numpy()
        squashed = Image.fromarray(seen_HWC).resize((self._size, self._size), Image.Resampling.LANCZOS)
        images = dict.fromkeys(self._cameras, np.asarray(squashed))
        return Observation(images, self._environment.get_language_instruction()[0], self._state())

    def step(self, action: Float[np.ndarray, "A"]) -> bool:
        *_, info = self._environment.step(to_simulator(action))
        return bool(info["success"].item())

    def expert_action(self) -> Float[np.ndarray, "A"]:
        raise UserError("SIMPLER has no expert")

    def close(self) -> None:
        self._environment.close()

    def _state(self) -> Float[np.ndarray, "S"]:
        agent = self._environment.agent
        hand = agent.controller.controllers["arm"].ee_pose_at_base
        return to_state(hand.p[0].cpu().numpy(), hand.q[0].cpu().numpy(), agent.robot.qpos[0, -2:].cpu().numpy())


def _make(name: str) -> Any:
    """Returns ManiSkill's environment, without the wrappers that end its episodes."""
    with warnings.catch_warnings():
        # SAPIEN warns that it brings its own Vulkan loader.
        warnings.simplefilter("ignore")
        import gymnasium
        import mani_skill.envs  # noqa: F401  registers the tasks
        import sapien
        from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv
        from mani_skill.envs.utils.system import backend
        from mani_skill.utils.logging_utils import logger

        # It warns at every object that the task places later.
        logger.setLevel("ERROR")
        try:
            sapien.Device("cuda")
            device = "cuda"
        except RuntimeError:
            device = FIRST_DEVICE
        _keep_addresses(backend)
        # ManiSkill fills these in the class, so an environment would show photographs and objects of others.
        photographs: dict[str, Any] = {}
        BaseDigitalTwinEnv._rgb_overlay_images = photographs
        BaseDigitalTwinEnv._objects_to_remove_from_greenscreen = []
        made: Any = gymnasium.make(
            name, obs_mode="rgb+segmentation", num_envs=1, sim_backend="cpu", render_backend=device
        ).unwrapped
        made._rgb_overlay_images = photographs
    return made


def _keep_addresses(backend: Any) -> None:
    """Version 3.0.1 splits `pci:0` at its colon as it splits `cuda:0`, and then finds no device of the name `pci`."""
    split = backend.parse_backend_device_id
    if split(FIRST_DEVICE)[0] != FIRST_DEVICE:
        backend.parse_backend_device_id = lambda name: (name, None) if name == FIRST_DEVICE else split(name)


SIMPLER = EnvironmentKind(
    title="SIMPLER",
    make=Simulator,
    suites=lambda: SUITES,
    known_cameras=CAMERAS,
    cameras=CAMERAS[:1],
    size=256,
    fps=5.0,
    action_names=POSE,
    state_names=POSE,
    action_low=(-LARGEST_MOVE,) * 3 + (-LARGEST_TURN,) * 3 + (0.0,),
    action_high=(LARGEST_MOVE,) * 3 + (LARGEST_TURN,) * 3 + (1.0,),
    stops_at_success=False,
    packages=("mani-skill", "sapien"),
    extra="simpler",
    also_needs="assets from a hub, and Vulkan (docs/5-evaluate.md)",
    check=check,
)
