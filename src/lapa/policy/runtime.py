"""A policy: its module, its processor, and the statistics of each dataset whose actions it learned.

    policy = Policy.from_pretrained("POLICY")                    # statistics_key="bridge" where it has several
    actions_KA = policy.infer({"front": image, "instruction": "open the drawer"})
    policy.reset(); action_A = policy.select_action({"front": image, "instruction": "open the drawer"})

A policy folder holds everything that a policy needs to act:

config.json         the policy's config and the run that made it; written last, it marks the folder as complete
model/              the backbone's weights; of an `hf` or `lwm` backbone an ordinary folder of transformers
processor/          an ordinary tokenizer of transformers, and an image processor where the backbone has one
head.safetensors    the weights of the head `chunk` or `flow`
actions.safetensors bins or scale of the robot's actions, of each dataset under its name: bridge/edges, rt1/edges, ...
state.safetensors   the same for the bins of the robot's state, where the policy reads it
metrics.json        figures of the last evaluation
training/           checkpoints and metrics of the run, for --resume

Axes: B batch, V cameras, H W image, S state dimensions, L latent action length, K chunk, A action dimensions.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lapa import config as configs
from lapa.checksums import SUMS, files_below, verify, write_marker
from lapa.data.dataset import ActionSpace
from lapa.data.transforms import as_image
from lapa.engine.distributed import pick_device
from lapa.errors import UserError, unknown
from lapa.files import errors_about, read_json, read_object, write_json
from lapa.hub.download import errors_of, hub_folder
from lapa.hub.push import SavedToPush
from lapa.nn.saved import require_fit, require_sizes, shapes_of_folder
from lapa.nn.weights import load_weights, save_weights
from lapa.policy.actions import ActionBins, ActionScale, Statistics, most_bins, save_keyed
from lapa.policy.backbones import Processor, load_backbone
from lapa.policy.execution import Execution, RecedingHorizon
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.types import Observation

CONFIG, HEAD, ACTIONS, STATES = "config.json", "head.safetensors", "actions.safetensors", "state.safetensors"
METRICS, MODEL, PROCESSOR = "metrics.json", "model", "processor"
# What is downloaded from the hub: the files of a policy, and the parts of one of OTHER_ACTORS.
SAVED = (CONFIG, HEAD, ACTIONS, STATES, METRICS, SUMS, f"{MODEL}/*", f"{PROCESSOR}/*", "video/*", "inverse/*")
# In config.json, by which AutoModel of transformers finds the class (lapa.automodel).
MODEL_TYPE = "lapa_policy"
# The key of the statistics in policies saved before statistics were always kept by dataset.
UNNAMED = "default"
# `kind` in config.json -> class of policies that are not of this module.
OTHER_ACTORS = {"unipi": "lapa.baselines.unipi:UniPi"}


class Actor(ABC):
    """From observation to action: a finetuned policy, or another kind of `load_actor`.

    execution: how `select_action` turns chunks into single actions (lapa.policy.execution).
    """

    def __init__(self) -> None:
        self.execution: Execution = RecedingHorizon()

    @property
    @abstractmethod
    def cameras(self) -> tuple[str, ...]:
        """The cameras that every observation must have."""

    @property
    @abstractmethod
    def chunk(self) -> int:
        """K, the time steps of actions that `infer` returns."""

    @property
    @abstractmethod
    def action_space(self) -> ActionSpace:
        """Names of the action dimensions, which of them are binary, and delta or absolute control."""

    @property
    def action_dim(self) -> int:
        """A, the dimensions of an action."""
        return self.action_space.action_dim

    @property
    def state_dim(self) -> int:
        """Dimensions of the state that every observation must have; 0: none is needed."""
        return 0

    @property
    @abstractmethod
    def fps(self) -> float | None:
        """Actions per second; None where datasets of different rates share statistics, and in old policies."""

    @abstractmethod
    def act(self, observations: Sequence[Observation]) -> Float[np.ndarray, "B K A"]:
        """The next K actions for observations that `infer` has checked, of which there is at least one."""

    @overload
    def infer(self, observations: Observation | Mapping[str, Any]) -> Float[np.ndarray, "K A"]: ...
    @overload
    def infer(self, observations: Sequence[Observation | Mapping[str, Any]]) -> Float[np.ndarray, "B K A"]: ...
    def infer(self, observations: Any) -> np.ndarray:
        """The next K actions for one observation [K, A] or several [B, K, A], float32, in the robot's own units.

        An observation is an `Observation`, or a dict of an image by the name of each camera, "instruction", and
        "state" where the policy reads it. An image is a PIL image, or an array or tensor, [H, W, 3] or [3, H, W], uint8
        or floats in [0, 1]. Raises UserError for anything else, for a missing camera, and for a state that is missing,
        of another width or not finite.
        """
        if isinstance(observations, Observation | Mapping):
            return self.infer([observations])[0]
        checked = self.checked(observations)
        return self.act(checked) if checked else np.zeros((0, self.chunk, self.action_dim), np.float32)

    def checked(self, observations: Any) -> list[Observation]:
        """Observations with uint8 images [H, W, 3] of this policy's cameras. Raises UserError as `infer` does."""
        if isinstance(observations, str | bytes) or not isinstance(observations, Sequence):
            raise UserError(
                f"infer takes an observation or a list of them, got {type(observations).__name__}; "
                f"give {{{self.cameras[0]!r}: image, 'instruction': '...'}}"
            )
        return [as_observation(one, number, self.cameras, self.state_dim) for number, one in enumerate(observations)]

    def reset(self) -> None:
        """Starts an episode: forgets the remaining actions of `select_action`."""
        self.execution.reset()

    def select_action(self, observation: Observation | Mapping[str, Any]) -> Float[np.ndarray, "A"]:
        """The action to execute now, from chunks as `execution` decides. Observation and errors as of `infer`."""
        return self.execution.next(lambda: self.infer(observation))


