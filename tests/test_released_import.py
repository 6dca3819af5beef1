"""`lapa import`: files in the released formats, made small, become folders of this project, or are refused by name."""

from __future__ import annotations

import ctypes
import gc
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lapa.released
from lapa.latent.model import LatentActionModel
from lapa.policy.prompts import PROMPTS
from lapa.policy.runtime import is_policy, load_policy, observe
from lapa.released import lapa7b as import_lapa
from lapa.released import lapa7b as released
from lapa.released import laq as import_laq
from lapa.released.lapa7b import ImportLapaConfig, from_released, llama_tokenizer
from lapa.released.laq import ImportLaqConfig
from literal_lapa7b import literal_policy
from released_files import IMAGE_CODES, arrays, golden, write_stream, write_tokenizer

TEXT_ROWS = 300
GENERATOR = torch.Generator().manual_seed(0)
IMAGE_FACTS, _, IMAGE_PARAMS = golden("vqgan_small")
SIZES = {
    "vocab_size": TEXT_ROWS,
    "vision_vocab_size": IMAGE_CODES + 10,
    "delta_vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eof_token": IMAGE_CODES,
    "eov_token": IMAGE_CODES + 1,
    "scan_layers": True,
}


def made_up(sizes: dict, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights of these sizes under the released names."""
    rows = {key: sizes.get(key, 0) for key in ("vocab_size", "vision_vocab_size", "delta_vocab_size")}
    vocabulary = released.Vocabulary(*rows.values())
    shapes = released.released_shapes({**released.PUBLISHED, **sizes}, vocabulary, stacked=True)
    return {name: (0.1 * torch.randn(shape, generator=GENERATOR)).to(dtype) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path, TEXT_ROWS)
    return path


@pytest.fixture
def config(tmp_path, tokenizer_model) -> ImportLapaConfig:
    write_stream(tmp_path / "params", made_up(SIZES), ("params",), chunk=5000)
    (tmp_path / "vqgan").write_bytes(pickle.dumps(arrays(IMAGE_PARAMS)))
    (tmp_path / "sizes.json").write_text(json.dumps({**SIZES, "vqgan": IMAGE_FACTS["config"]}))
    return ImportLapaConfig(
        params=tmp_path / "params",
        vqgan=tmp_path / "vqgan",
        tokenizer=tokenizer_model,
        out=tmp_path / "policy",
        sizes=tmp_path / "sizes.json",
    )


def renewed(config: ImportLapaConfig, **changes) -> ImportLapaConfig:
    return ImportLapaConfig(**{**vars(config), **changes})


def released_params(config: ImportLapaConfig) -> dict[str, torch.Tensor]:
    return dict(import_lapa.open_checkpoint(config.params))


@torch.no_grad()
def test_an_imported_policy_predicts_what_the_released_weights_predict(config, capsys):
    import_lapa.run(config)
    assert "next: lapa policy finetune --preset paper --policy" in capsys.readouterr().err
    parts = load_policy(config.out)
    policy = parts.model.config
    assert (policy.latent_length, policy.vocabulary.latent, policy.text_weight) == (4, 8, 0.01)
    assert policy.prompts.default == PROMPTS["paper"]
    assert parts.model.backbone.language.dtype == torch.bfloat16

    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=GENERATOR).numpy()
    batch = observe(parts.config, parts.processor, parts.statistics, [[image]], ["pick up the milk"])
    codes = parts.model.float().predict_codes(batch)

    reference = literal_policy(released_params(config), SIZES).float()
    tokens = parts.model.backbone.tokens(batch)
    opening = torch.tensor([policy.latent_opening])
    tokens = torch.cat([tokens, opening], dim=1)
    vision = tokens >= TEXT_ROWS
    mine = torch.where(vision, tokens - TEXT_ROWS, tokens)
    assert torch.equal(codes, reference.generate(mine, vision, torch.ones_like(mine), length=4))


def test_the_language_model_is_an_ordinary_one_of_transformers(config):
    import_lapa.run(config)
    language = AutoModelForCausalLM.from_pretrained(config.out / "model", dtype="auto")
    reference = from_released(released_params(config), SIZES).language
    assert type(language).__name__ == "LlamaForCausalLM" and language.dtype == torch.bfloat16
    assert language.config.rope_parameters["rope_theta"] == 5e7
    ours, theirs = language.state_dict(), reference.bfloat16().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokenizer = AutoTokenizer.from_pretrained(config.out / "processor")
    assert tokenizer.decode(tokenizer.encode("pick up the milk", add_special_tokens=False)) == "pick up the milk"


def test_lwm_without_latent_actions_is_imported_for_pretraining(config, capsys):
    sizes = {key: value for key, value in SIZES.items() if key != "delta_vocab_size"}
    write_stream(config.params, made_up(sizes, torch.float32))
    config.sizes.write_text(json.dumps({**sizes, "vqgan": IMAGE_FACTS["config"]}))
    import_lapa.run(config)
    assert "next: lapa policy pretrain --preset paper --policy" in capsys.readouterr().err
    policy = load_policy(config.out).model
    assert (policy.config.latent_length, policy.config.vocabulary.latent) == (0, 0)
    assert policy.backbone.language.dtype == torch.float32
    import_lapa.run(renewed(config, dtype="bf16", overwrite=True))
    assert load_policy(config.out).model.backbone.language.dtype == torch.bfloat16


def test_the_tokenizer_gives_the_tokens_of_the_authors_code(tokenizer_model, tmp_path):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    llama_tokenizer(tokenizer_model).save_pretrained(str(tmp_path))
    for tokenizer in (llama_tokenizer(tokenizer_model), AutoTokenizer.from_pretrained(tmp_path)):
        words = "You are a helpful assistant. USER: What action should the robot take to `öffne  打开` ASSISTANT:"
        assert tokenizer.encode(words, add_special_tokens=False) == pieces.encode(words)
        # Split at the special token, spaces around it dropped: the released prompt's own beginning of a sequence.
        assert tokenizer.encode(f"<s> {words}", add_special_tokens=False) == [1, *pieces.encode(words)]
        assert tokenizer.encode("", add_special_tokens=False) == []
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
        assert tokenizer.decode(pieces.encode(words)) == words


def test_files_that_do_not_fit_stop_the_import_before_it_writes(config, tmp_path):
    def refused(complaint: str, **changes) -> None:
        with pytest.raises(ValueError, match=complaint):
            import_lapa.run(renewed(config, **changes))
        assert not config.out.exists()

    whole = config.params.read_bytes()
    params = released_params(config)
    config.params.write_bytes(whole[:-100])
    refused("params: truncated")
    del params["transformer/ln_f/kernel"]
    write_stream(config.params, {**params, "transformer/more": torch.zeros(2)})
    refused(r"(?s)params: .*ln_f/kernel: missing.*transformer/more: not a name")
    config.params.write_bytes(whole)
    write_stream(tmp_path / "images", {**IMAGE_PARAMS, "quant_conv/bias": torch.zeros(4)})
    refused(r"images: .*quant_conv/bias: shape \(4,\)", vqgan=tmp_path / "images")
    refused("vqgan: not a model of sentencepiece", tokenizer=config.vqgan)
    refused("nowhere: no such file", tokenizer=tmp_path / "nowhere")
    write_tokenizer(tmp_path / "other.model", TEXT_ROWS + 5)
    refused("305 pieces", tokenizer=tmp_path / "other.model")
    (tmp_path / "odd.json").write_text(json.dumps({"hidden": 3}))
    refused("odd.json: .*unknown key", sizes=tmp_path / "odd.json")
    refused(r"wte/embedding: shape .300, 32., expected .32000, 4096.", sizes=None)


def test_whatever_is_refused_leaves_the_policy_that_was_to_be_overwritten_whole(config, tmp_path):
    import_lapa.run(config)
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    sizes = json.loads(config.sizes.read_text())
    write_stream(tmp_path / "whole_numbers", {name: weight.int() for name, weight in made_up(SIZES).items()})
    write_stream(tmp_path / "double", {name: weight.double() for name, weight in made_up(SIZES).items()})
    changed = [
        ("--latent-length must be at least 1", {"latent_length": 0}),
        ("--latent-length must be at least 1", {"latent_length": -1}),
        (r"(?s)whole_numbers: .*wte/embedding: torch.int32", {"params": tmp_path / "whole_numbers"}),
        (r"double: weights in torch.float64 .*; give --dtype", {"params": tmp_path / "double"}),
    ]
    for number, (complaint, wrong) in enumerate(
        [
            ("3 heads", {"num_attention_heads": 3}),
            ("num_attention_heads .* at least 1", {"num_attention_heads": 0}),
            ("end of vision 500", {"eov_token": 500}),
            ("theta .* a number above 0", {"theta": "x"}),
            ("num_hidden_layers .* whole number", {"num_hidden_layers": 2.0}),
            ("multiple of 32", {"vqgan": {"hidden_channels": 3}}),
        ]
    ):
        path = tmp_path / f"sizes_{number}.json"
        path.write_text(json.dumps({**sizes, **wrong}))
        changed.append((f"sizes_{number}.json: .*{complaint}", {"sizes": path}))
    for complaint, changes in changed:
        with pytest.raises(ValueError, match=complaint):
            import_lapa.run(renewed(config, overwrite=True, **changes))
        assert {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()} == before


def test_an_interrupted_import_leaves_no_policy_and_can_be_begun_anew(config, monkeypatch):
    one_by_one = released.llama_tensors

    def interrupted(*given):
        yield from list(one_by_one(*given))[:3]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(released, "llama_tensors", interrupted)
        import_lapa.run(config)
    assert not is_policy(config.out) and not (config.out / "config.json").exists()
    assert not list(config.out.rglob("*.partial*"))
    with pytest.raises(ValueError, match=r"not empty; give another --out, or --overwrite to replace it$"):
        import_lapa.run(config)
    import_lapa.run(renewed(config, overwrite=True))
    assert is_policy(config.out)


def test_a_tokenizer_without_a_beginning_and_an_end_is_refused(tokenizer_model, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(tokenizer_model.with_suffix(".txt")),
        model_prefix=str(tmp_path / "bare"),
        model_type="bpe",
        vocab_size=TEXT_ROWS,
        byte_fallback=True,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"bare.model: .* lacks a token"):
        llama_tokenizer(tmp_path / "bare.model")


def test_a_finished_policy_is_not_overwritten_by_accident(config):
    import_lapa.run(config)
    with pytest.raises(ValueError, match="already holds a finished result"):
        import_lapa.run(config)
    import_lapa.run(renewed(config, overwrite=True))
    assert is_policy(config.out)


def test_large_models_are_written_in_shards(config, tmp_path):
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    import_lapa.write_safetensors(tmp_path, shapes, torch.float32, tensors.items(), shard_bytes=70)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 84} and len(set(index["weight_map"].values())) == 2
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def peak_growth(action) -> int:
    """Bytes by which the process's resident memory grows at most while `action` runs (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    action()
    return peak_memory() - before


def peak_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_import_takes_memory_for_a_few_tensors_and_not_for_what_it_writes(config, monkeypatch):
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 64}
    config.sizes.write_text(json.dumps({**sizes, "vqgan": IMAGE_FACTS["config"]}))
    shapes = released.released_shapes(
        {**released.PUBLISHED, **sizes}, released.Vocabulary(TEXT_ROWS, IMAGE_CODES + 10, 8), stacked=True
    )
    write_stream(config.params, {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})
    import_lapa.run(config)
    written = sum(path.stat().st_size for path in (config.out / "model").rglob("*.safetensors"))
    again = renewed(config, overwrite=True)
    assert written > 130e6
    streamed = peak_growth(lambda: import_lapa.run(again))
    # The measure itself is right: were all tensors kept, it would show.
    one_by_one = released.llama_tensors
    monkeypatch.setattr(released, "llama_tensors", lambda *given: list(one_by_one(*given)))
    hoarded = peak_growth(lambda: import_lapa.run(again))
    assert streamed < 0.5 * written and hoarded > 0.8 * written


