"""Imports LAPA-7B, or the LWM-Chat-1M that it starts from, as a policy of this project.

    lapa import lapa-7b --params params --vqgan vqgan --tokenizer tokenizer.model --out POLICY
    from_released(open_checkpoint(Path("params")), PUBLISHED).logits(tokens_BT, vision_mask_BT, latent_mask_BT)

LAPA (https://arxiv.org/abs/2410.11758), code https://github.com/LatentActionPretraining/LAPA; the three files are those
of https://huggingface.co/latent-action-pretraining/LAPA-7B-openx, or of LWM-Chat-1M-Jax. `params` is read and written
tensor by tensor: LAPA-7B (13.7 GB in bfloat16) passes through about 2 GB of memory. POLICY/model is an ordinary
LlamaForCausalLM, POLICY/processor an ordinary tokenizer of transformers. Nothing is written or overwritten before
every tensor's name and shape is known to fit.

The released model has an embedding table and a head for each kind of token, chosen by masks; concatenated they are one
vocabulary, text | vision | latent | bins. The rest is Llama-7B with RoPE on interleaved pairs, whose rows are reordered
to halves here. A checkpoint holds, each under `transformer/` or as a head, and nothing else:

    wte vte dte ate /embedding                    tables of text, vision, latent actions and robot actions [rows, D]
    lm_head vision_head delta_head action_head    /kernel, their heads [D, rows]
    ln_f/kernel                                   the final norm [D]
    h/scan_decoder/...                            all layers stacked, or h/0/..., h/1/...: attention_norm and ffn_norm
                                                  /kernel [D], attention/{wq,wk,wv,wo}/kernel, feed_forward/{w1,w2,w3}
                                                  /kernel [in, out]

LWM-Chat-1M has no `dte` and `delta_head`; only a finetuned policy has `ate` and `action_head`.

Axes: B batch, T tokens, D width, R rows of a segment.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lapa import config as configs
from lapa.console import finish, progress, say
from lapa.errors import UserError, unknown
from lapa.files import atomic_path, claim_output, errors_about, read_json, write_json, writing
from lapa.locks import locks_output
from lapa.nn.weights import finite_weights, require_finite_weights
from lapa.policy.config import LwmConfig, VQGANConfig
from lapa.policy.model import PolicyConfig
from lapa.policy.prompts import PROMPTS, Prompts
from lapa.policy.runtime import MODEL, PROCESSOR, is_policy, write_policy_config
from lapa.policy.vocabulary import Segment, Vocabulary
from lapa.released import vqgan
from lapa.released.checkpoints import (
    StoredTensors,
    malformed,
    open_checkpoint,
    require_floats,
    require_shapes,
    shapes_of,
)
from lapa.released.config import ImportLapaConfig
from lapa.released.lwm import VQGAN_FOLDER, LwmProcessor, llama_config

PUBLISHED: dict[str, Any] = {
    "vocab_size": 32000,
    "vision_vocab_size": 8448,
    "delta_vocab_size": 8,
    "action_vocab_size": 256,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "theta": 50_000_000,
    "max_sequence_length": 4096,
    "eof_token": 8192,
    "eov_token": 8193,
}
# Taken from the checkpoint's tables where a config lacks them.
OPTIONAL_SIZES = ("delta_vocab_size", "action_vocab_size")
REQUIRED = (
    "vocab_size",
    "vision_vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
REAL = ("rms_norm_eps", "theta")
# Beginnings of keys that configure how the released code ran, and not the model.
OF_THE_RUN = ("scan_", "remat_", "mesh_", "param_scan_", "use_", "tie_", "initializer_", "bos_", "eos_", "pad_")

TABLES: dict[Segment, tuple[str, str, str]] = {
    "text": ("transformer/wte/embedding", "lm_head/kernel", "vocab_size"),
    "vision": ("transformer/vte/embedding", "vision_head/kernel", "vision_vocab_size"),
    "latent": ("transformer/dte/embedding", "delta_head/kernel", "delta_vocab_size"),
    "bins": ("transformer/ate/embedding", "action_head/kernel", "action_vocab_size"),
}
OPTIONAL: tuple[Segment, ...] = ("latent", "bins")
FINAL_NORM = "transformer/ln_f/kernel"
STACKED = "transformer/h/scan_decoder"
LAYER = {
    "attention/wq/kernel": "self_attn.q_proj.weight",
    "attention/wk/kernel": "self_attn.k_proj.weight",
    "attention/wv/kernel": "self_attn.v_proj.weight",
    "attention/wo/kernel": "self_attn.o_proj.weight",
    "feed_forward/w1/kernel": "mlp.gate_proj.weight",
    "feed_forward/w3/kernel": "mlp.up_proj.weight",
    "feed_forward/w2/kernel": "mlp.down_proj.weight",
    "attention_norm/kernel": "input_layernorm.weight",
    "ffn_norm/kernel": "post_attention_layernorm.weight",
}
ROTATED = ("attention/wq/kernel", "attention/wk/kernel")
LLAMA_SIZES = {
    "width": "hidden_size",
    "inner_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
    "max_length": "max_sequence_length",
}

# Share of the loss that the text around a latent action has.
TEXT_SHARE = 0.01
SHARD_BYTES = 5 << 30
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
PROBES = (
    PROMPTS["paper"].split("<s> ")[1].replace("{instruction}", "pick up the milk"),
    *("<vision>", "</vision>", "<delta>", "</delta>", "<action>", "</action>"),
    *("Öffne die Schublade", "打开抽屉", "a  b   c", "trailing ", "1234567890", "naïve café \N{ROBOT FACE}", "a\nb\tc"),
)


def from_released(params: Mapping[str, Any], config: Mapping[str, Any]) -> ReleasedPolicy:
    """Returns the policy with the released weights (arrays or tensors under the released names), in evaluation mode.

    config: the released model's (keys of PUBLISHED). Raises UserError on unknown or missing keys, and one that lists
    every tensor that is missing, left over or of another shape.
    """
    config = checked_config(config)
    vocabulary = check_weights(params, config)
    language = LlamaForCausalLM(released_llama(config, vocabulary))
    own = language.state_dict()
    for name, tensor in llama_tensors(params, config):
        own[name].copy_(tensor)
    return ReleasedPolicy(language, vocabulary).eval()


class ReleasedPolicy(nn.Module):
    """The released weights as one Llama of transformers, read with the released code's masks."""

    def __init__(self, language: LlamaForCausalLM, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.language, self.vocabulary = language, vocabulary

    def logits(
        self,
        tokens_BT: Int[Tensor, "B T"],
        vision_mask_BT: Tensor,
        latent_mask_BT: Tensor,
        action_mask_BT: Tensor | None = None,
    ) -> dict[Segment, Float[Tensor, "B T R"]]:
        """Returns the logits of each segment's head at every position.

        A token is a number within the segment whose mask is True, else within the text.
        """
        tokens = self.rows(tokens_BT, vision=vision_mask_BT, latent=latent_mask_BT, bins=action_mask_BT)
        logits = self.language(input_ids=tokens, use_cache=False).logits
        segments = {segment: self.vocabulary.rows(segment) for segment in TABLES}
        return {segment: logits[..., rows.start : rows.stop] for segment, rows in segments.items() if rows}

    def rows(self, tokens_BT: Int[Tensor, "B T"], **masks: Tensor | None) -> Int[Tensor, "B T"]:
        """Tokens of the concatenated vocabulary."""
        rows = tokens_BT.long()
        for segment, mask_BT in masks.items():
            if mask_BT is not None and bool(mask_BT.any()):
                known = self.vocabulary.rows(segment)  # type: ignore[arg-type]
                if not known:
                    raise UserError(f"this checkpoint has no {segment} segment, but the mask marks tokens of it")
                rows = torch.where(mask_BT.bool(), tokens_BT.long() + known.start, rows)
        return rows


@locks_output
def run(config: ImportLapaConfig) -> None:
    """`lapa import lapa-7b`. Raises UserError on a file that is missing, truncated or does not fit."""
    sizes, image_sizes = read_sizes(config.sizes)
    with errors_about(config.sizes):
        backbone = LwmConfig(
            **llama_sizes(sizes),
            vqgan=image_sizes,
            vision_rows=sizes["vision_vocab_size"],
            end_of_frame=sizes["eof_token"],
            end_of_vision=sizes["eov_token"],
        )
    params = open_checkpoint(config.params)
    with errors_about(config.params):
        vocabulary = check_weights(params, sizes)
        require_floats(params)
    if isinstance(params, StoredTensors) and params.skipped:
        say(f"{config.params}: {len(params.skipped)} entries next to the weights are left out (the optimizer's state)")
    images = open_checkpoint(config.vqgan)
    with errors_about(config.vqgan):
        require_shapes("the image tokenizer", shapes_of(images), vqgan.released_shapes(image_sizes))
        require_floats(images)
    tokenizer = llama_tokenizer(config.tokenizer)
    if len(tokenizer) != vocabulary.text:
        raise UserError(
            f"{config.tokenizer}: {len(tokenizer)} pieces, but {config.params} has {vocabulary.text} rows of text; "
            "name the tokenizer.model released with it"
        )
    processor = LwmProcessor(tokenizer, backbone, vocabulary.rows("vision").start)
    policy = policy_config(config, backbone, vocabulary, processor)
    dtype = TORCH_DTYPES.get(config.dtype) or params[FINAL_NORM].dtype
    if dtype not in SAFETENSORS_DTYPES:
        raise UserError(f"{config.params}: weights in {dtype} cannot be kept; give --dtype bf16 or fp32")
    llama = released_llama(sizes, vocabulary)
    shapes = llama_shapes(llama)
    image_tokenizer = vqgan.from_released(images, image_sizes)
    require_finite_weights(config.vqgan, image_tokenizer.state_dict().items())
    claim_output(
        config.out,
        complete=is_policy(config.out),
        overwrite=config.overwrite,
        resumable=False,
        inputs=[config.params, config.vqgan, config.tokenizer],
    )

    processor.save(config.out / PROCESSOR)
    image_tokenizer.save(config.out / MODEL / VQGAN_FOLDER)
    del images, image_tokenizer
    weights = finite_weights(config.params, llama_tensors(params, sizes))
    write_llama(config.out / MODEL, llama, shapes, dtype, weights)
    write_json(config.out / "metrics.json", {})
    write_policy_config(config.out, policy, configs.to_dict(config))
    what = "latent policy" if vocabulary.latent else "vision-language model without latent actions"
    if vocabulary.bins:
        what = "policy with the released robot actions' rows (their bins were not released)"
    inputs = "--data ROBOT_DATASET" if vocabulary.latent else "--data DATASET --labels LABELS"
    stage = f"{'finetune' if vocabulary.latent else 'pretrain'} --preset paper --policy {shlex.quote(str(config.out))}"
    finish(what, config.out, [f"lapa policy {stage} {inputs} --out POLICY"])


def read_sizes(path: Path | None) -> tuple[dict[str, Any], VQGANConfig]:
    """Returns the sizes of the language model and of the image tokenizer: published ones, or those of a JSON file.

    The numbers of latent and robot actions are those of the checkpoint, unless the JSON file has them.
    """
    published = {key: value for key, value in PUBLISHED.items() if key not in OPTIONAL_SIZES}
    if path is None:
        return published, VQGANConfig()
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with the sizes of a released model")
    with malformed(path, "not the sizes of a released model"):
        images = configs.from_dict(VQGANConfig, values.pop("vqgan", {}), source=f"{path}: vqgan")
        return {**published, **checked_config(values)}, images


def policy_config(
    config: ImportLapaConfig, backbone: LwmConfig, vocabulary: Vocabulary, processor: LwmProcessor
) -> PolicyConfig:
    """The config of a checkpoint's policy: the paper's prompt, and latent actions where it has them."""
    if vocabulary.latent and config.latent_length < 1:
        raise UserError(f"--latent-length must be at least 1 for {config.params}, which has latent actions")
    opening, closing = processor.tags("latent") if vocabulary.latent else ((), ())
    return PolicyConfig(
        vocabulary=vocabulary,
        cameras=(config.camera,),
        backbone=backbone,
        prompts=Prompts(PROMPTS["paper"]),
        latent_length=config.latent_length if vocabulary.latent else 0,
        latent_opening=opening,
        latent_closing=closing,
        text_weight=TEXT_SHARE if vocabulary.latent else 0.0,
    )


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that define the model. Raises UserError on unknown, missing or impossible ones."""
    if config.get("tie_word_embeddings"):
        raise UserError("the released config ties heads to embeddings; the released models do not")
    kept = {key: value for key, value in config.items() if not key.startswith(OF_THE_RUN)}
    for key in kept:
        if key not in PUBLISHED:
            raise unknown("key of the released config", key, PUBLISHED)
    if missing := [key for key in REQUIRED if key not in kept]:
        raise UserError(f"the released config needs the keys {', '.join(missing)}")
    for key, value in kept.items():
        if key in REAL:
            fits, expected = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
        else:
            least = 0 if key in ("eof_token", "eov_token", *OPTIONAL_SIZES) else 1
            fits, expected = type(value) is int and value >= least, f"a whole number of at least {least}"
        if not fits:
            raise UserError(f"{key} of the released config must be {expected}, got {value!r}")
    return kept


def released_shapes(config: Mapping[str, Any], vocabulary: Vocabulary, *, stacked: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config holds."""
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {FINAL_NORM: (width,)}
    for segment, (table, head, _) in TABLES.items():
        if rows := len(vocabulary.rows(segment)):
            shapes |= {table: (rows, width), head: (width, rows)}
    sizes = {"w1": (width, inner), "w3": (width, inner), "w2": (inner, width)}
    for name in LAYER:
        part = name.split("/")[-2]
        shape = (width,) if part.endswith("norm") else sizes.get(part, (width, width))
        if stacked:
            shapes[f"{STACKED}/{name}"] = (layers, *shape)
        else:
            shapes |= {f"transformer/h/{layer}/{name}": shape for layer in range(layers)}
    return shapes


def llama_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The released sizes under the names of LwmConfig."""
    full = {**PUBLISHED, **config}
    return {**{ours: full[theirs] for ours, theirs in LLAMA_SIZES.items()}, "rope_theta": float(full["theta"])}


def released_llama(config: Mapping[str, Any], vocabulary: Vocabulary) -> LlamaConfig:
    """The language model's config in transformers."""
    return llama_config(vocabulary.size, SimpleNamespace(**llama_sizes(config)))


def llama_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the language model's weights in transformers."""
    with torch.device("meta"):
        own = LlamaForCausalLM(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in own.items()}


def check_weights(params: Mapping[str, Any], config: Mapping[str, Any]) -> Vocabulary:
    """Returns the vocabulary of a checkpoint. Raises UserError that lists every tensor that does not fit.

    The numbers of latent and robot actions are the config's, or else those of the checkpoint's tables.
    """
    shapes = shapes_of(params)
    rows = {"text": config["vocab_size"], "vision": config["vision_vocab_size"]}
    for segment in OPTIONAL:
        table, head, key = TABLES[segment]
        if table in shapes or head in shapes:
            own = shapes[table][:1] if table in shapes else shapes[head][-1:]
            rows[segment] = config.get(key, own[0] if own else 0)
    vocabulary = Vocabulary(**rows)
    # Without any layer, those that are missing are named stacked.
    layers = [name for name in shapes if name.startswith("transformer/h/")]
    stacked = not layers or any(name.startswith(f"{STACKED}/") for name in layers)
    require_shapes("the released policy", shapes, released_shapes(config, vocabulary, stacked=stacked))
    return vocabulary


def llama_tensors(params: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields name and weight in transformers, in the order of `llama_shapes`, and reads no more than the next needs."""
    segments = [segment for segment in TABLES if TABLES[segment][0] in params]
    yield "model.embed_tokens.weight", torch.cat([_take(params, TABLES[segment][0]) for segment in segments])
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in LAYER.items():
            stacked, apart = f"{STACKED}/{theirs}", f"transformer/h/{layer}/{theirs}"
            tensor = _take(params, stacked, layer) if stacked in params else _take(params, apart)
            if theirs in ROTATED:
                tensor = pairs_to_halves(tensor, config["num_attention_heads"])
            yield f"model.layers.{layer}.{ours}", tensor.T.contiguous() if tensor.ndim == 2 else tensor
    yield "model.norm.weight", _take(params, FINAL_NORM)
    heads = [_take(params, TABLES[segment][1]) for segment in segments]
    yield "lm_head.weight", torch.cat(heads, dim=1).T.contiguous()


def pairs_to_halves(kernel_DO: Float[Tensor, "D O"], heads: int) -> Float[Tensor, "D O"]:
    """Reorders each head's outputs from (x0 y0 x1 y1 ...), rotated as pairs, to (x0 x1 ... y0 y1 ...), as halves."""
    return rearrange(kernel_DO, "d (heads pairs two) -> d (heads two pairs)", heads=heads, two=2)


def llama_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Turns a sentencepiece model of Llama's kind into an ordinary tokenizer of transformers.

    As in the authors' code, text is split at `<s>` and `</s>`, the spaces around them are dropped, and each piece of
    text begins with a space. Raises UserError where the file cannot be read, or where the result would not give the
    same tokens (Llama's is byte-pair encoding without normalisation).
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(
            'reading a tokenizer.model needs sentencepiece; install it: pip install "lapa-vla[import]"'
        ) from None
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; name the released tokenizer.model")
    with malformed(path, "not a model of sentencepiece; name the released tokenizer.model"):
        pieces = SentencePieceProcessor(model_file=str(path))
    numbers = pieces.unk_id(), pieces.bos_id(), pieces.eos_id()
    if min(numbers) < 0:
        raise UserError(f"{path}: not a tokenizer of Llama's kind: it lacks a token for unknown, beginning or end")
    special = [pieces.id_to_piece(number) for number in numbers]
    model = models.BPE(*_pieces_and_merges(pieces), unk_token=special[0], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for text in PROBES:
        if tokenizer.encode(text, add_special_tokens=False).ids != pieces.encode(text):
            raise UserError(f"{path}: not a tokenizer of Llama's kind: {text!r} would become other tokens")
    unknown, begin, end = (
        AddedToken(text, lstrip=True, rstrip=True, normalized=False, special=True) for text in special
    )
    tokenizer.add_special_tokens([unknown, begin, end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=unknown,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _pieces_and_merges(pieces: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary, and the merges that its scores imply: the better a piece's score, the earlier its merge."""
    vocabulary = {pieces.id_to_piece(number): number for number in range(pieces.get_piece_size())}
    merges = []
    for piece, number in vocabulary.items():
        if pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number):
            continue
        for cut in range(1, len(piece)):
            halves = piece[:cut], piece[cut:]
            if halves[0] in vocabulary and halves[1] in vocabulary:
                merges.append((-pieces.get_score(number), vocabulary[halves[0]], vocabulary[halves[1]], halves))
    return vocabulary, [halves for *_, halves in sorted(merges)]


def write_llama(
    folder: Path,
    llama: LlamaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Writes the language model as transformers does, with one tensor in memory at a time."""
    llama.dtype = dtype
    with progress() as bar:
        task = bar.add_task("tensors", total=len(shapes), note="")

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                bar.update(task, advance=1)
                yield name, tensor

        write_safetensors(folder, shapes, dtype, counted())
    with writing(folder):
        llama.save_pretrained(str(folder))


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards and their index, from tensors in the order of `shapes`.

    The headers come first, from the shapes alone, so that no tensor waits in memory for the others of its file.
    """
    shards = _shards(shapes, dtype.itemsize, shard_bytes)
    source = iter(tensors)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        places |= dict.fromkeys(names, file_name)
        with atomic_path(folder / file_name) as temporary, temporary.open("wb") as file:
            file.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                given, tensor = next(source)
                assert (given, tuple(tensor.shape)) == (name, shapes[name]), "tensors come in the order of their shapes"
                raw = tensor.to(dtype).contiguous().flatten().view(torch.uint8)
                file.write(memoryview(raw.numpy()))  # type: ignore[arg-type]
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        length = math.prod(shape) * itemsize
        if shards[-1] and size + length > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The header of a safetensors file: its length, and as JSON the place of each tensor."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _take(params: Mapping[str, Any], name: str, layer: int | None = None) -> Tensor:
    if isinstance(params, StoredTensors):
        return params.read(name, layer)
    return torch.as_tensor(params[name] if layer is None else params[name][layer])
