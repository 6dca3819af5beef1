"""The `lwm` backbone: a Llama that reads pictures as discrete codes of a frozen VQGAN. The released LAPA-7B is one.

Large World Model (https://arxiv.org/abs/2402.08268), LAPA (https://arxiv.org/abs/2410.11758). One vocabulary, text |
image codes | latent actions | bins, so that the language model is an ordinary LlamaForCausalLM. It reads

    BOS | prompt | <vision> | codes of each picture | end of vision | </vision>

with pictures after the first set apart by an end of frame; and a field stands between <delta> and </delta> EOS, or
after <action>. The tags are plain text of several tokens each. The paper's prompt begins with its own `<s>`.

    lapa import lapa-7b --params params --vqgan vqgan --tokenizer tokenizer.model --out POLICY

Axes: B batch, V cameras, H W image, P observation tokens, N codes of a picture, D width.
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
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lapa.errors import UserError
from lapa.files import writing
from lapa.policy.backbones.base import PrefixBackbone, Tags, require_room
from lapa.policy.backbones.tiny import square_images
from lapa.policy.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from lapa.policy.vocabulary import Segment, Vocabulary
from lapa.released.config import LwmConfig
from lapa.released.vqgan import VQGAN

VQGAN_FOLDER = "vqgan"
VISION_TAGS = "<vision>", "</vision>"
FIELD_TAGS: dict[Segment, str] = {"latent": "delta", "bins": "action"}


@dataclass(frozen=True)
class LwmProcessor:
    """The token sequence of an observation, with places for the image codes, and the pictures to fill them from.

    The paper's prompt begins with a `<s>` that is meant as the control token, so here a `<s>` or `</s>` in an
    instruction is one too.
    first_code: the token of image code 0.
    """

    tokenizer: PreTrainedTokenizerFast
    config: LwmConfig
    first_code: int

    def __call__(
        self, images: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]], prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """`images_BVHWC` uint8, `tokens_BT` and `mask_BT`, left-padded; image code 0 holds the place of each code.

        A sample may have codes (int [N]) in place of pictures. Then `pictured_B` says whose pictures are yet to be
        encoded, and `images_BVHWC` holds only these.
        """
        pictured = [all(image.ndim == 3 for image in one) for one in images]
        sequences = [self.tokens(prompt, len(one)) for one, prompt in zip(images, prompts, strict=True)]
        for one, has_pictures, tokens in zip(images, pictured, sequences, strict=True):
            if not has_pictures:
                self._fill(tokens, one)
        longest = max(map(len, sequences))
        padding = self.tokenizer.pad_token_id
        padded = [[padding] * (longest - len(tokens)) + tokens for tokens in sequences]
        mask = [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in sequences]
        batch = {"tokens_BT": torch.tensor(padded), "mask_BT": torch.tensor(mask)}
        to_encode = [one for one, has_pictures in zip(images, pictured, strict=True) if has_pictures]
        if len(to_encode) < len(images):
            batch["pictured_B"] = torch.tensor(pictured)
        if not to_encode:
            side = self.config.image_size
            return {**batch, "images_BVHWC": torch.zeros(0, len(images[0]), side, side, 3, dtype=torch.uint8)}
        return {**batch, "images_BVHWC": square_images(to_encode, self.config.image_size)}

    def tokens(self, prompt: str, num_images: int) -> list[int]:
        """The sequence of one observation."""
        opening, closing = map(self._text, VISION_TAGS)
        codes: list[int] = []
        for image in range(num_images):
            end = self.config.end_of_vision if image == num_images - 1 else self.config.end_of_frame
            codes += [self.first_code] * self.config.vqgan.num_tokens + [self.first_code + end]
        return [self.tokenizer.bos_token_id, *self._text(prompt), *opening, *codes, *closing]

    def tags(self, segment: Segment) -> Tags:
        """The text around a latent action or a robot action; the end of the sequence is part of what closes it."""
        if segment not in FIELD_TAGS:
            return (), ()
        name = FIELD_TAGS[segment]
        closing = (*self._text(f"</{name}>"), self.tokenizer.eos_token_id)
        return tuple(self._text(f"<{name}>")), closing

    def grow(self, vocabulary: Vocabulary) -> None:
        """Nothing: the segments lie beyond the tokenizer's own tokens."""

    def save(self, folder: Path) -> None:
        """Writes the tokenizer, as transformers does."""
        save_tokenizer(self.tokenizer, folder)

    def _fill(self, tokens: list[int], pictures: Sequence[Int[np.ndarray, "N"]]) -> None:
        """Puts codes into their places. UserError where they are not those of as many pictures of this tokeniser."""
        vqgan = self.config.vqgan
        for codes_N in pictures:
            if codes_N.shape != (vqgan.num_tokens,) or not 0 <= codes_N.min() <= codes_N.max() < vqgan.num_embeddings:
                raise UserError(
                    f"expected {vqgan.num_tokens} codes of a picture below {vqgan.num_embeddings}, got an array of "
                    f"shape {codes_N.shape} up to {codes_N.max()}; they are those of another image tokeniser"
                )
        codes = iter(np.concatenate(pictures).tolist())
        for place, token in enumerate(tokens):
            if token == self.first_code:
                tokens[place] += next(codes)

    def _text(self, text: str) -> list[int]:
        """Each piece of text by itself, as the model was trained: its first word has a space before it."""
        encoded: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return encoded


