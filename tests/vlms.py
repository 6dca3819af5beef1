"""Tiny random image-text models of the families that the `hf` backbone knows, as folders like their big sisters'.

folder = make_vlm("qwen3_vl", tmp_path / "model")     # weights, tokenizer, image processor, chat template
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# One of each kind, for every test; `idefics3`, `qwen2_vl` and `llava` are like others.
FAMILIES = ("smolvlm", "qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3", "internvl")
IMAGE_SIZE = 32
# Rows of the embedding beyond the tokenizer's, as most models have.
PADDING_ROWS = 5

SPECIAL = {
    "smolvlm": (
        *("<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<image>"),
        *("<fake_token_around_image>", "<global-img>", "<row_1_col_1>"),
    ),
    "qwen": (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
        *("<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    ),
    "paligemma": ("<pad>", "<eos>", "<bos>", "<unk>", "<image>"),
    "gemma3": (
        *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    ),
    "internvl": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    "llava": ("<s>", "</s>", "<|endoftext|>", "<image>"),
}
# By which names a tokenizer's combined processor finds its marks.
NAMED = {
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
# Added tokens that are not special: `split_special_tokens` would not keep them out of the words.
ADDED = {
    "qwen": ("<tool_call>", "</tool_call>"),
    "paligemma": ("<loc0000>", "<seg000>"),
    "gemma3": ("\n\n", "\n\n\n\n"),
}
TEMPLATES = {
    "smolvlm": (
        "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
        "{{ ':' if m.content[0].type == 'image' else ': ' }}{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma3": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{% for part in m.content %}"
        "{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}{% endfor %}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "internvl": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
        "{{ '<IMG_CONTEXT>\n' if part.type == 'image' else part.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
SENTENCEPIECE = ("paligemma", "gemma3")
EOS = {"smolvlm": "<end_of_utterance>", "paligemma": "<eos>", "gemma3": "<eos>", "llava": "</s>"}
TEXTS = ["open the drawer", "close the drawer", "push the red block to the left", "User: Assistant: user assistant\n"]


def make_vlm(family: str, folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Writes a model of random weights, with tokenizer and image processor, into `folder`; about 0.2 MB."""
    kin = {"qwen2_5_vl": "qwen", "qwen3_vl": "qwen", "qwen2_vl": "qwen", "idefics3": "smolvlm"}.get(family, family)
    tokenizer = _tokenizer(kin)
    tokenizer.save_pretrained(folder)
    if kin in TEMPLATES:
        # Where the big sisters keep it: beside the combined processor, not in the tokenizer's own file.
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES[kin]}))
    (folder / "preprocessor_config.json").write_text(json.dumps(_image_processor(family)))
    build_vlm(family, tokenizer, tied=tied, seed=seed).save_pretrained(folder)
    return folder


