"""Images and prompts for an image-text model of transformers, laid out as by the model's own processor.

The tokenizer and the image processor are called directly: the combined processors need packages that nothing here
needs (torchvision, num2words). A prompt is where the model's chat template puts the user's text, after the images;
PaliGemma, which has no template, reads `<image>...<bos>prompt\\n`. The marks around an image (`_framed`) and the types
of tokens differ by family; the tests compare each family with its combined processor. A prompt is never more than text:
a control token in it, such as `<image>` or `</s>`, is read as ordinary letters.

    processor = HfProcessor.load(POLICY / "processor", num_cameras=1)
    processor([[image_HWC]], ["open the drawer"])     # tokens_BT, mask_BT, pixel_values, ...

Axes: B batch, V cameras, T tokens of images and prompt, H W image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import jinja2
import numpy as np
import torch
import transformers
from jaxtyping import Int, UInt8
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
)

# Of many releases, such as 5.5 and 5.12, the same name in `transformers` itself needs torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from lapa import config as configs
from lapa import files
from lapa.console import warn
from lapa.data.transforms import resize_and_crop
from lapa.errors import UserError
from lapa.nn.pretrained import NO_CODE
from lapa.nn.saved import damaged
from lapa.policy.backbones.base import Processor
from lapa.policy.backbones.tiny import save_tokenizer
from lapa.policy.vocabulary import Segment, Vocabulary

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
LAYOUT = "layout.json"
# Stands for the prompt in a template while it is rendered: a character without a meaning.
WORDS = "\ue000"
SEGMENT_TOKENS: dict[Segment, str] = {
    "latent": "<latent_{}>",
    "bins": "<bin_{}>",
    "state": "<state_{}>",
    "query": "<query_{}>",
}
IDEFICS = ("idefics3", "smolvlm")
# The families whose prompts are known: `model_type` of their configs.
FAMILIES = (*IDEFICS, "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3", "internvl", "llava")
if getattr(transformers.SmolVLMImageProcessorPil, "is_dummy", False):
    # The same releases do not find these two either without torchvision, which neither needs.
    AutoImageProcessor.register(Idefics3Config, Idefics3ImageProcessorPil, exist_ok=True)
    AutoImageProcessor.register(SmolVLMConfig, SmolVLMImageProcessorPil, exist_ok=True)


@dataclass(frozen=True)
class Layout:
    """The text around a prompt.

    image: the placeholder tokens of one image and what stands around them, as text. before, after: the text around the
    prompt and its `num_cameras` images; empty until `for_cameras` fills them in. placeholder: what stands for an image
    in the chat template, where that is not the image token.
    """

    model_type: str
    image_size: int
    image_token: str
    image: str
    num_cameras: int = 0
    before: str = ""
    after: str = ""
    placeholder: str = ""

    def for_cameras(self, num_cameras: int, tokenizer: PreTrainedTokenizerFast) -> Layout:
        """The layout for so many images: as the chat template has it, else images, the first token, the prompt."""
        if num_cameras < 1:
            raise UserError("a policy needs at least one camera")
        begin = tokenizer.bos_token or ""
        if tokenizer.chat_template:
            text = _rendered(tokenizer, tokenizer.chat_template, num_cameras)
            text = text.replace(self.placeholder or self.image_token, self.image)
            # As transformers does, unless the template has the token that opens a text, the tokenizer adds it.
            if begin and tokenizer.encode("")[:1] == [tokenizer.bos_token_id] and not text.startswith(begin):
                text = begin + text
        elif self.model_type == "paligemma":
            text = f"{self.image * num_cameras}{begin}{WORDS}\n"
        else:
            text = f"{begin}{self.image * num_cameras}{WORDS}"
        before, after = text.split(WORDS)
        return replace(self, num_cameras=num_cameras, before=before, after=after)


class HfProcessor(Processor):
    """A model's tokenizer and image processor, and the layout of its prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_processor: Any, layout: Layout) -> None:
        self.tokenizer, self.image_processor, self.layout = tokenizer, image_processor, layout
        self._plain = _without_control_tokens(tokenizer)
        self._control = frozenset(_control_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
        # Text between the prompt and the nearest control token is read with the prompt, since tokens may span both.
        names = sorted(_control_tokens(tokenizer), key=len, reverse=True)
        control = re.compile("|".join(map(re.escape, names)) if names else "(?!)")
        head = max((match.end() for match in control.finditer(layout.before)), default=0)
        first = control.search(layout.after)
        tail = first.start() if first else len(layout.after)
        self._head, self._lead = self._encode(layout.before[:head]), layout.before[head:]
        self._trail, self._tail = layout.after[:tail], self._encode(layout.after[tail:])

    def __call__(
        self, images: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]], prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """`tokens_BT`, `mask_BT`, `types_BT` for some families, and the image processor's tensors, B V first."""
        for one in images:
            if len(one) != self.layout.num_cameras:
                raise UserError(f"a policy of {self.layout.num_cameras} image slots was given {len(one)} images")
        tokens = [[*self._head, *self._words(prompt), *self._tail] for prompt in prompts]
        length = max(map(len, tokens))
        pad = self.tokenizer.pad_token_id or 0
        tokens_BT = torch.tensor([[pad] * (length - len(one)) + one for one in tokens])
        return {
            "tokens_BT": tokens_BT,
            "mask_BT": torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in tokens]),
            **self._types(tokens_BT),
            **_pixels(self.image_processor, images, self.layout.image_size),
        }

    def _types(self, tokens_BT: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """`types_BT` where attention depends on them: 0 everywhere (PaliGemma), 1 for an image's tokens (Gemma 3)."""
        if self.layout.model_type == "paligemma":
            return {"types_BT": torch.zeros_like(tokens_BT)}
        # Policies of before have no marks around Gemma's images, and learned without types.
        if self.layout.model_type == "gemma3" and self.layout.placeholder:
            image_token_id = cast(int, self.tokenizer.convert_tokens_to_ids(self.layout.image_token))
            return {"types_BT": torch.eq(tokens_BT, image_token_id).long()}
        return {}

    def grow(self, vocabulary: Vocabulary) -> None:
        """Adds a token for each row of the segments. Raises UserError where it would not have the row's number."""
        if vocabulary.vision:
            raise UserError("a model of transformers has no image codes: leave the vision segment out")
        names = {
            row: name.format(code)
            for segment, name in SEGMENT_TOKENS.items()
            for code, row in enumerate(vocabulary.rows(segment))
        }
        known = self.tokenizer.get_vocab()
        for row, name in names.items():
            if known.get(name, row) != row:
                raise UserError(
                    f"the tokenizer has a token {name} of its own ({known[name]}, wanted {row}); give another model, "
                    "or start from a policy with fewer segments"
                )
        self.tokenizer.add_tokens(
            [AddedToken(name, normalized=False, special=False) for name in names.values() if name not in known]
        )
        tokens = self._encode("".join(names.values()))
        if tokens != list(names):
            raise UserError(
                "the tokenizer does not read <latent_0> and the like as one token each, numbered from "
                f"{min(names)}: it returns {tokens[:4]}; give another model"
            )

    def save(self, folder: Path) -> None:
        """Writes tokenizer and image processor as transformers does, and the layout."""
        save_tokenizer(self.tokenizer, folder)
        with files.writing(folder):
            self.image_processor.save_pretrained(str(folder))
        files.write_json(Path(folder) / LAYOUT, asdict(self.layout))

    @classmethod
    def load(cls, folder: Path, *, num_cameras: int) -> HfProcessor:
        """Reads the files of `save`, for any number of cameras. Raises UserError naming what is missing."""
        tokenizer, image_processor = _load_parts(folder, str(folder))
        layout = configs.load(Layout, folder / LAYOUT)
        _require_image_size(image_processor, str(folder), layout.image_size)
        with damaged(f"{folder}: the prompt cannot be laid out", "; train the policy again"):
            if layout.num_cameras != num_cameras:
                layout = layout.for_cameras(num_cameras, tokenizer)
            return cls(tokenizer, image_processor, layout)

    @classmethod
    def from_source(
        cls, folder: Path, language: PreTrainedModel, *, name: str, image_size: int, num_cameras: int
    ) -> HfProcessor:
        """The processor of a published model. Raises UserError naming what is missing or does not fit."""
        tokenizer, image_processor = _load_parts(folder, name)
        highest = max(tokenizer.get_vocab().values())
        if highest + 1 != len(tokenizer):
            raise UserError(
                f"{name}: its tokenizer has {len(tokenizer)} tokens numbered up to {highest}; segments cannot follow "
                "gaps; give another model"
            )
        model_type, image_token_id = language.config.model_type, language.config.image_token_id
        if image_token_id >= len(tokenizer):
            raise UserError(
                f"{name}: its tokenizer lacks the image token {image_token_id}; give the model's own tokenizer"
            )
        _set_image_size(image_processor, language, name, image_size)
        _require_image_size(image_processor, name, image_size)
        count = _count_image_tokens(image_processor, language, name, image_size)
        image_token = str(tokenizer.convert_ids_to_tokens(image_token_id))
        with damaged(f"{name}: its prompt cannot be laid out"):
            placeholder, image = _framed(tokenizer, language.config, image_token, count)
            tokenizer.chat_template = _chat_template(folder, tokenizer, placeholder or image_token, name)
            layout = Layout(model_type, image_size, image_token, image, placeholder=placeholder)
            return cls(tokenizer, image_processor, layout.for_cameras(num_cameras, tokenizer))

    def _encode(self, text: str) -> list[int]:
        """Tokens of the layout's text, in which control tokens are recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _words(self, words: str) -> list[int]:
        """Tokens of the user's prompt, in which no control token is recognised."""
        # Half a surrogate pair, which JSON may contain, has no UTF-8.
        clean = words.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = f"{self._lead}{clean}{self._trail}"
        tokens: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if self._control.isdisjoint(tokens):
            return tokens
        # A tokenizer whose vocabulary includes its control tokens (Unigram) cannot find them letter by letter.
        return [token for letter in text for token in self._plain.encode(letter, add_special_tokens=False).ids]

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "image_processor": self.image_processor, "layout": self.layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _framed(
    tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, image_token: str, count: int
) -> tuple[str, str]:
    """The placeholder of an image in a template where it is not the image token, and the text that takes its place."""
    image = image_token * count
    if config.model_type in IDEFICS:
        return "", f"<fake_token_around_image><global-img>{image}<fake_token_around_image>"
    if config.model_type == "gemma3":
        begin = cast(str, tokenizer.convert_ids_to_tokens(config.boi_token_index))
        end = cast(str, tokenizer.convert_ids_to_tokens(config.eoi_token_index))
        return begin, f"\n\n{begin}{image}{end}\n\n"
    if config.model_type == "internvl":
        return "", f"{tokenizer.start_image_token}{image}{tokenizer.end_image_token}"
    return "", image


def native_size(config: PreTrainedConfig) -> int | None:
    """The side of the square images that a vision tower was made for, in pixels; None where it takes any."""
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    if isinstance(size, list | tuple):
        size = size[0] if len(set(size)) == 1 else None
    return size if isinstance(size, int) else None


def model_images(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tensors of a batch, each with axes B V first, as the model's inputs."""
    images = {name: tensor.flatten(0, 1) for name, tensor in tensors.items()}
    if "image_grid_thw" in images:
        # Qwen reads the patches of all images as one sequence.
        images["pixel_values"] = images["pixel_values"].flatten(0, 1)
    return images


def _pixels(
    image_processor: Any, images: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]], size: int
) -> dict[str, Tensor]:
    """The tensors of the image processor for square images, each with axes B V first."""
    squares = [resize_and_crop(image[None], size)[0] for one in images for image in one]
    # One list for each image, since some processors pad all images of a list to a common number of tiles.
    batch = image_processor([[square] for square in squares], return_tensors="pt", input_data_format="channels_last")
    shape = (len(images), len(images[0]))
    return {
        # Where patches are one sequence (Qwen), it is split by image again.
        name: tensor.reshape(*shape, *([-1] if len(tensor) > len(squares) else []), *tensor.shape[1:])
        for name, tensor in batch.items()
        # Square images need no mask of padding.
        if isinstance(tensor, Tensor) and name != "pixel_attention_mask"
    }


