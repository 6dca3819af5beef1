"""Checks a policy of lapa in LeRobot's own commands: `make check-lerobot`, with the plugin lerobot_policy_lapa.

    .venv-lerobot/bin/python benchmarks/check_lerobot_policy.py FOLDER

In the made-up world of moving squares (benchmarks/squares): a dataset written here, a policy finetuned here for a few
steps and exported; LeRobot's first action and its loss on the same batch must equal ours. `lerobot-train` finetunes
the policy, goes on from its checkpoint, and makes a new policy; `lerobot-eval` measures it, `lerobot-rollout` drives a
robot with it; and the checkpoint comes back as a policy of lapa that acts the same.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from squares import FPS, SIZE

from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.policy.runtime import Policy

CHUNK, FRAMES = 4, (0, 7, 20, 21)
REPOSITORY = "made-up/squares"
# The policy as lapa leaves it, and as lerobot-train does; both are far from the limits that the check sets.
FEW_STEPS, STEPS, MORE_STEPS = 10, 300, 310
LEAST_SUCCESS, MOST_LOSS = 0.5, 0.5
BIN = Path(sys.executable).parent


def main(folder: Path) -> None:
    """Runs the checks in order. Raises SystemExit at the first that fails."""
    print(", ".join(f"{name} {version(name)}" for name in ("lerobot", "lerobot_policy_lapa", "torch", "transformers")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data, policy, exported, trained = (folder / name for name in ("data", "policy", "exported", "trained"))
    found()
    run("lapa", "data", "synthetic", "--actions", "--episodes", 32, "--size", SIZE, "--out", data)
    options = ["--preset", "debug", "--head", "chunk", "--chunk", CHUNK, "--state", "--device", "cpu"]
    options += ["--steps", FEW_STEPS, "--batch-size", 32]
    run("lapa", "policy", "finetune", "--from-scratch", *options, "--data", data, "--out", policy)
    run("lapa", "export", "lerobot", policy, "--out", exported)
    moved = folder / "elsewhere" / "exported"
    shutil.copytree(exported, moved)
    first_action(policy, moved, data)
    before = loss(policy, moved, data)

    training = [f"--dataset.repo_id={REPOSITORY}", f"--dataset.root={data}", "--policy.push_to_hub=false"]
    training += ["--policy.device=cpu", "--batch_size=32", "--num_workers=0", "--log_freq=50", "--env_eval_freq=0"]
    run("lerobot-train", f"--policy.path={moved}", *training, f"--steps={STEPS}", f"--output_dir={trained}")
    checkpoint = (trained / "checkpoints" / "last").resolve() / "pretrained_model"
    back = folder / "back"
    run("lapa", "import", "lerobot", checkpoint, "--out", back)
    first_action(back, checkpoint, data)
    after = loss(back, checkpoint, data)
    require(after < MOST_LOSS * before, f"lerobot-train lowered the loss from {before:.4f} to {after:.4f}")
    go_on = ["--resume=true", f"--config_path={checkpoint / 'train_config.json'}", f"--steps={MORE_STEPS}"]
    run("lerobot-train", *go_on)
    resumed = json.loads((trained / "checkpoints/last/training_state/training_step.json").read_text())
    require(resumed["step"] == MORE_STEPS, f"lerobot-train went on from its checkpoint to step {resumed['step']}")
    fresh = [f"--policy.{name}" for name in ("type=lapa", "preset=debug", "head=flow", "state=true", "chunk_size=3")]
    run("lerobot-train", *fresh, *training, "--steps=2", f"--output_dir={folder / 'new'}")
    new = folder / "new" / "checkpoints" / "last" / "pretrained_model"
    run("lapa", "import", "lerobot", new, "--out", folder / "new-back")
    first_action(folder / "new-back", new, data)

    evaluate(moved, folder / "evaluated-before", "the policy before lerobot-train")
    rate = evaluate(checkpoint, folder / "evaluated", "the policy after lerobot-train")
    require(rate >= LEAST_SUCCESS, f"lerobot-eval: success of {rate:.0%}, at least {LEAST_SUCCESS:.0%} wanted")
    simulator = ["--env", "synthetic", "--size", SIZE, "--tasks", "all", "--episodes", 4]
    run("lapa", "evaluate", back, *simulator, "--out", folder / "results")
    ours = json.loads((folder / "results" / "results.json").read_text())["overall"]
    print(f"   the same policy in `lapa evaluate`, from other starts: success of {ours['success_rate']:.0%}")
    log = folder / "robot.json"
    robot = ["--robot.type=squares", "--robot.discover_packages_path=squares", f"--robot.log={log}", "--robot.id=one"]
    robot += [f"--robot.calibration_dir={folder / 'calibration'}", "--task=move up", f"--fps={FPS}", "--duration=5"]
    robot += ["--return_to_initial_position=false", "--play_sounds=false", "--policy.device=cpu"]
    run("lerobot-rollout", f"--policy.path={checkpoint}", *robot)
    happened = json.loads(log.read_text())
    up = -np.mean(happened["actions"], axis=0)[1]
    num = len(happened["actions"])
    require(num > FPS and up > 0, f"lerobot-rollout sent {num} actions to the robot, upwards by {up:.2f} in the mean")
    print("the policy passed")


def found() -> None:
    """LeRobot imports the plugin because of its name, and knows the type `lapa` after that."""
    name = distribution("lerobot_policy_lapa").metadata["Name"]
    register_third_party_plugins()
    known = "lapa" in PreTrainedConfig.get_known_choices()
    require(name == "lerobot_policy_lapa" and known, f"LeRobot found the plugin {name}")


def first_action(policy: Path, folder: Path, data: Path) -> None:
    """LeRobot's first actions on images of its own dataset equal `Policy.infer`, to the last bit."""
    ours = Policy.from_pretrained(policy, device="cpu")
    theirs, before, after = opened(folder)
    dataset = LeRobotDataset(REPOSITORY, data, video_backend="pyav")
    for number in FRAMES:
        item = dataset[number]
        seen = {"front": item["observation.images.front"], "instruction": item["task"]}
        wanted_A = ours.infer({**seen, "state": item["observation.state"]})[0]
        theirs.reset()
        action_A = after(theirs.select_action(before(item)))[0].numpy()
        if not np.array_equal(action_A, wanted_A):
            raise SystemExit(f"FAILED first action on frame {number}: {action_A}, that of Policy.infer is {wanted_A}")
    print(f"ok first action on {len(FRAMES)} frames equals that of Policy.infer; the last: {action_A}", flush=True)