def build_vlm(family: str, tokenizer: PreTrainedTokenizerFast, *, tied: bool, seed: int) -> PreTrainedModel:
    """The model alone."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(_config(family, tokenizer, tied))
    if family == "gemma3":
        # It begins at zero, where an image would be nothing.
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return model


def _tokenizer(kin: str) -> PreTrainedTokenizerFast:
    tokenizer = _sentencepiece_like() if kin in SENTENCEPIECE else _byte_level()
    special = SPECIAL[kin]
    begin = {"paligemma": "<bos>", "gemma3": "<bos>", "llava": "<s>"}.get(kin)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=EOS.get(kin, "<|im_end|>"),
        pad_token="<pad>" if kin in SENTENCEPIECE else "<|endoftext|>",
        unk_token="<unk>" if kin in SENTENCEPIECE else None,
        extra_special_tokens=NAMED.get(kin),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    wrapped.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED.get(kin, ())])
    if kin in ("gemma3", "llava"):
        opening = (begin, wrapped.convert_tokens_to_ids(begin))
        wrapped.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[opening]
        )
    return wrapped


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _sentencepiece_like() -> Tokenizer:
    """As Gemma's: spaces are letters, there are no words, and what has no piece falls back to bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "\n\n\n\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*special, *sorted(state["vocab"], key=state["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: row for row, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in state["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _image_processor(family: str) -> dict[str, object]:
    mean_and_std = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    if family in ("smolvlm", "idefics3"):
        return {
            "image_processor_type": "SmolVLMImageProcessor" if family == "smolvlm" else "Idefics3ImageProcessor",
            "size": {"longest_edge": 4 * IMAGE_SIZE},
            "max_image_size": {"longest_edge": IMAGE_SIZE},
            **mean_and_std,
        }
    if family == "paligemma":
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        return {"image_processor_type": "SiglipImageProcessor", "size": size, "image_seq_length": 16, **mean_and_std}
    if family in ("gemma3", "internvl"):
        kind = {"gemma3": "Gemma3ImageProcessor", "internvl": "GotOcr2ImageProcessor"}[family]
        return {"image_processor_type": kind, "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, **mean_and_std}
    if family == "llava":
        size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
        return {"image_processor_type": "CLIPImageProcessor", **size, **mean_and_std}
    return {
        # The published ones name the class that needs torchvision.
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 256, "longest_edge": 1 << 20},
        **mean_and_std,
    }


def _config(family: str, tokenizer: PreTrainedTokenizerFast, tied: bool) -> PreTrainedConfig:
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer) + PADDING_ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        # Random weights of this size say different things about different images; of the usual 0.02 they would not.
        "initializer_range": 0.2,
        **tokens,
    }
    name = tokenizer.convert_tokens_to_ids
    if family in ("smolvlm", "idefics3"):
        return AutoConfig.for_model(
            family,
            text_config={"model_type": "llama", **text},
            vision_config=_siglip(),
            scale_factor=2,
            image_token_id=name("<image>"),
            tie_word_embeddings=tied,
        )
    if family == "llava":
        return AutoConfig.for_model(
            "llava",
            text_config={"model_type": "llama", **text},
            vision_config={"model_type": "clip_vision_model", **_siglip()},
            image_token_index=name("<image>"),
            tie_word_embeddings=tied,
        )
    if family == "paligemma":
        return AutoConfig.for_model(
            "paligemma",
            text_config={"model_type": "gemma", "head_dim": 16, **text},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_siglip()},
            image_token_index=name("<image>"),
            projection_dim=32,
            hidden_size=32,
            tie_word_embeddings=tied,
        )
    if family == "gemma3":
        return AutoConfig.for_model(
            "gemma3",
            text_config={"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 24, **text},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_siglip()},
            mm_tokens_per_image=4,
            boi_token_index=name("<start_of_image>"),
            eoi_token_index=name("<end_of_image>"),
            image_token_index=name("<image_soft_token>"),
            initializer_range=0.2,
            tie_word_embeddings=tied,
        )
    if family == "internvl":
        sides = {"image_size": [IMAGE_SIZE] * 2, "patch_size": [8, 8], "layer_scale_init_value": 1.0}
        return AutoConfig.for_model(
            "internvl",
            text_config={"model_type": "qwen2", **text},
            vision_config={"model_type": "internvl_vision", **_siglip(), **sides},
            image_token_id=name("<IMG_CONTEXT>"),
            image_seq_length=4,
            tie_word_embeddings=tied,
        )
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "initializer_range": 0.2,
        **(
            {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
            if family == "qwen3_vl"
            else {"window_size": 16, "fullatt_block_indexes": [1]}
        ),
        # Qwen2-VL has these sizes under other names.
        **({"embed_dim": 32, "mlp_ratio": 2} if family == "qwen2_vl" else {}),
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return AutoConfig.for_model(
        family,
        text_config={**text, **({"head_dim": 16} if family == "qwen3_vl" else {}), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=name("<|image_pad|>"),
        video_token_id=name("<|video_pad|>"),
        vision_start_token_id=name("<|vision_start|>"),
        vision_end_token_id=name("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def _siglip() -> dict[str, object]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
