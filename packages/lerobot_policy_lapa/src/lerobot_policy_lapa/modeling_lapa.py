"""A LAPA policy (https://arxiv.org/abs/2410.11758) as a policy of LeRobot. All work is done by `lapa.Policy`.

    lerobot-train --policy.path=FOLDER --dataset.repo_id=user/data --policy.push_to_hub=false
    lerobot-train --policy.type=lapa --policy.start=LATENT_POLICY --dataset.repo_id=user/data --policy.push_to_hub=false

Axes: B batch, C channel, H W image, S state dimensions, K action chunk, A action dimensions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from lapa import Policy, UserError
from lapa.data.lerobot import LeRobotDataset
from lapa.engine.optim import parameter_groups
from lapa.policy.finetune import prepare
from lapa.policy.lerobot import ACTION, CAMERA, FILES, STATE, features, open_lerobot, write_parts
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from lerobot_policy_lapa.configuration_lapa import LapaConfig

PADDING, IMAGE = "action_is_pad", "observation.image"
SEEDS = 2**31


class LapaPolicy(PreTrainedPolicy):
    """LeRobot's policy of the type `lapa`.

    policy: the policy of lapa; model: its module, whose weights model.safetensors holds.
    """

    config_class = LapaConfig
    name = "lapa"

    def __init__(
        self,
        config: LapaConfig,
        policy: Policy | None = None,
        dataset_meta: Any = None,
        **_: Any,
    ) -> None:
        """policy: by default a new one for the dataset of `dataset_meta`.

        Raises UserError where config, dataset and policy do not fit.
        """
        super().__init__(config)
        config.validate_features()
        self.policy = _new_policy(config, dataset_meta) if policy is None else policy
        self.model = self.policy.model
        _require_same(config, self.policy)
        config.input_features, config.output_features = (_as_features(part) for part in features(self.policy))
        config.action_feature_names = list(self.policy.action_space.names)
        self.model.freeze(vision=config.freeze_vision)
        if config.gradient_checkpointing:
            self.model.checkpoint_activations()
        self._channels_last = [weight for weight in self.model.parameters() if _is_channels_last(weight)]
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """The policy of a folder of `lapa export lerobot`, of a checkpoint, or of a repository on the hub."""
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(pretrained_name_or_path),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    allow_patterns=list(FILES),
                )
            )
        if config is None:
            config = PreTrainedConfig.from_pretrained(folder)
        loaded = cls(config, open_lerobot(folder))
        loaded.to(config.device)
        loaded.eval()
        return loaded

    def train(self, mode: bool = True) -> Self:
        """As of nn.Module. In training all weights are contiguous, for LeRobot to save the moments of the optimizer."""
        super().train(mode)
        for weight in self._channels_last:
            layout = torch.contiguous_format if mode else torch.channels_last
            weight.data = weight.data.contiguous(memory_format=layout)
        return self

    def get_optim_params(self) -> list[dict[str, Any]]:
        """The parameters to train, with and without weight decay."""
        return parameter_groups(self.model, self.config.get_optimizer_preset().weight_decay)

    def reset(self) -> None:
        """Forgets the remaining actions of the last chunk."""
        self._action_queue: deque[Tensor] = deque()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The loss of `lapa policy finetune`, and its parts."""
        (key,) = self.policy.statistics
        seen = self._observations(batch)
        # LeRobot drops the last axis of a feature of one number.
        actions_BKA = batch[ACTION].float().reshape(len(seen), self.policy.chunk, -1).cpu().numpy()
        padded_BK = batch.get(PADDING, torch.zeros(actions_BKA.shape[:2])).bool().cpu().numpy()
        items = [
            {
                "index": row,
                "dataset": key,
                "images": {camera: one.images[camera] for camera in self.policy.cameras},
                "instruction": one.instruction,
                "state_S": one.state,
                "actions_KA": actions_BKA[row],
                "action_mask_K": ~padded_BK[row],
            }
            for row, one in enumerate(self.policy.checked(seen))
        ]
        tensors = {name: value.to(self.policy.device) for name, value in self.policy.collate(items).items()}
        losses = self.model(tensors)
        return losses.loss, {name: value.item() for name, value in losses.parts.items()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next actions [B, K, A] in the robot's units, as `Policy.infer` returns them."""
        self.eval()
        device = self.policy.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            actions_BKA = self.policy.infer(self._observations(batch))
        return torch.from_numpy(actions_BKA).to(device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The action [B, A] to execute now; predicts a chunk when that before is used up."""
        if not self._action_queue:
            actions_BKA = self.predict_action_chunk(batch)
            self._action_queue.extend(actions_BKA[:, : self.config.n_action_steps].unbind(1))
        return self._action_queue.popleft()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save_pretrained(save_directory, state_dict=state_dict)
        write_parts(self.policy, save_directory)

    def _observations(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The observations of a batch, as `Policy.infer` takes them. Raises UserError for an input that is missing."""
        columns = {camera: batch[_image_key(batch, camera, self.policy.cameras)] for camera in self.policy.cameras}
        count = len(columns[self.policy.cameras[0]])
        tasks = batch.get("task", "")
        columns["instruction"] = [tasks] * count if isinstance(tasks, str) else tasks
        if self.policy.state_dim:
            if STATE not in batch:
                raise UserError(f"the batch lacks {STATE}; this policy reads {self.policy.state_dim} numbers of it")
            columns["state"] = batch[STATE].reshape(count, -1)
        return [{name: column[row] for name, column in columns.items()} for row in range(count)]


def _is_channels_last(weight: Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _image_key(batch: Mapping[str, Any], camera: str, cameras: Sequence[str]) -> str:
    """The key of a camera in a batch. Raises UserError with what came and what is wanted."""
    for key in (f"{CAMERA}{camera}", f"observation.{camera}"):
        if key in batch:
            return key
    came = ", ".join(key for key in batch if key.startswith(IMAGE)) or "none"
    raise UserError(
        f"the batch lacks the camera {camera} (it has {came}); this policy needs {', '.join(cameras)}: "
        f'give --rename_map=\'{{"KEY": "{CAMERA}{camera}"}}\''
    )


def _new_policy(config: LapaConfig, dataset_meta: Any) -> Policy:
    """A policy that has not learned the actions of the dataset yet, as `lapa policy finetune` begins with."""
    if dataset_meta is None:
        raise UserError(
            "a new lapa policy is made for a dataset, by lerobot-train; to act, give the folder of "
            "`lapa export lerobot` or of a checkpoint: --policy.path=FOLDER"
        )
    dataset = LeRobotDataset(Path(dataset_meta.root), dataset_meta.repo_id.split("/")[-1])
    preset = config.finetuning
    options = replace(
        preset,
        data=(str(dataset.root),),
        # Nothing is written there: LeRobot saves the policy.
        out=dataset.root / "policy",
        policy=None if config.start is None else Path(config.start),
        from_scratch=config.start is None,
        cameras=tuple(config.cameras) or (() if config.start else dataset.cameras),
        head=config.head,  # type: ignore[arg-type]
        chunk=config.chunk_size,
        state=config.state,
        held_out=0.0,
        cache_gib=0.0,
        loop=replace(preset.loop, seed=torch.initial_seed() % SEEDS),
    )
    policy, _, _ = prepare(options, [dataset])
    # What is saved needs it no more.
    config.start = None
    return policy


def _require_same(config: LapaConfig, policy: Policy) -> None:
    """Raises UserError where the config asks for another policy, or the actions have another width."""
    own = {"chunk_size": policy.chunk, "head": policy.config.head, "state": bool(policy.state_dim)}
    for name, value in own.items():
        if getattr(config, name) != value:
            raise UserError(
                f"--policy.{name}={getattr(config, name)}: the policy was made with {value}; leave the option out"
            )
    assert config.action_feature is not None
    (width,) = config.action_feature.shape
    if width != policy.action_dim:
        raise UserError(
            f"the policy predicts actions of {policy.action_dim} dimensions "
            f"({', '.join(policy.action_space.names)}), the dataset or environment has {width}"
        )


def _as_features(described: Mapping[str, Any]) -> dict[str, PolicyFeature]:
    return {key: PolicyFeature(FeatureType(one["type"]), tuple(one["shape"])) for key, one in described.items()}