def loss(policy: Path, folder: Path, data: Path) -> float:
    """LeRobot's loss on a batch of its own dataset equals ours on the same frames of ours."""
    ours = Policy.from_pretrained(policy, device="cpu")
    theirs, before, _ = opened(folder)
    times = [step / FPS for step in range(CHUNK)]
    dataset = LeRobotDataset(REPOSITORY, data, delta_timestamps={"action": times}, video_backend="pyav")
    numbers = range(0, len(dataset), 8)
    batch = torch.utils.data.default_collate([dataset[number] for number in numbers])
    with torch.no_grad():
        found, _ = theirs(before(batch))
        steps = EpisodeSteps([open_dataset(data)], SIZE, chunk=CHUNK, state=True)
        key = next(iter(ours.statistics))
        wanted = ours.model(ours.collate([{**steps[number], "dataset": key} for number in numbers])).loss
    require(found.item() == wanted.item(), f"loss on {len(numbers)} frames is ours: {found:.6f}, {wanted:.6f}")
    return found.item()


def opened(folder: Path) -> tuple[Any, Any, Any]:
    """A policy as LeRobot's commands open it, and its pipelines."""
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--device=cpu"])
    config.pretrained_path = folder
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    overrides = {"device_processor": {"device": "cpu"}}
    return policy, *make_pre_post_processors(config, pretrained_path=folder, preprocessor_overrides=overrides)


def evaluate(folder: Path, out: Path, what: str) -> float:
    """The success rate that lerobot-eval finds."""
    run(
        "lerobot-eval",
        *(f"--policy.path={folder}", "--policy.device=cpu", "--env.type=squares", f"--output_dir={out}"),
        *("--env.discover_packages_path=squares", "--eval.n_episodes=4", "--eval.batch_size=2"),
    )
    rate = json.loads((out / "eval_info.json").read_text())["overall"]["pc_success"] / 100
    print(f"   {what}: success of {rate:.0%}")
    return float(rate)


def run(command: str, *arguments: object) -> None:
    """Runs a command of this environment; prints it and its time. Raises SystemExit with its output where it fails."""
    words = [command, *map(str, arguments)]
    begun = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([BIN / command, *words[1:]], env=environment, capture_output=True, text=True)
    print(f"   {time.monotonic() - begun:.0f} s: {shlex.join(words)}", flush=True)
    if done.returncode:
        raise SystemExit(f"FAILED: {shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


def require(fine: bool, what: str) -> None:
    """Prints what was found. Raises SystemExit where it is not fine."""
    if not fine:
        raise SystemExit(f"FAILED {what}")
    print(f"ok {what}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