def _chat_template(folder: Path, tokenizer: PreTrainedTokenizerFast, image_token: str, name: str) -> str | None:
    """The first template with a placeholder for each image: the processor's (in three file formats) or the tokenizer's.

    Some tokenizers' templates are for text only. None where no template fits, with a warning if there was any.
    """
    templates: list[Any] = []
    for file in ("chat_template.json", "processor_config.json"):
        if (folder / file).is_file():
            written = files.read_json(folder / file)
            templates.append(written.get("chat_template") if isinstance(written, dict) else None)
    if (folder / "chat_template.jinja").is_file():
        templates.append((folder / "chat_template.jinja").read_text(errors="replace"))
    templates.append(tokenizer.chat_template)
    for template in templates:
        if isinstance(template, str) and _fits(tokenizer, template, image_token):
            return template
    if any(templates):
        warn(f"{name}: its chat template has no {image_token} for an image; images come first, then the prompt alone")
    return None


def _fits(tokenizer: PreTrainedTokenizerFast, template: str, image_token: str) -> bool:
    try:
        text = _rendered(tokenizer, template, num_cameras=2)
    except (jinja2.TemplateError, TypeError):
        return False
    return text.count(image_token) == 2 and text.count(WORDS) == 1


def _rendered(tokenizer: PreTrainedTokenizerFast, template: str, num_cameras: int) -> str:
    content: Any = [*({"type": "image"} for _ in range(num_cameras)), {"type": "text", "text": WORDS}]
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )


def _set_image_size(image_processor: Any, language: PreTrainedModel, name: str, image_size: int) -> None:
    """Makes the image processor keep squares of `image_size`. Raises UserError where the model cannot read them."""
    vision, native = language.config.vision_config, native_size(language.config)
    # One view of an image, as its own processor has for one of the model's size.
    for tiles in ("do_pan_and_scan", "crop_to_patches"):
        if hasattr(image_processor, tiles):
            setattr(image_processor, tiles, False)
    if language.config.model_type in IDEFICS:
        _require_size(image_size, vision.patch_size * language.config.scale_factor, native, name)
        # Splitting would turn an image into many tiles, each as costly as the whole.
        image_processor.do_image_splitting = False
        image_processor.size = image_processor.max_image_size = {"longest_edge": image_size}
    elif hasattr(image_processor, "merge_size"):
        _require_size(image_size, image_processor.patch_size * image_processor.merge_size, None, name)
        # These "edges" are numbers of pixels.
        image_processor.size = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    elif native is not None and image_size != native:
        raise UserError(f"{name}: reads images of {native} pixels, not {image_size}; give --hf-image-size {native}")


def _require_image_size(image_processor: Any, name: str, image_size: int) -> None:
    """Raises UserError where an image processor would make other images than squares of `image_size`."""
    pixels = image_size**2 if hasattr(image_processor, "merge_size") else image_size
    for key in ("size", "crop_size", "max_image_size"):
        given = getattr(image_processor, key, None)
        # A number, a dict, or of transformers' class of sizes.
        sides = [given] if given is None or isinstance(given, int) else getattr(given, "__dict__", given).values()
        if wrong := [side for side in sides if side is not None and side != pixels]:
            raise UserError(f"{name}: its image processor has the {key} {wrong[0]}, the model reads {pixels}")