@pytest.mark.parametrize("name", ["A", "C"])
def test_the_released_latent_action_model_becomes_a_folder_with_its_codes(name, tmp_path, capsys):
    facts = json.loads((Path(__file__).parent / "golden" / f"laq_{name}.json").read_text())
    tensors = load_file(Path(__file__).parent / "golden" / f"laq_{name}.safetensors")
    weights = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}
    torch.save(weights, tmp_path / "laq.pt")
    (tmp_path / "sizes.json").write_text(json.dumps(facts["config"]))
    config = ImportLaqConfig(tmp_path / "laq.pt", out=tmp_path / "lam", sizes=tmp_path / "sizes.json")
    import_laq.run(config)
    assert "next: lapa label --lam" in capsys.readouterr().err
    model = LatentActionModel.from_pretrained(tmp_path / "lam")
    with torch.no_grad():
        codes = model.encode(tensors["in.video_u8"].transpose(1, 2)).codes_BL
    assert torch.equal(codes, tensors["out.ids"])
    with pytest.raises(ValueError, match="already holds a finished result"):
        import_laq.run(config)


def test_a_latent_action_model_that_does_not_fit_is_refused_by_name(tmp_path):
    path, sizes = tmp_path / "laq.pt", tmp_path / "sizes.json"
    facts = json.loads((Path(__file__).parent / "golden" / "laq_A.json").read_text())
    sizes.write_text(json.dumps(facts["config"]))

    def refused(complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            import_laq.run(ImportLaqConfig(path, out=tmp_path / "lam", sizes=sizes))
        assert not (tmp_path / "lam").exists()

    refused("laq.pt: no such file")
    torch.save({"vq.codebooks": torch.zeros(3)}, path)
    refused(r"(?s)laq.pt: .*to_patch_emb_first_frame.1.weight: missing")
    path.write_bytes(path.read_bytes()[:-50])
    refused("laq.pt: truncated, or not a file of tensors alone")
    torch.save([1, 2], path)
    refused("not a state dict")
    torch.save({"a": Path("x")}, path)
    refused("not a file of tensors alone")


def test_a_file_of_torch_is_refused_wherever_it_is_malformed_and_without_advice_to_run_it(tmp_path):
    path, sizes = tmp_path / "laq.pt", tmp_path / "sizes.json"
    facts = json.loads((Path(__file__).parent / "golden" / "laq_A.json").read_text())
    sizes.write_text(json.dumps(facts["config"]))

    def refused(complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint) as error:
            import_laq.run(ImportLaqConfig(path, out=tmp_path / "lam", sizes=sizes))
        assert "weights_only" not in str(error.value) and not (tmp_path / "lam").exists()

    torch.save({"a": torch.zeros(5)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        refused("laq.pt: truncated, or not a file of tensors alone; nothing in it was run")
    weight = torch.ones(2, 2)
    for tensor, complaint in [
        (weight.to_sparse(), "sparse"),
        (weight.to("meta"), "without numbers"),
        (weight.long(), "torch.int64"),
        (weight / 0, "not finite"),
        (weight[0, :1].clone().as_strided((10**12,), (0,)), "larger than what the file holds"),
    ]:
        torch.save({"vq.codebooks": tensor, "fine": weight}, path)
        refused(rf"(?s)laq.pt: expected finite floating-point numbers: .*vq.codebooks: [^;]*{complaint}")
    torch.save({1: weight}, path)
    refused("not a state dict")
    for key, value in (("heads", 0), ("dim", "a"), ("dim", 64.0), ("patch_size", -1)):
        sizes.write_text(json.dumps({**facts["config"], key: value}))
        refused(f"sizes.json: {key} must be a whole number")


def test_options_and_the_room_itself_import_no_torch():
    code = "import sys, lapa.released, lapa.released.config; assert 'torch' not in sys.modules; dir(lapa.released)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert lapa.released.from_released is from_released
    with pytest.raises(AttributeError, match="from_relesed"):
        lapa.released.from_relesed  # noqa: B018
