"""Options of `lapa policy`, and the sizes of a policy's parts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lapa import config as configs
from lapa.config import ReportOptions
from lapa.data.config import MixBy
from lapa.engine.config import LoopConfig, OptimConfig
from lapa.errors import UserError
from lapa.nn.config import tower_grid

# Groups of the image tokenizer's group norms.
NORM_GROUPS = 32
HeadKind = Literal["bins", "chunk", "flow"]
HF = "hf:"


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the `tiny` backbone; the defaults are the preset `tiny`."""

    kind: Annotated[Literal["tiny"], tyro.conf.Suppress] = "tiny"
    image_size: int = 64
    """Side of the square image that the vision tower reads, in pixels."""
    vision_widths: tuple[int, ...] = (32, 64, 128)
    """Channels of the vision tower's stages; each after the first halves the grid."""
    vision_depth: int = 1
    """Residual blocks of each stage."""
    width: int = 128
    """Width D of the language model."""
    layers: int = 4
    heads: int = 4

    @property
    def grid(self) -> int:
        """Side of the square grid of image tokens of one camera."""
        return tower_grid(self.image_size, self.vision_widths)

    def __post_init__(self) -> None:
        tower_grid(self.image_size, self.vision_widths)
        if self.width % (2 * self.heads):
            raise UserError(f"width {self.width} does not divide into {self.heads} heads of an even width")


