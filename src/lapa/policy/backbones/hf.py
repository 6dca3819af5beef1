"""The `hf` backbone: an image-text model of transformers, from a folder or the hub.

It keeps its tokenizer, its image processor and its layout of a prompt (hf_processor.py). The segments of the vocabulary
are rows at the end of its embedding and head, so that a saved model is an ordinary folder of transformers. The families
are those of `FAMILIES`, each compared with its own processor and forward pass in the tests; others are refused, since
their marks around images, their positions or their attention may differ.

    lapa policy pretrain --preset smolvlm2-500m --data DATASET --labels LABELS --out POLICY
    python examples/plain_transformers.py POLICY image.png "open the drawer"

Axes: B batch, V cameras, P observation tokens (images and prompt), F tokens after it, S = P + F, D width, R rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from lapa import files
from lapa.errors import UserError
from lapa.hub.download import hub_folder
from lapa.nn.pretrained import load_model, read_config
from lapa.nn.saved import damaged
from lapa.nn.weights import require_finite_weights
from lapa.policy.backbones.base import Backbone, Memory, positions, require_room
from lapa.policy.backbones.hf_processor import FAMILIES, HfProcessor, model_images, native_size
from lapa.policy.config import HfConfig
from lapa.policy.lora import vocabulary_weights
from lapa.policy.vocabulary import SEGMENTS, Vocabulary

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
TESTED = "SmolVLM, Qwen2.5-VL, Qwen3-VL, PaliGemma or Gemma 3"
# As a share of the spread of the text's rows: new rows differ from each other, but little from an average word.
NEW_ROW_NOISE = 0.1


class HfBackbone(Backbone):
    """`language` is the whole image-text model, vision tower and projection included."""

    config: HfConfig

    def __init__(self, config: HfConfig, language: PreTrainedModel, vocabulary: Vocabulary) -> None:
        """vocabulary: the segments that the rows of `language` have now."""
        super().__init__()
        self.config, self.language, self.vocabulary = config, language, vocabulary
        self._takes = frozenset(inspect.signature(language.base_model.forward).parameters)
        if (connector := getattr(language.base_model, "connector", None)) is not None:
            # Some releases (5.5) put an image's tokens among the text's embeddings without a cast.
            connector.register_forward_hook(_in_precision_of_weights)

    @property
    def vision(self) -> nn.Module:
        """The vision tower; where the projection is inside it (Qwen's merger), the other parts of the tower."""
        tower = self.language.get_encoder(modality="image")
        parts = [child for name, child in tower.named_children() if "merger" not in name]
        return tower if len(parts) == len(list(tower.children())) else nn.ModuleList(parts)

    @property
    def blocks(self) -> list[nn.Module]:
        return [module for module in self.language.modules() if isinstance(module, GradientCheckpointingLayer)]

    def read(
        self, batch: Mapping[str, Tensor], tokens_BF: Int[Tensor, "B F"]
    ) -> tuple[Float[Tensor, "B S D"], Int[Tensor, "B S"]]:
        inputs = self._sequence(batch, tokens_BF)
        return self._inner(**inputs, use_cache=False).last_hidden_state, inputs["attention_mask"]

    def begin(
        self, batch: Mapping[str, Tensor], context_BC: Int[Tensor, "B C"], room: int
    ) -> tuple[Float[Tensor, "B 1 D"], Memory]:
        inputs = self._sequence(batch, context_BC)
        memory = self.new_memory(inputs["attention_mask"], _next(inputs["position_ids"]), room)
        inputs["attention_mask"] = memory.mask_BS
        output = self._inner(**inputs, past_key_values=memory.cache, use_cache=True)
        return output.last_hidden_state[:, -1:], memory

    def advance(self, memory: Memory, tokens_BF: Int[Tensor, "B F"]) -> Float[Tensor, "B F D"]:
        position_ids = memory.grow(tokens_BF)
        return self.step(
            input_ids=tokens_BF,
            attention_mask=memory.mask_BS,
            position_ids=position_ids.expand(3, -1, -1) if self._has_grid_positions else position_ids,
            past_key_values=memory.cache,
            use_cache=True,
        )

    def logits(self, hidden_BFD: Float[Tensor, "B F D"], rows: range) -> Float[Tensor, "B F R"]:
        logits_BFR = super().logits(hidden_BFD, rows)
        cap = getattr(self.language.config.get_text_config(), "final_logit_softcapping", None)
        return logits_BFR if cap is None else cap * torch.tanh(logits_BFR / cap)

    def resize(self, vocabulary: Vocabulary) -> None:
        """New rows are the mean of the text's rows plus a little noise. Raises UserError where a segment would move."""
        for segment in SEGMENTS:
            old, new = self.vocabulary.rows(segment), vocabulary.rows(segment)
            if len(old) and (old.start != new.start or len(new) < len(old)):
                raise UserError(
                    f"the {segment} segment has rows {old.start} to {old.stop - 1} and cannot move to {new.start} to "
                    f"{new.stop - 1}; start from a policy without it"
                )
        new_rows = slice(self.vocabulary.size, vocabulary.size)
        super().resize(vocabulary)
        for weight in vocabulary_weights(self.language):
            _fill_rows(weight, new_rows, self.vocabulary.text)
        self.vocabulary = vocabulary

    def save(self, folder: Path) -> None:
        with files.writing(folder):
            self.language.save_pretrained(folder)

    def save_config(self, folder: Path) -> None:
        with files.writing(folder):
            self.language.config.save_pretrained(folder)

    @property
    def _inner(self) -> Any:
        """The model without its head."""
        return self.language.base_model

    @property
    def _has_grid_positions(self) -> bool:
        """Whether positions have three axes (Qwen's M-RoPE): time, row and column."""
        return hasattr(self._inner, "get_rope_index")

    def _positions(self, batch: Mapping[str, Tensor]) -> Int[Tensor, "... B P"]:
        """Positions of the observation, which do not count the padding; with three axes where the model has them."""
        tokens_BT, mask_BT = batch["tokens_BT"], batch["mask_BT"]
        if not self._has_grid_positions:
            return positions(mask_BT) + int(_is_paligemma(self.language.config))
        # It loops over the tokens in Python: on the CPU, it does not wait for the device at each.
        found, _ = self._inner.get_rope_index(
            tokens_BT.cpu(),
            mm_token_type_ids=(tokens_BT == self.language.config.image_token_id).int().cpu(),
            image_grid_thw=batch["image_grid_thw"].flatten(0, 1).cpu(),
            attention_mask=mask_BT.cpu(),
        )
        return found.to(tokens_BT.device)

    def _sequence(self, batch: Mapping[str, Tensor], tokens_BF: Int[Tensor, "B F"]) -> dict[str, Tensor]:
        """The model's inputs for the observation and the tokens after it."""
        observed, num_after = self._positions(batch), tokens_BF.shape[1]
        after = _next(observed) + torch.arange(num_after, device=tokens_BF.device)
        inputs = {
            "input_ids": torch.cat([batch["tokens_BT"], tokens_BF], dim=1),
            "attention_mask": F.pad(batch["mask_BT"], (0, num_after), value=1),
            "position_ids": torch.cat([observed, after.expand(*observed.shape[:-1], -1)], dim=-1),
            **model_images({name: value for name, value in batch.items() if name in self._takes}),
        }
        if "types_BT" in batch:
            # PaliGemma's types are 0 for its prompt, Gemma's 1 for its images: both attend to what comes later, too.
            after_type = int(_is_paligemma(self.language.config))
            inputs["token_type_ids"] = F.pad(batch["types_BT"], (0, num_after), value=after_type)
        return inputs


def create(
    config: HfConfig, *, texts: Iterable[str], num_cameras: int, segments: Mapping[str, int]
) -> tuple[HfBackbone, HfProcessor, Vocabulary]:
    """The source's model with rows for the segments. texts: ignored, since the model has its own tokenizer.

    Raises UserError where the source is incomplete or no image-text model.
    """
    del texts
    folder = hub_folder(config.source, FILES)
    language = _load_language(folder, config.source, new=True)
    processor = HfProcessor.from_source(
        folder, language, name=config.source, image_size=config.image_size, num_cameras=num_cameras
    )
    vocabulary = Vocabulary(text=len(processor.tokenizer), **segments)
    processor.grow(vocabulary)
    return _grown(config, language, vocabulary), processor, vocabulary


def renew(config: HfConfig, vocabulary: Vocabulary, num_cameras: int) -> HfBackbone:
    """The source's model with new rows for an existing vocabulary. Raises UserError as `create` does."""
    del num_cameras
    folder = hub_folder(config.source, FILES)
    return _grown(config, _load_language(folder, config.source, new=True), vocabulary)


def load(
    config: HfConfig,
    model: Path,
    processor: Path,
    *,
    vocabulary: Vocabulary,
    num_cameras: int,
    weights: bool = True,
) -> tuple[HfBackbone, HfProcessor]:
    """Reads the files of `save`. Raises UserError naming what is missing or does not fit."""
    language = _load_language(model, str(model)) if weights else _blank_language(model)
    rows = len(vocabulary_weights(language)[0])
    if rows < vocabulary.size:
        raise UserError(f"{model}: has {rows} rows for a vocabulary of {vocabulary.size}; train the policy again")
    loaded = HfProcessor.load(processor, num_cameras=num_cameras)
    if loaded.layout.image_size != config.image_size:
        raise UserError(
            f"{processor}: prepares images of {loaded.layout.image_size} pixels, the policy reads {config.image_size}; "
            "copy the policy again"
        )
    return HfBackbone(config, language, vocabulary), loaded


def native_image_size(source: str) -> int:
    """The side of the square images that a model was made for, in pixels; 224 for one that takes any (Qwen)."""
    folder = hub_folder(source, ["config.json"])
    return native_size(_read_config(folder, source, new=True)) or 224


def _read_config(folder: Path, name: str, *, new: bool) -> PreTrainedConfig:
    """Raises UserError where the folder has no model, or none that reads images as tokens among the text's.

    new: whether a policy begins with it, which takes a family of `FAMILIES`; one of before keeps its own layout.
    """
    with damaged(f"{name}: no model that transformers knows", f"; give one such as {TESTED}"):
        config = read_config(folder)
    what = (config.architectures or [f"{config.model_type} model"])[0]
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(f"{name}: a {what}, which is no image-text model; give one such as {TESTED}")
    if config.is_encoder_decoder or getattr(config, "image_token_id", None) is None:
        raise UserError(f"{name}: a {what}, whose images are not tokens among the text's; give {TESTED}")
    if new and config.model_type not in FAMILIES:
        raise UserError(
            f"{name}: a {what}, whose prompt (marks around images, token types, positions) is not known here; give one "
            f"of {', '.join(FAMILIES)}"
        )
    return config


def _load_language(folder: Path, name: str, *, new: bool = False) -> PreTrainedModel:
    """The model in the precision that it was saved in. Raises UserError where it is incomplete or cannot be used."""
    config = _read_config(folder, name, new=new)
    require_room(folder, name)
    with damaged(f"{name}: its weights cannot be loaded"):
        language, report = load_model(AutoModelForImageTextToText, folder, config, dtype="auto")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name}: has no weights for {len(missing)} parameters ({missing[0]}, ...); download it again")
    require_finite_weights(name, language.named_parameters())
    head = language.get_output_embeddings()
    if head is None or head.bias is not None or not hasattr(language.base_model, "get_image_features"):
        raise UserError(f"{name}: a {type(language).__name__} cannot be used (its head or its images); give {TESTED}")
    return cast(PreTrainedModel, language)


