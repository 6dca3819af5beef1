# /// script
# requires-python = ">=3.11"
# dependencies = ["lapa-vla", "vla-eval>=0.8"]
# ///
"""A policy behind vla-eval (https://github.com/allenai/vla-evaluation-harness), whose benchmarks then measure it.

    python examples/vla_eval_server.py --address 127.0.0.1:8000 --args.policy POLICY \
      --args.cameras '{"front": "agentview", "wrist": "wrist"}' \
      --args.action '[POSITION_DELTA, ROTATION_AA, GRIPPER_CLOSE_POS]' --args.observation STATE_EEF_POS_AA_GRIP
    vla-eval run -c configs/benchmarks/libero/spatial.yaml --server-url ws://127.0.0.1:8000

Read vla-eval's docs/reproductions/common-pitfalls.md first: the state that is sent, its rotation, the gripper's sign
and images that are upside down are worth more points than the policy. Each is an option here.

Axes: B batch, K action chunk, A action dimensions.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import vla_eval.specs
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import run_server
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec
from vla_eval.types import Action, Observation

from lapa import Policy, UserError

Gripper = Literal["keep", "negate", "open01", "close01"]
# What is done to the gripper's actions before they are sent.
GRIPPERS = {
    "keep": lambda values: values,
    "negate": lambda values: -values,
    "open01": lambda values: 1 - 2 * values,
    "close01": lambda values: 2 * values - 1,
}
# The keys under which vla-eval's benchmarks send the robot's state.
STATES = ("states", "state")


class LapaModelServer(PredictModelServer):
    """vla-eval's model server for a policy of lapa: any number of sessions, which share batches."""

    def __init__(
        self,
        policy: str,
        cameras: dict[str, str] | None = None,
        state: str | None = None,
        state_order: list[int] | None = None,
        upside_down: bool = False,
        gripper: Gripper = "keep",
        gripper_dims: list[int] | None = None,
        action: list[str] | None = None,
        observation: str | None = None,
        statistics_key: str | None = None,
        device: str = "auto",
        *,
        chunk_size: int | None = None,
        action_ensemble: str = "newest",
        max_batch_size: int = 16,
        max_wait_time: float = 0.01,
    ) -> None:
        """
        Args:
            policy: Folder of a finetuned policy.
            cameras: Name of the policy's camera -> name of the benchmark's. By default cameras of the same names, or
                the benchmark's first image for a policy with one camera.
            state: Key of the state in the benchmark's observations, such as states or controller_states (LIBERO, the
                state of the controller). By default states or state, whichever comes.
            state_order: Which numbers of the benchmark's state the policy reads, in its order. By default all.
            upside_down: Turn images by 180 degrees, for a policy that was trained on LIBERO's images as rendered.
            gripper: What is done to the gripper before it is sent: keep; negate; open01, from 1 for open and 0 for
                closed to -1 and 1; close01, from 0 for open and 1 for closed to -1 and 1.
            gripper_dims: Dimensions of the gripper. By default the binary ones of the policy, or the last.
            action: The parts of an action as constants of vla_eval.specs, which it compares with the benchmark's.
            observation: The state as a constant of vla_eval.specs.
            statistics_key: Dataset whose statistics the policy acts with, where it has several.
            device: auto, cpu, cuda or cuda:N.
            chunk_size: Actions of each chunk that are executed. By default all.
            action_ensemble: How overlapping chunks are joined; see PredictModelServer.
            max_batch_size: Most observations of one batch.
            max_wait_time: Seconds for which a batch waits for more of them.
        """
        self.policy = Policy.from_pretrained(policy, device, statistics_key=statistics_key)
        super().__init__(
            chunk_size=chunk_size or self.policy.chunk,
            action_ensemble=action_ensemble,
            max_batch_size=max_batch_size,
            max_wait_time=max_wait_time,
        )
        self.cameras, self.upside_down, self.gripper = dict(cameras or {}), upside_down, GRIPPERS[gripper]
        if unknown := [name for name in self.cameras if name not in self.policy.cameras]:
            raise UserError(f"cameras: the policy has no {unknown[0]}; it has {', '.join(self.policy.cameras)}")
        self.states = STATES if state is None else (state,)
        self.state_order = state_order
        binary = [number for number, is_binary in enumerate(self.policy.action_space.binary) if is_binary]
        self.gripper_dims = (binary or [self.policy.action_dim - 1]) if gripper_dims is None else gripper_dims
        self.action = {"actions": RAW} if action is None else {spec.name: spec for spec in map(_spec, action)}
        self.state_spec = RAW if observation is None else _spec(observation)

    def get_action_spec(self) -> dict[str, DimSpec]:
        return self.action

    def get_observation_spec(self) -> dict[str, DimSpec]:
        spec = {"language": LANGUAGE} | {self.cameras.get(name, name): IMAGE_RGB for name in self.policy.cameras}
        return spec | ({"state": self.state_spec} if self.policy.state_dim else {})

    def get_observation_params(self) -> dict[str, Any]:
        return {"send_wrist_image": len(self.policy.cameras) > 1, "send_state": bool(self.policy.state_dim)}

    def predict_batch(self, obs_batch: list[Observation], ctx_batch: list[SessionContext]) -> list[Action]:
        actions_BKA = self.policy.infer([self._observed(one) for one in obs_batch])
        actions_BKA[..., self.gripper_dims] = self.gripper(actions_BKA[..., self.gripper_dims])
        return [{"actions": actions_KA} for actions_KA in actions_BKA]

    def _observed(self, sent: Observation) -> dict[str, Any]:
        """What a benchmark sends as `Policy.infer` takes it."""
        images = sent.get("images") or {}
        seen: dict[str, Any] = {"instruction": sent.get("task_description", "")}
        for camera in self.policy.cameras:
            name = self.cameras.get(camera, camera)
            if name not in images and camera not in self.cameras and len(self.policy.cameras) == 1 and images:
                name = next(iter(images))
            if name not in images:
                raise UserError(f"the benchmark sends no image {name} (it sends {', '.join(images) or 'none'})")
            image = np.asarray(images[name])
            seen[camera] = image[::-1, ::-1] if self.upside_down else image
        if self.policy.state_dim:
            found = next((sent[key] for key in self.states if key in sent), None)
            if found is None:
                raise UserError(f"the benchmark sends no {' or '.join(self.states)} (it sends {', '.join(sent)})")
            state = np.asarray(found, np.float32).ravel()
            seen["state"] = state if self.state_order is None else state[self.state_order]
        return seen


def _spec(name: str) -> DimSpec:
    spec = getattr(vla_eval.specs, name, None)
    if not isinstance(spec, DimSpec):
        known = [name for name, value in vars(vla_eval.specs).items() if isinstance(value, DimSpec)]
        raise UserError(f"vla_eval.specs has no {name}; it has {', '.join(known)}")
    return spec


if __name__ == "__main__":
    run_server(LapaModelServer)
