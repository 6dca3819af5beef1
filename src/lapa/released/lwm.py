"""The `lwm` backbone: a Llama that reads images as discrete codes of a frozen VQGAN. The released LAPA-7B is one.

Large World Model (https://arxiv.org/abs/2402.08268), LAPA (https://arxiv.org/abs/2410.11758). One vocabulary, text |
image codes | latent actions | bins, so that the language model is an ordinary LlamaForCausalLM. It reads

    BOS | prompt | <vision> | codes of each image | end of vision | </vision>

with an end of frame between images; a latent action stands between <delta> and </delta> EOS, a robot action after
<action>. The tags are plain text of several tokens each. The paper's prompt begins with its own `<s>`.

    lapa import lapa-7b --params params --vqgan vqgan --tokenizer tokenizer.model --out POLICY

Axes: B batch, V cameras, H W image, P observation tokens, N codes of an image, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lapa.errors import UserError
from lapa.files import writing
from lapa.nn.pretrained import load_model, read_config
from lapa.nn.weights import require_finite_weights
from lapa.policy.backbones.base import PrefixBackbone, Tags, require_room
from lapa.policy.backbones.tiny import load_tokenizer, save_tokenizer, square_images, train_tokenizer
from lapa.policy.config import LwmConfig
from lapa.policy.vocabulary import Segment, Vocabulary
from lapa.released.checkpoints import malformed
from lapa.released.vqgan import VQGAN

VQGAN_FOLDER = "vqgan"
VISION_TAGS = "<vision>", "</vision>"
FIELD_TAGS: dict[Segment, str] = {"latent": "delta", "bins": "action"}


@dataclass(frozen=True)
class LwmProcessor:
    """Makes the token sequence of an observation, with places for the image codes, and the images to fill them from.

    The paper's prompt begins with a `<s>` that stands for the control token, so a `<s>` or `</s>` in an instruction is
    one too. first_code: the token of image code 0.
    """

    tokenizer: PreTrainedTokenizerFast
    config: LwmConfig
    first_code: int

    def __call__(
        self, images: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]], prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """Returns `images_BVHWC` uint8, `tokens_BT` and `mask_BT`, left-padded, with image code 0 at each code's place.

        A sample may have codes (int [N]) instead of images. Then `uncoded_B` marks the others, and `images_BVHWC`
        holds their images only.
        """
        uncoded = [all(image.ndim == 3 for image in one) for one in images]
        sequences = [self.tokens(prompt, len(one)) for one, prompt in zip(images, prompts, strict=True)]
        for one, has_images, tokens in zip(images, uncoded, sequences, strict=True):
            if not has_images:
                self._fill(tokens, one)
        longest = max(map(len, sequences))
        padding = self.tokenizer.pad_token_id
        padded = [[padding] * (longest - len(tokens)) + tokens for tokens in sequences]
        mask = [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in sequences]
        batch = {"tokens_BT": torch.tensor(padded), "mask_BT": torch.tensor(mask)}
        to_encode = [one for one, has_images in zip(images, uncoded, strict=True) if has_images]
        if len(to_encode) < len(images):
            batch["uncoded_B"] = torch.tensor(uncoded)
        if not to_encode:
            side = self.config.image_size
            return {**batch, "images_BVHWC": torch.zeros(0, len(images[0]), side, side, 3, dtype=torch.uint8)}
        return {**batch, "images_BVHWC": square_images(to_encode, self.config.image_size)}

    def tokens(self, prompt: str, num_images: int) -> list[int]:
        """The token sequence of one observation."""
        opening, closing = map(self._text, VISION_TAGS)
        codes: list[int] = []
        for image in range(num_images):
            end = self.config.end_of_vision if image == num_images - 1 else self.config.end_of_frame
            codes += [self.first_code] * self.config.vqgan.num_tokens + [self.first_code + end]
        return [self.tokenizer.bos_token_id, *self._text(prompt), *opening, *codes, *closing]

    def tags(self, segment: Segment) -> Tags:
        """The text around a latent action or a robot action; the closing one ends the sequence."""
        if segment not in FIELD_TAGS:
            return (), ()
        name = FIELD_TAGS[segment]
        closing = (*self._text(f"</{name}>"), self.tokenizer.eos_token_id)
        return tuple(self._text(f"<{name}>")), closing

    def grow(self, vocabulary: Vocabulary) -> None:
        """Does nothing: the segments come after the tokenizer's own tokens."""

    def save(self, folder: Path) -> None:
        """Writes the tokenizer, as transformers does."""
        save_tokenizer(self.tokenizer, folder)

    def _fill(self, tokens: list[int], images: Sequence[Int[np.ndarray, "N"]]) -> None:
        """Puts codes into their places. Raises UserError where they are not those of this tokenizer's images."""
        vqgan = self.config.vqgan
        for codes_N in images:
            if codes_N.shape != (vqgan.num_tokens,) or not 0 <= codes_N.min() <= codes_N.max() < vqgan.num_embeddings:
                raise UserError(
                    f"expected {vqgan.num_tokens} codes of an image below {vqgan.num_embeddings}, got an array of "
                    f"shape {codes_N.shape} up to {codes_N.max()}; they are those of another image tokenizer"
                )
        codes = iter(np.concatenate(images).tolist())
        for place, token in enumerate(tokens):
            if token == self.first_code:
                tokens[place] += next(codes)

    def _text(self, text: str) -> list[int]:
        """Encodes a piece of text by itself, as the model was trained: its first word has a space before it."""
        encoded: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return encoded