def _blank_language(folder: Path) -> PreTrainedModel:
    """The model that the config in a folder describes, in its precision, with arbitrary weights."""
    config = _read_config(folder, str(folder), new=False)
    with damaged(f"{folder / 'config.json'}: no model can be built from it"):
        language = AutoModelForImageTextToText.from_config(config, dtype=config.dtype)
    return cast(PreTrainedModel, language)


def _grown(config: HfConfig, language: PreTrainedModel, vocabulary: Vocabulary) -> HfBackbone:
    """A backbone with rows for the segments, of a model that has only those of text."""
    backbone = HfBackbone(config, language, Vocabulary(text=vocabulary.text))
    backbone.resize(vocabulary)
    return backbone


def _in_precision_of_weights(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    """A forward hook, for an output that does not depend on autocast."""
    return output.to(next(module.parameters()).dtype)


def _is_paligemma(config: PreTrainedConfig) -> bool:
    """Whether positions count from one, and attention within the prompt is bidirectional."""
    return config.model_type == "paligemma"


def _next(observed: Int[Tensor, "... B P"]) -> Int[Tensor, "B 1"]:
    """The position after the observation: not its number of tokens, since an image's tokens may share positions."""
    latest_BP = observed.amax(0) if observed.ndim == 3 else observed
    return latest_BP.amax(-1, keepdim=True) + 1


@torch.no_grad()
def _fill_rows(weight: nn.Parameter, rows: slice, num_text: int) -> None:
    """Fills new rows, which may exist already, unused, where a matrix has more rows than its tokenizer."""
    mean = weight[:num_text].mean(0, dtype=torch.float32)
    spread = weight[: num_text : max(1, num_text // 4096)].float().std(0)
    count = rows.stop - rows.start
    noise = torch.randn(count, len(mean), device=weight.device)
    weight[rows] = (mean + NEW_ROW_NOISE * spread * noise).to(weight.dtype)
