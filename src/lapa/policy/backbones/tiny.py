"""The `tiny` backbone: a small residual network and a small Llama. From scratch, on a CPU, without a download.

The residual network is that of `lapa.nn.vision`. Both halves are models of transformers.

    lapa policy pretrain --preset tiny --data DATASET --labels LABELS --out POLICY

Axes: B batch, V cameras, H W image, N image tokens of all cameras, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lapa.data.transforms import resize_and_crop
from lapa.engine.memory import built
from lapa.errors import UserError
from lapa.files import writing
from lapa.nn.pretrained import NO_CODE
from lapa.nn.saved import damaged, require_fit
from lapa.nn.vision import residual_tower
from lapa.nn.weights import load_weights, save_weights
from lapa.policy.backbones.base import PrefixBackbone, Processor
from lapa.policy.config import TinyConfig
from lapa.policy.vocabulary import Vocabulary

WEIGHTS = "model.safetensors"
# Of the policy, in the folder above.
CONFIG = "config.json"


@dataclass(frozen=True)
class TinyProcessor(Processor):
    """Images at the tower's size, and text by the policy's own tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    image_size: int

    def __call__(
        self, images: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]], prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """`images_BVHWC` uint8, `tokens_BT` and `mask_BT`."""
        return {"images_BVHWC": square_images(images, self.image_size), **left_padded(self.tokenizer, prompts)}

    def save(self, folder: Path) -> None:
        """Writes the tokenizer, as transformers does."""
        save_tokenizer(self.tokenizer, folder)


class TinyBackbone(PrefixBackbone):
    """ResNet features on a grid, projected to a prefix of image tokens, before a Llama."""

    language: LlamaForCausalLM

    def __init__(self, config: TinyConfig, *, num_cameras: int, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.tower = residual_tower(config.vision_widths, config.vision_depth)
        self.project = nn.Linear(config.vision_widths[-1], config.width)
        self.position_VND = nn.Parameter(0.02 * torch.randn(num_cameras, config.grid**2, config.width))
        self.language = LlamaForCausalLM(_llama_config(config, vocabulary_size))

    @property
    def vision(self) -> nn.Module:
        return self.tower

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.language.model.layers)

    def embed_images(self, images_BVHWC: UInt8[Tensor, "B V H W 3"]) -> Float[Tensor, "B N D"]:
        """uint8 images of side `image_size` to image tokens: camera by camera, row by row."""
        num_cameras = images_BVHWC.shape[1]
        pixels = rearrange(images_BVHWC, "b v h w c -> (b v) c h w").to(self.project.weight.dtype) / 127.5 - 1
        features = self.tower(pixels.contiguous(memory_format=torch.channels_last)).last_hidden_state
        tokens_BVND = self.project(rearrange(features, "(b v) c h w -> b v (h w) c", v=num_cameras))
        return rearrange(tokens_BVND + self.position_VND, "b v n d -> b (v n) d")

    def prefix(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B P D"], Int[Tensor, "B P"]]:
        image_BND = self.embed_images(batch["images_BVHWC"])
        text_BTD = self._embed(batch["tokens_BT"])
        mask_BP = F.pad(batch["mask_BT"], (image_BND.shape[1], 0), value=1)
        return torch.cat([image_BND, text_BTD.to(image_BND.dtype)], dim=1), mask_BP

    def save(self, folder: Path) -> None:
        save_weights(self, folder / WEIGHTS)


def create(
    config: TinyConfig, *, texts: Iterable[str], num_cameras: int, segments: Mapping[str, int]
) -> tuple[TinyBackbone, TinyProcessor, Vocabulary]:
    """A new backbone, with a tokenizer trained on the texts that the policy will read."""
    processor = TinyProcessor(train_tokenizer(texts), config.image_size)
    vocabulary = Vocabulary(text=len(processor.tokenizer), **segments)
    return renew(config, vocabulary, num_cameras), processor, vocabulary


def renew(config: TinyConfig, vocabulary: Vocabulary, num_cameras: int) -> TinyBackbone:
    """New weights for an existing vocabulary. Raises UserError where they are more than the memory holds."""
    return built(partial(TinyBackbone, config, num_cameras=num_cameras, vocabulary_size=vocabulary.size))


def load(
    config: TinyConfig,
    model: Path,
    processor: Path,
    *,
    vocabulary: Vocabulary,
    num_cameras: int,
    weights: bool = True,
) -> tuple[TinyBackbone, TinyProcessor]:
    """Reads the files of `save`. Raises UserError naming the file that is missing or does not fit."""
    if weights:
        planned = partial(TinyBackbone, config, num_cameras=num_cameras, vocabulary_size=vocabulary.size)
        require_fit(planned, model.parent / CONFIG, model / WEIGHTS)
    backbone = renew(config, vocabulary, num_cameras)
    if weights:
        load_weights(backbone, model / WEIGHTS)
    return backbone, TinyProcessor(load_tokenizer(processor), config.image_size)


def square_images(images: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]], size: int) -> UInt8[Tensor, "B V H W 3"]:
    """The images of each sample, scaled and cropped to squares."""
    squares = [np.concatenate([resize_and_crop(image[None], size) for image in one]) for one in images]
    return torch.from_numpy(np.stack(squares))


def left_padded(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`tokens_BT` and `mask_BT` of the prompts."""
    text = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    return {"tokens_BT": text["input_ids"], "mask_BT": text["attention_mask"]}


def _llama_config(config: TinyConfig, vocabulary_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=config.width,
        # Llama's proportion: 8/3 of the width, rounded up to a multiple of 32.
        intermediate_size=-(-config.width * 8 // (3 * 32)) * 32,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        # No token ends a sequence: decoding runs for the length of the field.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


PAD, BEGIN, END = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 1024) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary_size` tokens: three special ones, 256 bytes, and the texts' pieces and words.

    Neither the order of the texts nor repeated texts change the tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=1,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        # An instruction that contains "</s>" is text, not a control token.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer as transformers does. Raises OSError naming the folder where the system refuses."""
    with writing(folder):
        tokenizer.save_pretrained(str(folder))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Reads a saved tokenizer. Raises UserError naming what is missing or damaged."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{folder}: no tokenizer.json; the folder is incomplete, train its model again")
    with damaged(f"{path}: damaged, or tokenizer_config.json next to it is", "; train its model again"):
        return PreTrainedTokenizerFast.from_pretrained(folder, **NO_CODE)
