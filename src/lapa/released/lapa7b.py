"""Turns what LAPA's authors released, or the LWM-Chat-1M that they began from, into a policy folder of this project.

    lapa import lapa-7b --params params --vqgan vqgan --tokenizer tokenizer.model --out POLICY

The three files are those of https://huggingface.co/latent-action-pretraining/LAPA-7B-openx, or of LWM-Chat-1M-Jax.
`params` is read and written tensor by tensor: LAPA-7B (13.7 GB in bfloat16) passes through about 2 GB of memory. The
language model in POLICY/model is an ordinary LlamaForCausalLM, POLICY/processor an ordinary tokenizer of transformers.
Nothing is written or overwritten before every tensor's name and shape is known to fit.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lapa import config as configs
from lapa.console import finish, progress, say
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output, naming, read_json, write_json, writing
from lapa.policy.checkpoint import CONFIG, MODEL, PROCESSOR, is_policy
from lapa.policy.model import PolicyConfig
from lapa.policy.prompts import PROMPTS, Prompts
from lapa.policy.vocabulary import Vocabulary
from lapa.released import llama as released
from lapa.released import vqgan
from lapa.released.checkpoints import StoredTensors, open_checkpoint, require_floats, require_shapes, shapes_of
from lapa.released.lwm import VQGAN_FOLDER, LwmConfig, LwmProcessor
from lapa.released.pickled import reading
from lapa.released.vqgan import VQGANConfig

SHARD_BYTES = 5 << 30
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
PROBES = (
    PROMPTS["paper"].split("<s> ")[1].replace("{instruction}", "pick up the milk"),
    *("<vision>", "</vision>", "<delta>", "</delta>", "<action>", "</action>"),
    *("Öffne die Schublade", "打开抽屉", "a  b   c", "trailing ", "1234567890", "naïve café \N{ROBOT FACE}", "a\nb\tc"),
)


@dataclass(frozen=True, kw_only=True)
class ImportLapaConfig:
    """Import the released LAPA-7B, a policy finetuned from it with the authors' code, or LWM-Chat-1M."""

    params: Path
    """The released weights: the authors' streaming checkpoint."""
    vqgan: Path
    """The released image tokeniser."""
    tokenizer: Path
    """The released tokenizer.model, of sentencepiece (needs lapa-vla[import])."""
    out: Path
    """Folder of the policy to write."""
    camera: str = "image"
    """What to call the picture that the policy sees."""
    latent_length: int = 4
    """Tokens of a latent action, where the checkpoint has latent actions."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision to write the language model in; auto: that of the file."""
    sizes: Path | None = None
    """JSON with the sizes of a model other than the published one: keys of the authors' Llama config, and `vqgan`."""
    overwrite: bool = False
    """Replace what `out` holds."""


def run(config: ImportLapaConfig) -> None:
    """`lapa import lapa-7b`. Raises UserError on a file that is missing, truncated or does not fit."""
    sizes, image_sizes = read_sizes(config.sizes)
    with naming(config.sizes):
        backbone = lwm_config(sizes, image_sizes)
    params = open_checkpoint(config.params)
    with naming(config.params):
        vocabulary = released.check_weights(params, sizes)
        require_floats(params)
    if isinstance(params, StoredTensors) and params.skipped:
        say(f"{config.params}: {len(params.skipped)} entries beside the weights are left out (the optimiser's state)")
    images = open_checkpoint(config.vqgan)
    with naming(config.vqgan):
        require_shapes("the image tokeniser", shapes_of(images), vqgan.released_shapes(image_sizes))
        require_floats(images)
    tokenizer = llama_tokenizer(config.tokenizer)
    if len(tokenizer) != vocabulary.text:
        raise UserError(
            f"{config.tokenizer}: {len(tokenizer)} pieces, but {config.params} has {vocabulary.text} of text"
        )
    processor = LwmProcessor(tokenizer, backbone, vocabulary.rows("vision").start)
    policy = policy_config(config, backbone, vocabulary, processor)
    dtype = TORCH_DTYPES.get(config.dtype) or params[released.FINAL_NORM].dtype
    if dtype not in SAFETENSORS_DTYPES:
        raise UserError(f"{config.params}: of {dtype}; give --dtype bf16 or fp32")
    llama = released.released_llama(sizes, vocabulary)
    shapes = released.llama_shapes(llama)
    tokeniser = vqgan.from_released(images, image_sizes)
    inputs = [config.params, config.vqgan, config.tokenizer]
    complete = is_policy(config.out)
    claim_output(config.out, complete=complete, overwrite=config.overwrite, resumable=False, inputs=inputs)

    processor.save(config.out / PROCESSOR)
    tokeniser.save(config.out / MODEL / VQGAN_FOLDER)
    del images, tokeniser
    write_llama(config.out / MODEL, llama, shapes, dtype, released.llama_tensors(params, sizes))
    write_json(config.out / "metrics.json", {})
    write_json(config.out / CONFIG, {"policy": configs.to_dict(policy), "run": configs.to_dict(config)})
    finish(_what(vocabulary), config.out, _next_commands(config, vocabulary))


