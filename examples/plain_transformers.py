"""Latent actions from a pretrained policy with transformers alone: `generate`, with a mask over the logits.

lapa policy pretrain --preset smolvlm2-500m --data DATASET --labels LABELS --out POLICY
python examples/plain_transformers.py POLICY image.png "open the drawer"

For a policy with one camera that does not read the robot's state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoTokenizer, LogitsProcessor, LogitsProcessorList

# Of many releases, such as 5.5 and 5.12, the same name in `transformers` itself needs torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor


class OnlyLatentActions(LogitsProcessor):
    """Allows the tokens `<latent_0>`, `<latent_1>`, ... and no others."""

    def __init__(self, tokenizer) -> None:
        self.allowed = [row for token, row in tokenizer.get_vocab().items() if token.startswith("<latent_")]

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.allowed] = scores[:, self.allowed]
        return masked


def main(policy: Path, image: Path, instruction: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(policy / "model")
    tokenizer = AutoTokenizer.from_pretrained(policy / "processor")
    image_processor = AutoImageProcessor.from_pretrained(policy / "processor", backend="pil")
    config = json.loads((policy / "config.json").read_text())["policy"]
    # The text around the prompt: the chat template, in which placeholder tokens stand for the image.
    layout = json.loads((policy / "processor" / "layout.json").read_text())

    prompt = layout["before"] + config["prompts"]["default"].replace("{instruction}", instruction) + layout["after"]
    inputs = tokenizer(prompt, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
    fitted = ImageOps.fit(Image.open(image).convert("RGB"), (layout["image_size"], layout["image_size"]))
    images = image_processor([[fitted]], return_tensors="pt")
    # Of an image that is not cut into parts, their number says nothing.
    inputs |= {name: value for name, value in images.items() if name not in ("num_crops", "num_patches")}
    # Some families also read the type of each token: of an image (Qwen, Gemma), of a prompt with full attention
    # (PaliGemma).
    if layout["model_type"].startswith("qwen"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    if layout["model_type"] == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    if layout["model_type"] == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])

    tokens = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=config["latent_length"],
        logits_processor=LogitsProcessorList([OnlyLatentActions(tokenizer)]),
    )
    print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