class Policy(Actor, SavedToPush):
    """A policy on a device, from observation to action.

    model: the module. processor: images and text to tensors. statistics: bins or scale of actions and states by the
    name of the dataset; none before finetuning, one set where a policy learned from one dataset or pools several.
    run, metrics: the config of the run that made it and its last figures, empty where they are not known.
    """

    def __init__(
        self, model: LatentPolicy, processor: Processor, statistics: Mapping[str, Statistics] | None = None
    ) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.statistics = dict(statistics or {})
        self.run: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: str = "auto",
        *,
        statistics_key: str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Policy:
        """Loads a policy that acts, from a folder or by its id on the hub.

        revision: a branch, tag or commit on the hub (`user/name@revision` names one too). token: by default the one
        that is logged in.
        statistics_key: the dataset whose statistics and prompt it acts with, where it was trained on several.
        dtype: of the weights; by default as saved, and bfloat16 on a GPU, as in training.
        compile: decode through torch.compile, on a GPU as CUDA graphs; the first calls take long.
        Raises UserError where the folder is unfinished, or the policy was pretrained and never finetuned.
        """
        policy = _load_acting(folder, revision=revision, token=token)
        with errors_about(Path(folder)):
            policy = policy.under(statistics_key)
        return policy.to(device, dtype=dtype, compile=compile)

    def to(self, device: str, *, dtype: torch.dtype | None = None, compile: bool = False) -> Policy:
        """This policy on a device, ready to act; arguments as of `from_pretrained`."""
        where = pick_device(device)
        if dtype is None and where.type == "cuda":
            dtype = torch.bfloat16
        self.model.to(device=where, dtype=dtype).eval()
        if compile:
            self.model.backbone.compile_steps()
        return self

    def __repr__(self) -> str:
        config = self.config
        parts = [f"{config.backbone.kind} backbone", f"cameras {', '.join(config.cameras)}"]
        if config.state_dim:
            parts.append(f"state of {config.state_dim}")
        if config.latent_length:
            parts.append(f"latent actions of {config.latent_length} codes of {config.vocabulary.latent}")
        if self.acts:
            rate = f" at {self.fps:g} fps" if self.fps else ""
            parts.append(f"{config.chunk} x {config.action_dim} actions by {config.head}{rate}")
            parts.append(f"statistics of {', '.join(self.statistics)}")
        return f"Policy({'; '.join(parts)})"

    @property
    def config(self) -> PolicyConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def acts(self) -> bool:
        """Whether it predicts robot actions."""
        return bool(self.config.chunk)

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.config.cameras

    @property
    def chunk(self) -> int:
        return self.config.chunk

    @property
    def action_dim(self) -> int:
        return self.config.action_dim

    @property
    def state_dim(self) -> int:
        return self.config.state_dim

    @property
    def action_space(self) -> ActionSpace:
        return self.config.spaces[0].space

    @property
    def fps(self) -> float | None:
        return self.config.spaces[0].fps if self.config.spaces else None

    def under(self, key: str | None) -> Policy:
        """The policy that acts with the statistics and the prompt of one dataset.

        key: its name; None where there is only one set. Raises UserError with the names.
        """
        keys = list(self.statistics)
        if key is None and len(keys) > 1:
            raise UserError(f"has statistics of several datasets; choose with --statistics-key: {', '.join(keys)}")
        if key is not None and key not in keys:
            raise unknown("--statistics-key", key, keys)
        if len(keys) < 2:
            return self
        assert key is not None
        chosen, config = self.statistics[key], self.config
        config = replace(
            config,
            spaces=tuple(item for item in config.spaces if item.key == key),
            prompts=config.prompts.acting_as([key]),
            action_bins=most_bins([chosen.codec]),
            state_bins=most_bins([chosen.states]),
        )
        policy = Policy(self.model.grown(config).eval(), self.processor, {key: chosen})
        policy.run, policy.metrics = self.run, self.metrics
        return policy

    def by_statistics(self) -> dict[str, Policy]:
        """This policy as it acts with each of its statistics, by their key; all share its weights."""
        return {key: self.under(key) for key in self.statistics}

    @property
    def collate(self) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        """The function `collate_steps` of this policy. It has no weights, so that it can go to worker processes."""
        return partial(collate_steps, self.config, self.processor, self.statistics)

    def decode(self, predicted_BKA: np.ndarray, datasets: Sequence[str | None] | None = None) -> np.ndarray:
        """Bins or scaled numbers as actions in robot units. datasets: of each sample; None: the only one."""
        names = [None] * len(predicted_BKA) if datasets is None else datasets
        codecs = [statistics_of(self.statistics, name).codec for name in names]
        return np.stack([codec.decode(codec.clamp(row)) for codec, row in zip(codecs, predicted_BKA, strict=True)])

    def act(self, observations: Sequence[Observation]) -> Float[np.ndarray, "B K A"]:
        return self.decode(self.model.predict_actions(self.batch(observations)).cpu().numpy())

    def predict_codes(self, observations: Sequence[Observation | Mapping[str, Any]]) -> np.ndarray:
        """The latent action of each observation, codes [B, L]. Observations and errors as of `infer`."""
        checked = self.checked(observations)
        if not checked:
            return np.zeros((0, self.config.latent_length), np.int64)
        return self.model.predict_codes(self.batch(checked)).cpu().numpy()

    def batch(self, observations: Sequence[Observation]) -> dict[str, Tensor]:
        """Observations as the model's batch, on its device."""
        batch = observe(
            self.config,
            self.processor,
            self.statistics,
            [[one.images[camera] for camera in self.cameras] for one in observations],
            [one.instruction for one in observations],
            [one.state for one in observations if one.state is not None],
        )
        return {name: value.to(self.device) for name, value in batch.items()}

    def save_pretrained(
        self, folder: str | Path, *, run: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a policy folder, `config.json` last.

        run: the resolved config of the run that made it; metrics: its figures; by default those it was loaded with.
        """
        folder = Path(folder)
        (folder / CONFIG).unlink(missing_ok=True)
        (folder / MODEL).mkdir(parents=True, exist_ok=True)
        self.model.backbone.save(folder / MODEL)
        if self.model.head is not None:
            save_weights(self.model.head, folder / HEAD)
        self.save_parts(folder, run=run, metrics=metrics)

    def save_parts(
        self, folder: Path, *, run: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Writes all of a policy folder but the weights, `config.json` last. Arguments as of `save_pretrained`."""
        (folder / PROCESSOR).mkdir(parents=True, exist_ok=True)
        self.processor.save(folder / PROCESSOR)
        save_keyed(folder / ACTIONS, {key: each.codec for key, each in self.statistics.items()})
        save_keyed(folder / STATES, {key: each.states for key, each in self.statistics.items()})
        write_json(folder / METRICS, dict(self.metrics if metrics is None else metrics))
        write_policy_config(folder, self.config, self.run if run is None else run)


def write_policy_config(folder: Path, config: PolicyConfig, run: Mapping[str, Any]) -> None:
    """Writes `config.json`, which marks a policy folder as complete, and the checksums of its files."""
    own = [name for name in (HEAD, ACTIONS, STATES, METRICS) if (folder / name).exists()]
    whole = {"model_type": MODEL_TYPE, "policy": configs.to_dict(config), "run": dict(run)}
    write_marker(folder, CONFIG, whole, [*own, *files_below(folder, MODEL, PROCESSOR)])


def observe(
    config: PolicyConfig,
    processor: Processor,
    statistics: Mapping[str, Statistics],
    images: Sequence[Sequence[np.ndarray]],
    instructions: Sequence[str],
    states: Sequence[np.ndarray] | None = None,
    datasets: Sequence[str | None] | None = None,
) -> dict[str, Tensor]:
    """Observations as tensors, in training and acting.

    images: of each sample, uint8 HWC of any size, in the order of the image slots; an `lwm` policy also takes the codes
    of its image tokenizer, int [N], in place of one. states: for a policy that reads them. datasets: the names of those
    whose prompts and statistics apply; by default the policy's own.
    """
    if config.backbone.kind != "lwm" and any(image.ndim == 1 for one in images for image in one):
        raise UserError(
            "the data have codes of images in place of images, which a policy with the backbone "
            f"{config.backbone.kind} cannot read; use one with the backbone lwm (`lapa import lapa-7b`), or give the "
            "images: images=FOLDER with --data lapa-jsonl:FILE"
        )
    names = datasets or [None] * len(instructions)
    prompts = [config.prompts.text(words, name) for words, name in zip(instructions, names, strict=True)]
    batch = processor(images, prompts)
    if config.state_dim:
        assert states is not None and len(states) == len(names), "the policy reads a state, but none is given"
        bins = [statistics_of(statistics, name).states for name in names]
        bins_BS = np.stack([each.encode(state) for each, state in zip(bins, states, strict=True) if each is not None])
        batch["state_BS"] = config.vocabulary.tokens("state", torch.from_numpy(bins_BS))
    return batch


def collate_steps(
    config: PolicyConfig,
    processor: Processor,
    statistics: Mapping[str, Statistics],
    items: Sequence[Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Items of `EpisodeSteps` as a training batch: observations and targets.

    Raises UserError for a code that the vocabulary lacks, and for actions of the wrong width or not finite.
    """
    names = [item["dataset"] for item in items]
    batch = observe(
        config,
        processor,
        statistics,
        [list(item["images"].values()) for item in items],
        [item["instruction"] for item in items],
        [item["state_S"] for item in items] if config.state_dim else None,
        names,
    )
    batch["index"] = torch.tensor([int(item["index"]) for item in items])
    if "codes_L" in items[0]:
        codes_BL = torch.from_numpy(np.stack([item["codes_L"] for item in items]))
        batch["latent_BL"] = config.vocabulary.tokens("latent", codes_BL)
        batch["latent_mask_B"] = torch.tensor([bool(item["has_codes"]) for item in items])
    if "actions_KA" in items[0]:
        encoded = [
            statistics_of(statistics, name).codec.encode(item["actions_KA"])
            for name, item in zip(names, items, strict=True)
        ]
        actions_BKA = torch.from_numpy(np.stack(encoded))
        batch["action_BKA"] = config.vocabulary.tokens("bins", actions_BKA) if config.head == "bins" else actions_BKA
        batch["action_mask_BK"] = torch.from_numpy(np.stack([item["action_mask_K"] for item in items]))
    return batch


def statistics_of(statistics: Mapping[str, Statistics], dataset: str | None) -> Statistics:
    """The statistics of a dataset; the only set where there is one."""
    return next(iter(statistics.values())) if len(statistics) == 1 else statistics[dataset or ""]


def as_observation(
    observation: Observation | Mapping[str, Any], number: int, cameras: Sequence[str], state_dim: int
) -> Observation:
    """An observation with uint8 images [H, W, 3] of these cameras, and a state where the policy reads one.

    number: its place in the list, for messages. Raises UserError as `Policy.infer` does.
    """
    if isinstance(observation, Mapping):
        images = {str(key): value for key, value in observation.items() if key not in ("instruction", "state")}
        instruction, state = observation.get("instruction", ""), observation.get("state")
    elif isinstance(observation, Observation):
        images, instruction, state = dict(observation.images), observation.instruction, observation.state
    else:
        raise UserError(
            f"observation {number} is a {type(observation).__name__}; give a dict such as "
            f"{{{cameras[0]!r}: image, 'instruction': '...'}}, or an Observation"
        )
    if missing := [camera for camera in cameras if camera not in images]:
        raise UserError(
            f"observation {number} lacks the camera{'s' * (len(missing) > 1)} {', '.join(missing)} "
            f"(it has {', '.join(images) or 'none'}); this policy needs {', '.join(cameras)}"
        )
    with errors_about(f"observation {number}"):
        images = {camera: as_image(images[camera], f"camera {camera}") for camera in cameras}
        if not isinstance(instruction, str):
            raise UserError(f"its instruction is {instruction!r}; give text, or ''")
        return Observation(images, instruction, _state(state, state_dim))


def _state(state: Any, state_dim: int) -> Float[np.ndarray, "S"] | None:
    if isinstance(state, Tensor):
        state = state.detach().cpu().numpy()
    if state is not None and not np.issubdtype(np.asarray(state).dtype, np.number):
        raise UserError(f"its state is {np.asarray(state).dtype}, not numbers")
    if state is not None and not np.isfinite(state).all():
        raise UserError("its state is not finite; check the sensor's reading")
    if state_dim and np.shape(state) != (state_dim,):
        given = "no state" if state is None else f"a state of shape {np.shape(state)}"
        raise UserError(f"it has {given}; this policy reads {state_dim} numbers")
    return None if state is None else np.asarray(state, np.float32)


def policy_folder(
    folder_or_hub_id: Path | str, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder of a policy of any kind, or the hub's copy of it. Raises UserError where there is neither."""
    hint = "; make a policy with `lapa policy pretrain` or `finetune`"
    return hub_folder(folder_or_hub_id, SAVED, hint, marker=CONFIG, revision=revision, token=token)


def load_actor(folder: Path | str, statistics_key: str | None = None, device: str = "auto") -> Actor:
    """Loads the policy in a folder or on the hub, of the kind that its config.json names.

    That is a `Policy`, or one of OTHER_ACTORS. statistics_key: as of `Policy.from_pretrained`. Raises UserError where
    nothing there can act.
    """
    if (other := _load_other(folder, device)) is None:
        return Policy.from_pretrained(folder, device, statistics_key=statistics_key)
    if statistics_key is not None:
        raise UserError(f"{folder}: has no statistics of datasets; leave out --statistics-key {statistics_key}")
    return other


def load_actors(folder: Path | str, device: str = "auto") -> dict[str, Actor]:
    """Loads the policy in a folder once, as it acts with each of its statistics: by the name of the dataset.

    An actor without statistics is under "". Raises UserError as `load_actor` does.
    """
    if (other := _load_other(folder, device)) is not None:
        return {"": other}
    return {key: policy.to(device) for key, policy in _load_acting(folder).by_statistics().items()}


def _load_acting(folder: Path | str, *, revision: str | None = None, token: str | bool | None = None) -> Policy:
    """Loads a policy with all its statistics, on the CPU. Raises UserError where it was only pretrained."""
    path = policy_folder(folder, revision=revision, token=token)
    with errors_of(folder):
        policy = load_policy(path)
    if not policy.acts:
        raise UserError(
            f"{folder}: only pretrained, it has no robot actions; "
            f"run `lapa policy finetune --policy {folder} --data ROBOT_DATASET --out POLICY`"
        )
    return policy


def _load_other(folder: Path | str, device: str) -> Actor | None:
    """Loads a policy of OTHER_ACTORS; None where the folder holds none."""
    path = policy_folder(folder)
    if (kind := other_kind(path)) is None:
        return None
    module, _, name = OTHER_ACTORS[kind].partition(":")
    actor: Actor = getattr(importlib.import_module(module), name).from_pretrained(path, device)
    return actor


def other_kind(folder: Path) -> str | None:
    """The kind of OTHER_ACTORS that the config in a folder names; None for any other."""
    written = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    kind = written.get("kind") if isinstance(written, dict) else None
    return kind if isinstance(kind, str) and kind in OTHER_ACTORS else None


def is_policy(folder: Path) -> bool:
    """Whether `folder` contains a finished policy."""
    return (Path(folder) / CONFIG).exists()


def read_config(folder: Path) -> PolicyConfig:
    """Reads the config of a policy folder. Raises UserError naming what is missing or unfinished."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such policy folder; make one with `lapa policy pretrain` or `finetune`")
    if not is_policy(folder):
        if (folder / "training").exists():
            raise UserError(f"{folder}: unfinished, it has no {CONFIG}; finish its training with --resume")
        raise UserError(f"{folder}: not a policy, it has no {CONFIG}; give the folder of a policy")
    written = read_json(folder / CONFIG)
    if not isinstance(written, dict) or not isinstance(written.get("policy"), dict):
        raise UserError(f"{folder / CONFIG}: not the config of a policy (no key 'policy')")
    values = dict(written["policy"])
    # Before statistics were always kept by dataset, `action_space` was that of all datasets or of the first.
    space = values.pop("action_space", None)
    if space is not None and not values.get("spaces"):
        values["spaces"] = [{"key": UNNAMED, "space": space}]
    return configs.from_dict(PolicyConfig, values, source=str(folder / CONFIG))


def load_policy(folder: Path) -> Policy:
    """Reads a policy folder, on the CPU. Raises UserError naming what is missing, unfinished or does not fit."""
    folder = Path(folder)
    config = read_config(folder)
    verify(folder, "copy or train the policy again")
    shapes = {**shapes_of_folder(folder / MODEL), **shapes_of_folder(folder)}
    require_sizes(folder / CONFIG, configs.to_dict(config), shapes)
    backbone, processor = load_backbone(
        config.backbone,
        folder / MODEL,
        folder / PROCESSOR,
        vocabulary=config.vocabulary,
        num_cameras=len(config.cameras),
    )
    if config.chunk and config.head != "bins":
        require_fit(lambda: cast(nn.Module, LatentPolicy(config, backbone).head), folder / CONFIG, folder / HEAD)
    model = LatentPolicy(config, backbone)
    if model.head is not None:
        load_weights(model.head, folder / HEAD)
    return with_parts(folder, model, processor)


def with_parts(folder: Path, model: LatentPolicy, processor: Processor) -> Policy:
    """A policy of this model with the statistics, run and metrics of a folder of `Policy.save_parts`.

    Raises UserError naming a damaged file.
    """
    config = model.config
    codec = ActionBins if config.head == "bins" else ActionScale
    statistics = {
        key: Statistics(
            codec.load(folder / ACTIONS, key), ActionBins.load(folder / STATES, key) if config.state_dim else None
        )
        for key in (item.key for item in config.spaces)
    }
    policy = Policy(model.eval(), processor, statistics)
    written = read_json(folder / CONFIG).get("run")
    policy.run = written if isinstance(written, dict) else {}
    path = folder / METRICS
    policy.metrics = read_object(path, "delete it, or copy it again") if path.exists() else {}
    return policy