@dataclass(frozen=True)
class HfConfig:
    """The `hf` backbone: an image-text model of transformers."""

    kind: Annotated[Literal["hf"], tyro.conf.Suppress] = "hf"
    source: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    """Folder or hub id of the model that training starts from."""
    image_size: int = 512
    """Side of the square image that the model reads, in pixels; which sizes are possible depends on the model."""


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of the image tokenizer; the defaults are the published ones."""

    resolution: int = 256
    """Side of the square image, in pixels."""
    hidden_channels: int = 128
    """Channels at full resolution."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 4, 6)
    """Channels of each level, as multiples of `hidden_channels`; each level after the first halves the image."""
    num_res_blocks: int = 2
    """Residual blocks of an encoder level; the decoder has one more."""
    z_channels: int = 64
    """Channels between the encoder and the codes."""
    quantized_embed_dim: int = 64
    """Width of a code."""
    num_embeddings: int = 8192
    """Size of the codebook."""

    def __post_init__(self) -> None:
        sizes = (self.resolution, self.hidden_channels, *self.channel_mult, self.num_res_blocks, self.z_channels)
        if min(*sizes, self.quantized_embed_dim, self.num_embeddings) < 1:
            raise UserError(f"sizes of the image tokenizer must be at least 1, got {configs.to_dict(self)}")
        if self.hidden_channels % NORM_GROUPS:
            raise UserError(f"hidden_channels must be a multiple of {NORM_GROUPS}, got {self.hidden_channels}")
        if not self.channel_mult or self.resolution % 2 ** (len(self.channel_mult) - 1):
            raise UserError(
                f"resolution must be divisible by 2 once for each level of channel_mult {list(self.channel_mult)} "
                f"but the first, got {self.resolution}"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.hidden_channels * multiple for multiple in self.channel_mult)

    @property
    def num_tokens(self) -> int:
        """Codes of one image: a square grid."""
        return (self.resolution // 2 ** (len(self.channel_mult) - 1)) ** 2


@dataclass(frozen=True)
class LwmConfig:
    """Sizes of the `lwm` backbone; the defaults are those of LAPA-7B."""

    kind: Annotated[Literal["lwm"], tyro.conf.Suppress] = "lwm"
    width: int = 4096
    """Width D of the language model."""
    inner_width: int = 11008
    """Width inside its feed-forward layers."""
    layers: int = 32
    heads: int = 32
    rope_theta: float = 5e7
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-6
    max_length: int = 4096
    """Longest sequence, in tokens."""
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    """The image tokenizer."""
    vision_rows: int = 8448
    """Rows of the segment of image codes: the codes, the two that end images, and unused rows."""
    end_of_frame: int = 8192
    """The code after each image but the last."""
    end_of_vision: int = 8193
    """The code after the last image."""

    @property
    def image_size(self) -> int:
        """Side of the square image, in pixels."""
        return self.vqgan.resolution

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise UserError(f"width {self.width} does not divide into {self.heads} heads of an even width")
        ends = self.end_of_frame, self.end_of_vision
        if not self.vqgan.num_embeddings <= min(ends) < max(ends) < self.vision_rows:
            raise UserError(
                f"end of frame {ends[0]} and end of vision {ends[1]} must be two codes after the "
                f"{self.vqgan.num_embeddings} of the image tokenizer, within {self.vision_rows} rows"
            )


BackboneConfig = TinyConfig | HfConfig | LwmConfig


@dataclass(frozen=True)
class FlowConfig:
    """The transformer of the flow head, and its steps from noise to actions."""

    width: int = 256
    """Width of its tokens; each time step of the chunk is a token."""
    layers: int = 4
    """Layers; each attends to the chunk and to the observation."""
    heads: int = 4
    """Attention heads; the width is a multiple of twice their number."""
    steps: int = 10
    """Euler steps from noise to actions; training does not depend on it."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"the flow head's {name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise UserError(f"the flow head's width {self.width} must be a multiple of twice its {self.heads} heads")


def tiny_loop(steps: int) -> LoopConfig:
    """The preset `tiny` of both stages."""
    return LoopConfig(steps=steps, batch_size=32, optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ReportOptions):
    """Options that `lapa policy pretrain` and `lapa policy finetune` share."""

    data: tuple[str, ...]
    """Training datasets: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]; see `lapa data --help`."""
    out: Path
    """Folder of the policy to write."""
    policy: Path | None = None
    """Folder of the policy to start from, or its id on the hub."""
    preset: str = "tiny"
    """Defaults of the other options: debug, tiny, base, paper, smolvlm2-500m, qwen3-vl-2b or paligemma-3b."""
    backbone: str = "tiny"
    """Without --policy: `tiny`, or `hf:` and the folder or hub id of an image-text model of transformers."""
    hf_image_size: int | None = None
    """Side of the square image that an `hf` backbone reads, in pixels; by default the size it was trained with."""
    tiny: Annotated[TinyConfig, tyro.conf.arg(name="")] = field(default_factory=TinyConfig)
    cameras: tuple[str, ...] = ()
    """Cameras, one for each image slot; by default those of the policy to start from, or each dataset's first."""
    prompt: str | None = None
    """Prompt: plain, paper, openvla, a template with {instruction}, or a JSON file of these by dataset, with
    "default" for the others; by default that of --policy, or plain."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    freeze_vision: bool = False
    """Do not train the vision tower (the paper's recipe, for a pretrained tower)."""
    lora_rank: int = 0
    """Rank of adapters to train in place of the language model's layers (needs lapa-vla[lora]); 0: train the layers."""
    augment: bool = False
    """Train on random crops with changed colours."""
    mix_by: MixBy = "frames"
    """Datasets are drawn in proportion to weight times frames, weight times episodes, or the weight alone."""
    held_out: float = 0.1
    """Share of the episodes in the validation split; at least one of each dataset, none where this is 0."""
    cache_gib: float = 4.0
    """Decoded frames are kept in memory if they fit into this; training and validation episodes each."""
    overwrite: bool = False
    """Replace the contents of `out`."""
    resume: bool = False
    """Continue the run in `out`."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingOptions):
    """Pretrain a policy on the latent actions of videos. No robot actions are needed."""

    labels: tuple[str, ...]
    """The datasets' labels, one folder or URL for each dataset, in the same order."""
    text_weight: float | None = None
    """Weight of the loss of the text around a latent action (`lwm` only; paper: 0.01); by default that of --policy."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=partial(tiny_loop, 700))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingOptions):
    """Finetune a policy on robot episodes with actions, or train the same policy without pretraining."""

    from_scratch: bool = False
    """Skip the pretraining: start from new weights (`tiny`), or from the published model (`hf`)."""
    head: HeadKind = "bins"
    """bins: actions are tokens, decoded one by one (the paper). chunk: all in one pass. flow: by flow matching."""
    chunk: int = 5
    """Time steps of actions that the policy predicts at once."""
    num_bins: int = 256
    """Largest number of bins of an action dimension."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    statistics: tuple[str, ...] = ()
    """Datasets whose actions, taken together, define the bins or scale of a policy that has none yet; by default each
    dataset of --data has its own. Useful before training on pseudo-labels or on another robot's actions."""
    pool_statistics: bool = False
    """Use one set of statistics for all datasets; no --statistics-key is needed then."""
    state: bool = False
    """Let the policy read the robot's state (`observation.state` of the datasets)."""
    labels: tuple[str, ...] = ()
    """Labels of the datasets, to train on latent actions and robot actions together (arXiv 2412.04445)."""
    latent_weight: float = 1.0
    """Weight of the loss of latent actions; used with --labels."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=partial(tiny_loop, 500))


@dataclass(frozen=True)
class ExportLeRobotConfig:
    """Write a policy as a folder of LeRobot's, for its tools with the plugin lerobot_policy_lapa."""

    policy: Annotated[Path, tyro.conf.Positional]
    """Folder of a policy, or its id on the hub."""
    out: Path
    """Folder to write."""
    statistics_key: str | None = None
    """Dataset whose statistics and prompt the policy acts with; needed if it was trained on several datasets."""
    overwrite: bool = False
    """Replace the contents of `out`."""


@dataclass(frozen=True)
class ImportLeRobotConfig:
    """Read a folder of `lapa export lerobot` back, as it was exported or as `lerobot-train` finetuned it."""

    exported: Annotated[Path, tyro.conf.Positional]
    """Folder of LeRobot's, such as CHECKPOINT/pretrained_model, or its id on the hub."""
    out: Path
    """Folder of the policy to write."""
    overwrite: bool = False
    """Replace the contents of `out`."""


@dataclass(frozen=True)
class MeasureConfig(ReportOptions):
    """Open-loop evaluation of a policy on recorded episodes."""

    policy: Annotated[Path, tyro.conf.Positional]
    """Folder of a policy, or its id on the hub."""
    data: str
    """Dataset to evaluate on, with actions or with --labels:
    [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]; see `lapa data --help`."""
    out: Path | None = None
    """Folder of measure.json; by default POLICY/measure_DATASET, or measure_DATASET for a policy from the hub."""
    labels: str | None = None
    """Labels of the dataset, to evaluate latent actions; needed for a policy that was only pretrained."""
    episodes: Literal["others", "trained", "all"] = "others"
    """Episodes to evaluate: those that the policy was not trained on (of a dataset of which it was trained on every
    one, all), those that it was trained on, or all."""
    samples: int = 512
    """Number of steps to evaluate, spread evenly over the episodes."""
    steps: int | None = None
    """Number of actions of each chunk to evaluate, from its start; by default all."""
    cameras: tuple[str, ...] = ()
    """Cameras of the dataset for the image slots, in order; by default those of the same names, or the only one."""
    statistics_key: str | None = None
    """Dataset whose statistics and prompt the policy acts with; needed if it was trained on several datasets."""
    batch_size: int = 64
    """Observations in one batch."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace the contents of `out`."""