def read_sizes(path: Path | None) -> tuple[dict[str, Any], VQGANConfig]:
    """The sizes of the language model and of the image tokeniser: the published ones, or those of a JSON file.

    How many latent and robot actions there are is left to the checkpoint, unless the JSON file says it.
    """
    published = {key: value for key, value in released.PUBLISHED.items() if key not in released.OPTIONAL_SIZES}
    if path is None:
        return published, VQGANConfig()
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with the sizes of a released model")
    with reading(path, "no sizes of a released model"):
        images = configs.from_dict(VQGANConfig, values.pop("vqgan", {}), source=f"{path}: vqgan")
        return {**published, **released.checked_config(values)}, images


def lwm_config(sizes: Mapping[str, Any], image_sizes: VQGANConfig) -> LwmConfig:
    """Our config for the released sizes."""
    return LwmConfig(
        width=sizes["hidden_size"],
        inner_width=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        rope_theta=float(sizes["theta"]),
        norm_eps=sizes["rms_norm_eps"],
        max_length=sizes["max_sequence_length"],
        vqgan=image_sizes,
        vision_rows=sizes["vision_vocab_size"],
        end_of_frame=sizes["eof_token"],
        end_of_vision=sizes["eov_token"],
    )


def policy_config(
    config: ImportLapaConfig, backbone: LwmConfig, vocabulary: Vocabulary, processor: LwmProcessor
) -> PolicyConfig:
    """The policy that a checkpoint is: with the paper's prompt, and latent actions where it has them."""
    if vocabulary.latent and config.latent_length < 1:
        raise UserError(f"--latent-length is at least 1 for {config.params}, which has latent actions")
    opening, closing = processor.tags("latent") if vocabulary.latent else ((), ())
    return PolicyConfig(
        vocabulary=vocabulary,
        cameras=(config.camera,),
        backbone=backbone,
        prompts=Prompts(PROMPTS["paper"]),
        latent_length=config.latent_length if vocabulary.latent else 0,
        latent_opening=opening,
        latent_closing=closing,
        text_weight=released.TEXT_SHARE if vocabulary.latent else 0.0,
    )


def llama_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A sentencepiece model, as Llama has one, as an ordinary tokenizer of transformers.

    As in the authors' code, text is split at `<s>` and `</s>`, the spaces beside them go, and each piece of text
    begins with a space. Raises UserError where the file cannot be read, or where the result would not give the
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
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path}: not a model of sentencepiece; name the released tokenizer.model") from None
    numbers = pieces.unk_id(), pieces.bos_id(), pieces.eos_id()
    if min(numbers) < 0:
        raise UserError(f"{path}: not a tokenizer of Llama's kind: it lacks a token for unknown, beginning or end")
    special = [pieces.id_to_piece(number) for number in numbers]
    tokenizer = Tokenizer(
        models.BPE(*_pieces_and_merges(pieces), unk_token=special[0], fuse_unk=True, byte_fallback=True)
    )
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


def write_llama(
    folder: Path,
    llama: LlamaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Writes the language model as transformers does, in memory for one tensor at a time."""
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
    """Writes `model.safetensors`, or shards and their index, from tensors that come in the order of `shapes`.

    The headers are known beforehand, so that no tensor has to wait in memory for the others of its file.
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
                assert (given, tuple(tensor.shape)) == (name, shapes[name]), "tensors come as announced"
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
    """What precedes the tensors in a safetensors file: its length, and as JSON where each of them lies."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces_and_merges(pieces: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary, and the merges that its scores imply: the better a piece's score, the earlier it is made."""
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


def _what(vocabulary: Vocabulary) -> str:
    if vocabulary.bins:
        return "policy with the released robot actions' rows (their bins were not released)"
    return "latent policy" if vocabulary.latent else "vision-language model without latent actions"


def _next_commands(config: ImportLapaConfig, vocabulary: Vocabulary) -> Sequence[str]:
    policy = shlex.quote(str(config.out))
    finetune = f"lapa policy finetune --preset paper --policy {policy} --data ROBOT_DATASET --out POLICY"
    pretrain = f"lapa policy pretrain --preset paper --policy {policy} --data DATASET --labels LABELS --out POLICY"
    return [finetune] if vocabulary.latent else [pretrain]