class LwmBackbone(PrefixBackbone):
    """Image codes and text as tokens of one Llama. The image tokenizer stays frozen, in float32."""

    language: LlamaForCausalLM

    def __init__(self, config: LwmConfig, language: LlamaForCausalLM, vqgan: VQGAN, first_code: int) -> None:
        super().__init__()
        self.config = config
        self.language = language
        self.vqgan = vqgan
        self._first_code = first_code

    @property
    def vision(self) -> nn.Module:
        return self.vqgan

    @property
    def blocks(self) -> list[nn.Module]:
        # The image tokenizer may have another precision than the rest, and a unit of sharding has only one.
        return [*self.language.model.layers, self.vqgan]

    @property
    def full_precision(self) -> list[nn.Module]:
        # In bf16 the codes would change.
        return [self.vqgan]

    def tokens(self, batch: Mapping[str, Tensor]) -> Int[Tensor, "B P"]:
        """The observation's tokens with the codes of its images in their places."""
        tokens_BP, images_BVHWC = batch["tokens_BT"], batch["images_BVHWC"]
        codes_NHW = self.vqgan(rearrange(images_BVHWC, "b v h w c -> (b v) h w c"))
        last = self._first_code + self.config.vqgan.num_embeddings
        places_BP = (tokens_BP >= self._first_code) & (tokens_BP < last)
        if "uncoded_B" in batch:
            places_BP &= batch["uncoded_B"][:, None]
        return tokens_BP.masked_scatter(places_BP, (codes_NHW + self._first_code).to(tokens_BP.dtype))

    def prefix(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B P D"], Int[Tensor, "B P"]]:
        return self._embed(self.tokens(batch)), batch["mask_BT"]

    def save(self, folder: Path) -> None:
        self.vqgan.save(folder / VQGAN_FOLDER)
        with writing(folder):
            self.language.save_pretrained(str(folder))

    def save_config(self, folder: Path) -> None:
        with writing(folder):
            self.language.config.save_pretrained(str(folder))


def create(
    config: LwmConfig, *, texts: Iterable[str], num_cameras: int, segments: Mapping[str, int]
) -> tuple[LwmBackbone, LwmProcessor, Vocabulary]:
    """Random weights and a tokenizer trained on the texts, for measurements; `lapa import` brings real ones."""
    tokenizer = train_tokenizer(texts)
    vocabulary = Vocabulary(text=len(tokenizer), vision=config.vision_rows, **segments)
    first_code = vocabulary.rows("vision").start
    return renew(config, vocabulary, num_cameras), LwmProcessor(tokenizer, config, first_code), vocabulary


def renew(config: LwmConfig, vocabulary: Vocabulary, num_cameras: int) -> LwmBackbone:
    """Random weights for an existing vocabulary."""
    language = LlamaForCausalLM(llama_config(vocabulary.size, config))
    return LwmBackbone(config, language, VQGAN(config.vqgan).eval(), vocabulary.rows("vision").start)


def load(
    config: LwmConfig,
    model: Path,
    processor: Path,
    *,
    vocabulary: Vocabulary,
    num_cameras: int,
    weights: bool = True,
) -> tuple[LwmBackbone, LwmProcessor]:
    """Reads what `save` wrote, in the saved precision. Raises UserError naming what is missing or does not fit."""
    first_code = vocabulary.rows("vision").start
    if not weights:
        described = read_config(model)
        if not isinstance(described, LlamaConfig):
            raise UserError(f"{model}: the config of a {described.model_type} model, not of a Llama; export it again")
        backbone = LwmBackbone(config, LlamaForCausalLM(described), VQGAN(config.vqgan).eval(), first_code)
        return backbone, LwmProcessor(load_tokenizer(processor), config, first_code)
    require_room(model, str(model))
    with malformed(model, "no complete Llama of transformers"):
        language, loading = load_model(LlamaForCausalLM, model, read_config(model), dtype="auto")
    require_finite_weights(model, language.named_parameters())
    if wrong := sorted({*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]}):
        raise UserError(f"{model}: weights missing, left over or misshapen: {', '.join(map(str, wrong))}")
    rows = language.get_input_embeddings().weight.shape[0]
    if rows < vocabulary.size:
        raise UserError(f"{model}: {rows} rows, but the policy's vocabulary has {vocabulary.size}")
    vqgan = VQGAN.load(model / VQGAN_FOLDER)
    if vqgan.config != config.vqgan:
        raise UserError(f"{model / VQGAN_FOLDER}: another image tokenizer than that of the policy's config")
    backbone = LwmBackbone(config, language, vqgan, first_code)
    return backbone, LwmProcessor(load_tokenizer(processor), config, first_code)


def llama_config(rows: int, sizes: Any) -> LlamaConfig:
    """The language model's config in transformers. sizes: an LwmConfig, or what has its attributes."""
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.max_length,
        rms_norm_eps=sizes.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        # No code ends a sequence: decoding runs for the length of the field.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
