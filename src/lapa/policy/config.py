"""Options of `lapa policy`, and the sizes of a policy's parts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lapa import config as configs
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
    """Side of the square image that the vision tower sees, in pixels."""
    vision_widths: tuple[int, ...] = (32, 64, 128)
    """Channels of the vision tower's stages; each after the first halves the grid."""
    vision_depth: int = 1
    """Residual blocks a stage."""
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
    """An image-text model of transformers."""

    kind: Annotated[Literal["hf"], tyro.conf.Suppress] = "hf"
    source: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    """Folder or hub id of the model that training starts from."""
    image_size: int = 512
    """Side of the square image that the model sees, in pixels; which sizes it can take depends on the model."""


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
    """Rows of the image codes' segment: the codes, the two that end images, and rows that were never used."""
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
    """The transformer of the flow head, and how it acts."""

    width: int = 256
    """Width of its tokens, one a time step of the chunk."""
    layers: int = 4
    """Layers; each attends to the chunk and to the observation."""
    heads: int = 4
    """Attention heads; they divide the width."""
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
class TrainingOptions:
    """What `lapa policy pretrain` and `lapa policy finetune` have in common."""

    data: tuple[str, ...]
    """Datasets to learn from. docs/1-data.md has the form: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]."""
    out: Path
    """Folder of the policy to write."""
    policy: Path | None = None
    """The policy to start from."""
    preset: str = "tiny"
    """Where the other options start: debug, tiny, base, paper, smolvlm2-500m, qwen3-vl-2b or paligemma-3b."""
    backbone: str = "tiny"
    """Without --policy: `tiny`, or `hf:` and the folder or hub id of an image-text model of transformers."""
    hf_image_size: int | None = None
    """Side of the square pictures that an `hf` backbone is given, in pixels; by default what it was made for."""
    tiny: Annotated[TinyConfig, tyro.conf.arg(name="")] = field(default_factory=TinyConfig)
    cameras: tuple[str, ...] = ()
    """Cameras to see, one image slot each; by default those of the policy to start from, or each dataset's first."""
    prompt: str | None = None
    """Prompt: plain, paper, openvla, a template with {instruction}, or a JSON file of these by dataset, with
    "default" for the others; by default that of --policy, or plain."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    freeze_vision: bool = False
    """Keep the vision tower as it is (the paper's recipe, for towers that were trained before)."""
    freeze_language: bool = False
    """Keep the language model's layers as they are."""
    lora_rank: int = 0
    """Train low-rank adapters in the language model's layers instead of these (needs lapa-vla[lora]); 0: none."""
    augment: bool = False
    """Random crops and changed colours."""
    mix_by: MixBy = "frames"
    """Datasets are drawn in proportion to their weights times their frames, times their episodes, or alone."""
    held_out: float = 0.1
    """Share of the episodes kept for evaluation; at least one of each dataset, none where this is 0."""
    cache_gib: float = 4.0
    """Decoded frames are kept in memory where they fit into this much; training and held-out episodes each."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with the run that `out` holds."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingOptions):
    """Pretrain a policy on the latent actions of videos. No robot actions are needed."""

    labels: tuple[str, ...]
    """The datasets' labels, one folder or URL for each dataset, in the same order."""
    lam_fingerprint: str | None = None
    """Refuse labels that another latent action model made."""
    text_weight: float | None = None
    """Weight of the loss of the text around a latent action (`lwm` backbones; paper: 0.01); by default as before."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=partial(tiny_loop, 700))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingOptions):
    """Finetune a policy on robot episodes with actions, or train the same policy without pretraining."""

    from_scratch: bool = False
    """Leave the pretraining out: start from new weights (`tiny`), or from the model as it came (`hf`)."""
    head: HeadKind = "bins"
    """bins: actions are said as tokens, one by one (the paper). chunk: all at once. flow: by flow matching."""
    chunk: int = 5
    """Time steps of actions that the policy says at once."""
    num_bins: int = 256
    """Bins of an action dimension, at most."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    statistics: tuple[str, ...] = ()
    """Datasets whose actions, together, set the policy's bins or scale, where it has none yet; by default those of
    --data, each its own. For training on guessed actions, or another robot's, before the robot's own."""
    pool_statistics: bool = False
    """One set of statistics for all datasets together, and so no --statistics-key."""
    state: bool = False
    """Tell the policy the robot's state (`observation.state` of the datasets)."""
    labels: tuple[str, ...] = ()
    """Labels of the datasets, to go on learning latent actions beside the robot's (arXiv 2412.04445)."""
    latent_weight: float = 1.0
    """Weight of the loss of latent actions, where there are labels."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=partial(tiny_loop, 500))


@dataclass(frozen=True)
class MeasureConfig:
    """Measure a policy on recorded episodes."""

    policy: Annotated[Path, tyro.conf.Positional]
    """Folder of a policy."""
    data: str
    """Dataset to measure on; with actions, or with --labels.

    docs/1-data.md has the form: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT].
    """
    out: Path | None = None
    """Folder of measure.json; by default POLICY/measure_DATASET."""
    labels: str | None = None
    """Labels of the dataset, to measure latent actions; all there is to measure of a policy that does not act yet."""
    samples: int = 512
    """Steps measured, spread evenly over all episodes."""
    steps: int | None = None
    """Of each chunk the first so many actions count; by default all."""
    cameras: tuple[str, ...] = ()
    """Which of the dataset's cameras fill the image slots; by default those of the same names, or the only one."""
    statistics_key: str | None = None
    """By which dataset's statistics the policy acts, where it learned from several with actions."""
    batch_size: int = 64
    """Observations answered at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace what `out` holds."""