def _require_size(image_size: int, multiple: int, largest: int | None, name: str) -> None:
    if image_size % multiple or image_size < multiple or (largest and image_size > largest):
        nearest = max(multiple, min(round(image_size / multiple) * multiple, largest or image_size + multiple))
        limit = f", at most {largest}" if largest else ""
        raise UserError(
            f"{name}: reads images whose side is a multiple of {multiple} pixels{limit}, not {image_size}; "
            f"give --hf-image-size {nearest}"
        )


@torch.no_grad()
def _count_image_tokens(image_processor: Any, language: PreTrainedModel, name: str, image_size: int) -> int:
    """The number of tokens of one image, by a forward pass of a grey one."""
    grey = np.full((image_size, image_size, 3), 128, dtype=np.uint8)
    with damaged(f"{name}: its image processor does not fit the model", "; copy the model's own into it"):
        images = model_images(_pixels(image_processor, [[grey]], image_size))
        images = {key: value.to(language.device) for key, value in images.items()}
        inner: Any = language.base_model
        features = inner.get_image_features(**images).pooler_output
    each = list(features) if isinstance(features, list | tuple) else [features]
    return sum(one.numel() // one.shape[-1] for one in each)


def _load_parts(folder: Path, name: str) -> tuple[PreTrainedTokenizerFast, Any]:
    folder = Path(folder)
    for what, needed in (("tokenizer", TOKENIZER_FILES), ("image processor", IMAGE_FILES)):
        if not any((folder / file).is_file() for file in needed):
            raise UserError(f"{name}: has no {what} (none of {', '.join(needed)}); copy the model's own into it")
    with damaged(
        f"{name}: tokenizer.json cannot be loaded, or tokenizer_config.json", "; copy the model's own into it"
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    with damaged(f"{name}: its image processor cannot be loaded", "; copy the model's own into it"):
        # The other backend needs torchvision.
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **NO_CODE)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{name}: its tokenizer is not of the tokenizers library; add a tokenizer.json")
    return tokenizer, image_processor


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Tokens that are more than a piece of text, which the runs of white space that Gemma adds are not."""
    return {token: row for token, row in tokenizer.get_added_vocab().items() if token.strip(" \t\n▁")}


def _without_control_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    control = _control_tokens(tokenizer)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in control]
    state.update(post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(state))