class LwmBackbone(PrefixBackbone):
    """Image codes and text as tokens of one Llama. The image tokeniser stays frozen, in float32."""

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
        # The image tokeniser may be of another precision than the rest, which one unit of sharding cannot be.
        return [*self.language.model.layers, self.vqgan]

    @property
    def full_precision(self) -> list[nn.Module]:
        # In bf16 the codes would change.
        return [self.vqgan]

    def tokens(self, batch: Mapping[str, Tensor]) -> Int[Tensor, "B P"]:
        """The observation's tokens with the codes of its pictures in their places."""
        tokens_BP, images_BVHWC = batch["tokens_BT"], batch["images_BVHWC"]
        codes_NHW = self.vqgan(rearrange(images_BVHWC, "b v h w c -> (b v) h w c"))
        last = self._first_code + self.config.vqgan.num_embeddings
        places_BP = (tokens_BP >= self._first_code) & (tokens_BP < last)
        if "pictured_B" in batch:
            places_BP &= batch["pictured_B"][:, None]
        return tokens_BP.masked_scatter(places_BP, (codes_NHW + self._first_code).to(tokens_BP.dtype))

    def prefix(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B P D"], Int[Tensor, "B P"]]:
        return self._embed(self.tokens(batch)), batch["mask_BT"]

    def save(self, folder: Path) -> None:
        self.vqgan.save(folder / VQGAN_FOLDER)
        with writing(folder):
            self.language.save_pretrained(str(folder))


def create(
    config: LwmConfig, *, texts: Iterable[str], num_cameras: int, segments: Mapping[str, int]
) -> tuple[LwmBackbone, LwmProcessor, Vocabulary]:
    """Random weights and a tokenizer trained on the texts, for measurements; `lapa import` brings real ones."""
    tokenizer = train_tokenizer(texts)
    vocabulary = Vocabulary(text=len(tokenizer), vision=config.vision_rows, **segments)
    first_code = vocabulary.rows("vision").start
    return renew(config, vocabulary, num_cameras), LwmProcessor(tokenizer, config, first_code), vocabulary


def renew(config: LwmConfig, vocabulary: Vocabulary, num_cameras: int) -> LwmBackbone:
    """Random weights for a vocabulary that there is already."""
    names = ("width", "inner_width", "layers", "heads", "rope_theta", "norm_eps", "max_length")
    language = LlamaForCausalLM(llama_config(vocabulary.size, **{name: getattr(config, name) for name in names}))
    return LwmBackbone(config, language, VQGAN(config.vqgan).eval(), vocabulary.rows("vision").start)


def load(
    config: LwmConfig, model: Path, processor: Path, *, vocabulary: Vocabulary, num_cameras: int
) -> tuple[LwmBackbone, LwmProcessor]:
    """What `save` wrote, in the precision that it was saved in. UserError naming what is missing or does not fit."""
    require_room(model, str(model))
    try:
        loaded: Any = LlamaForCausalLM.from_pretrained(
            model, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{model}: no complete Llama of transformers ({str(error).splitlines()[0]})") from None
    language, loading = loaded
    if wrong := sorted({*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]}):
        raise UserError(f"{model}: weights missing, left over or misshapen: {', '.join(map(str, wrong))}")
    rows = language.get_input_embeddings().weight.shape[0]
    if rows < vocabulary.size:
        raise UserError(f"{model}: {rows} rows, but the policy's vocabulary has {vocabulary.size}")
    vqgan = VQGAN.load(model / VQGAN_FOLDER)
    if vqgan.config != config.vqgan:
        raise UserError(f"{model / VQGAN_FOLDER}: another image tokeniser than the policy's config says")
    first_code = vocabulary.rows("vision").start
    backbone = LwmBackbone(config, language, vqgan, first_code)
    return backbone, LwmProcessor(load_tokenizer(processor), config, first_code)


def llama_config(
    rows: int,
    *,
    width: int,
    inner_width: int,
    layers: int,
    heads: int,
    rope_theta: float,
    norm_eps: float,
    max_length: int,
) -> LlamaConfig:
    """The language model's config in transformers."""
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=inner_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        rms_norm_eps=norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(rope_theta)},
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        # No code ends a sequence: decoding runs for the length of the field.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
