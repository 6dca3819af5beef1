"""A small text-conditioned video model: predicts the next few frames from the current one and an instruction.

The planner of UniPi (https://arxiv.org/abs/2302.00111) at a modest size: pixel diffusion of F future frames by a UNet
of diffusers, instead of a cascade of large video models. It diffuses each frame's change from the current frame, at
unit variance, given noise, the current frame, and the instruction, by cross-attention and next to the noise level. It
predicts the changes themselves: after 100 steps on made-up videos their error was 0.012, 0.021 by velocity prediction,
and 0.013 for copies of the current frame. The schedule ends in pure noise (https://arxiv.org/abs/2305.08891), so that
the first of few sampling steps is the mean prediction.

    model = VideoModel.from_pretrained("VIDEO")
    future_BFCHW = model.sample(frames_BCHW, ["open the drawer"])

Axes: B batch, F future frames, T=1+F frames or tokens of text, C channel, H W image, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lapa import config as configs
from lapa.baselines.config import NORM_GROUPS, VideoConfig
from lapa.checksums import files_below, verify, write_marker
from lapa.errors import UserError
from lapa.files import read_json
from lapa.nn.saved import require_fit, require_sizes, shapes_of_file
from lapa.nn.weights import load_weights, save_weights
from lapa.policy.backbones.tiny import load_tokenizer, save_tokenizer
from lapa.types import Losses, TrainableModel

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
NOISE_LEVELS = 1000
# Of pixels in [-1, 1]. Videos in which nothing moves have no scale of their own.
SMALLEST_CHANGE = 0.01
# Part of a horizon by which frame rates may round it apart.
HORIZON_TOLERANCE = 0.1


class VideoModel(TrainableModel, nn.Module):
    """Denoises the changes of F frames. Its tokenizer belongs to it."""

    scale_F: Tensor

    def __init__(self, config: VideoConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.schedule = require_diffusers().DDIMScheduler(
            num_train_timesteps=NOISE_LEVELS,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        )
        self.unet = _unet(config)
        self.text = TextEncoder(len(tokenizer), config)
        self.register_buffer("scale_F", torch.ones(config.num_frames))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> VideoModel:
        """Reads a folder of `lapa baseline video`. Raises UserError naming what is missing or does not fit."""
        folder, path = Path(folder), Path(folder) / CONFIG
        if not path.exists():
            raise UserError(f"{folder}: no finished video model (no {CONFIG}); train one with `lapa baseline video`")
        written = read_json(path)
        if not isinstance(written, dict) or not {"video", "camera"} <= set(written):
            raise UserError(f"{path}: not the config of a video model (no keys video and camera); give another folder")
        verify(folder, "copy or train the model again")
        require_sizes(path, written["video"], shapes_of_file(folder / WEIGHTS))
        config = configs.from_dict(VideoConfig, written["video"], source=str(path))
        tokenizer = load_tokenizer(folder / TOKENIZER)
        require_fit(lambda: cls(config, tokenizer), path, folder / WEIGHTS)
        model = cls(config, tokenizer)
        load_weights(model, folder / WEIGHTS)
        return model.eval()

    def save_pretrained(self, folder: Path, run: dict[str, Any], camera: str) -> None:
        """Writes the folder, `config.json` last. camera: the one that it learned from."""
        (folder / CONFIG).unlink(missing_ok=True)
        save_weights(self, folder / WEIGHTS)
        save_tokenizer(self.tokenizer, folder / TOKENIZER)
        whole = {"video": configs.to_dict(self.config), "camera": camera, "run": run}
        write_marker(folder, CONFIG, whole, [WEIGHTS, *files_below(folder, TOKENIZER)])

    def checkpoint_activations(self) -> None:
        """Less memory in training: for --gradient-checkpointing."""
        self.unet.enable_gradient_checkpointing()

    def words(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """`tokens_BT` and `mask_BT`, padded on the right."""
        text = self.tokenizer(
            list(instructions), padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False
        )
        return {"tokens_BT": text["input_ids"], "mask_BT": text["attention_mask"].bool()}

    @torch.no_grad()
    def standardise(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> None:
        """Sets the scale at which changes have unit variance, from some training samples."""
        changes_BFCHW = _changes(frames_BTCHW)
        self.scale_F.copy_(changes_BFCHW.square().mean(dim=(0, 2, 3, 4)).sqrt().clamp(min=SMALLEST_CHANGE))

    def forward(self, batch: Mapping[str, Tensor]) -> Losses:
        """The mean squared error of the denoised changes, at random noise levels.

        batch: frames_BTCHW uint8, the current frame and the F that follow; tokens_BT, mask_BT.
        """
        frames_BTCHW = batch["frames_BTCHW"]
        clean = self._patches(_changes(frames_BTCHW) / self.scale_F[:, None, None, None])
        levels_B = torch.randint(NOISE_LEVELS, (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        given_B = torch.ones_like(levels_B, dtype=torch.bool)
        if self.training:
            given_B = torch.rand(len(clean), device=clean.device) >= self.config.drop_instruction
        noisy = self.schedule.add_noise(clean, noise, levels_B)
        current = self._patches(_unit(frames_BTCHW[:, :1]))
        denoised = self._denoised(noisy, levels_B, current, batch["tokens_BT"], batch["mask_BT"], given_B)
        return Losses(F.mse_loss(denoised, clean))

    @torch.no_grad()
    def sample(
        self,
        frames_BCHW: UInt8[Tensor, "B 3 H W"],
        instructions: Sequence[str],
        *,
        steps: int = 8,
        guidance: float = 1.0,
        seed: int = 0,
    ) -> UInt8[Tensor, "B F 3 H W"]:
        """Predicted frames, by DDIM (https://arxiv.org/abs/2010.02502) from the same noise for every sample.

        So a prediction is a function of frame, instruction and seed, whatever else is in the batch. guidance: how far
        to go from the prediction without the instruction (0) to the one with it (1), and beyond.
        """
        device, batch = self.scale_F.device, len(frames_BCHW)
        frames_BCHW = frames_BCHW.to(device)
        text = {name: value.to(device) for name, value in self.words(instructions).items()}
        given_B = torch.ones(batch, dtype=torch.bool, device=device)
        current = self._patches(_unit(frames_BCHW[:, None]))
        shape = (1, 3 * self.config.num_frames * self.config.patch_size**2, *current.shape[-2:])
        # Drawn on the CPU, so that every device starts from the same.
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        noisy = noise.to(device).expand(batch, -1, -1, -1).contiguous()
        self.schedule.set_timesteps(steps, device=device)
        for level in self.schedule.timesteps:
            levels_B = level.expand(batch)
            denoised = self._denoised(noisy, levels_B, current, text["tokens_BT"], text["mask_BT"], given_B)
            if guidance != 1:
                without = self._denoised(noisy, levels_B, current, text["tokens_BT"], text["mask_BT"], ~given_B)
                denoised = without + guidance * (denoised - without)
            noisy = self.schedule.step(denoised, level, noisy).prev_sample
        changes_BFCHW = self._frames(noisy) * self.scale_F[:, None, None, None]
        predicted = (_unit(frames_BCHW[:, None]) + changes_BFCHW).clamp(-1, 1)
        return ((predicted + 1) * 127.5).round().to(torch.uint8)

    def _denoised(
        self, noisy: Tensor, levels_B: Tensor, current: Tensor, tokens_BT: Tensor, mask_BT: Tensor, given_B: Tensor
    ) -> Tensor:
        text_BTD, mask_BT = self.text(tokens_BT, mask_BT, given_B)
        weights_BT = (mask_BT / mask_BT.sum(dim=1, keepdim=True)).to(text_BTD.dtype)
        inputs = torch.cat([noisy, current], dim=1).contiguous(memory_format=torch.channels_last)
        return self.unet(
            inputs,
            levels_B,
            encoder_hidden_states=text_BTD,
            encoder_attention_mask=mask_BT,
            class_labels=torch.einsum("btd,bt->bd", text_BTD, weights_BT),
        ).sample.float()

    def _patches(self, frames_BFCHW: Tensor) -> Tensor:
        side = self.config.patch_size
        return rearrange(frames_BFCHW, "b f c (h i) (w j) -> b (f c i j) h w", i=side, j=side)

    def _frames(self, patches: Tensor) -> Tensor:
        side = self.config.patch_size
        return rearrange(patches, "b (f c i j) h w -> b f c (h i) (w j)", c=3, i=side, j=side)


class TextEncoder(nn.Module):
    """Token embeddings, positions and a small transformer; a learned vector where no instruction is given."""

    def __init__(self, num_tokens: int, config: VideoConfig) -> None:
        super().__init__()
        width = config.text_width
        self.embedding = nn.Embedding(num_tokens, width)
        self.nothing_D = nn.Parameter(torch.randn(width))
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.text_layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(
        self, tokens_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], given_B: Bool[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B T D"], Bool[Tensor, "B T"]]:
        """The text and its mask; without an instruction that is the first place alone, with the vector `nothing`."""
        from diffusers.models.embeddings import get_timestep_embedding

        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        first_T = places_T == 0
        embedded_BTD = self.embedding(tokens_BT)
        nothing_BTD = repeat(self.nothing_D, "d -> b t d", b=len(tokens_BT), t=len(places_T))
        x_BTD = torch.where(given_B[:, None, None], embedded_BTD, nothing_BTD)
        counted_BT = torch.where(given_B[:, None], mask_BT, first_T)
        x_BTD = x_BTD + get_timestep_embedding(places_T, x_BTD.shape[-1])
        return self.layers(x_BTD, src_key_padding_mask=~counted_BT), counted_BT


def _unit(frames: Tensor) -> Tensor:
    return frames.float() / 127.5 - 1


def _changes(frames_BTCHW: Tensor) -> Tensor:
    """The change of each future frame from the first, of pixels in [-1, 1]."""
    frames = _unit(frames_BTCHW)
    return frames[:, 1:] - frames[:, :1]


def _unet(config: VideoConfig) -> Any:
    channels, plain_levels = 3 * config.patch_size**2, len(config.widths) - 1
    unet = require_diffusers().UNet2DConditionModel(
        sample_size=config.image_size // config.patch_size,
        in_channels=channels * (config.num_frames + 1),
        out_channels=channels * config.num_frames,
        block_out_channels=config.widths,
        down_block_types=("DownBlock2D",) * plain_levels + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain_levels,
        layers_per_block=config.depth,
        norm_num_groups=NORM_GROUPS,
        # The number of heads, in spite of its name.
        attention_head_dim=config.heads,
        cross_attention_dim=config.text_width,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=config.text_width,
        resnet_time_scale_shift="scale_shift",
    )
    return unet.to(memory_format=torch.channels_last)


def require_diffusers() -> Any:
    """Returns the library. Raises UserError where it is missing."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f'a video model needs diffusers ({error}); install it with: pip install "lapa-vla[study]"'
        ) from None
    return diffusers
