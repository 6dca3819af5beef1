"""The `hf` backbone on tiny models of its families: what their own code says is the twin."""

import inspect
import json
import os
import pickle
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from lapa.errors import UserError
from lapa.policy.backbones import hf
from lapa.policy.backbones.hf import HfBackbone
from lapa.policy.backbones.hf_processor import HfProcessor
from lapa.policy.config import HfConfig
from lapa.policy.vocabulary import Vocabulary
from vlms import FAMILIES, IMAGE_SIZE, PADDING_ROWS, make_vlm

WORDS = ["push the red block to the left", "", "öffne die 引き出し 🦾"]
SPELLED = "<image></s><eos><bos> <|im_end|><|image_pad|><end_of_utterance><loc0000><tool_call><latent_0>"
LAYOUTS = {
    "smolvlm": (
        "<|im_start|>User:" + 2 * f"<fake_token_around_image><global-img>{4 * '<image>'}<fake_token_around_image>",
        "<end_of_utterance>\nAssistant:",
    ),
    "qwen2_5_vl": (
        "<|im_start|>user\n" + 2 * f"<|vision_start|>{4 * '<|image_pad|>'}<|vision_end|>",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "paligemma": (32 * "<image>" + "<bos>", "\n"),
}
LAYOUTS["qwen3_vl"] = LAYOUTS["qwen2_5_vl"]
LAYOUTS["gemma3"] = (
    "<bos><start_of_turn>user\n" + 2 * f"\n\n<start_of_image>{4 * '<image_soft_token>'}<end_of_image>\n\n",
    "<end_of_turn>\n<start_of_turn>model\n",
)
LAYOUTS["internvl"] = (
    "<|im_start|>user\n" + 2 * f"<img>{4 * '<IMG_CONTEXT>'}</img>\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family, to be read only."""
    return {family: make_vlm(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def create(folder: Path, num_cameras: int = 2, latent: int = 8) -> tuple[HfBackbone, HfProcessor, Vocabulary]:
    torch.manual_seed(1)
    config = HfConfig(source=str(folder), image_size=IMAGE_SIZE)
    backbone, processor, vocabulary = hf.create(
        config, texts=[], num_cameras=num_cameras, segments={"latent": latent} if latent else {}
    )
    return backbone.eval(), processor, vocabulary


def pictures(num: int, num_cameras: int = 2, size: int = IMAGE_SIZE) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return list(map(list, rng.integers(0, 256, (num, num_cameras, size, size, 3), dtype=np.uint8)))


def codes(vocabulary: Vocabulary, num: int, length: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return vocabulary.tokens("latent", torch.randint(0, vocabulary.latent, (num, length), generator=generator))


def own_inputs(family: str, backbone: HfBackbone, batch: dict[str, torch.Tensor], tokens_BF: torch.Tensor) -> dict:
    """What a user of plain transformers would pass for one sample: no positions, which the model finds by itself."""
    tokens = torch.cat([batch["tokens_BT"], tokens_BF], dim=1)
    inputs = {"input_ids": tokens, "pixel_values": batch["pixel_values"].flatten(0, 1)}
    if family.startswith("qwen"):
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
        inputs["image_grid_thw"] = batch["image_grid_thw"].flatten(0, 1)
        inputs["mm_token_type_ids"] = (tokens == backbone.language.config.image_token_id).int()
    if family == "paligemma":
        inputs["token_type_ids"] = (torch.arange(tokens.shape[1]) >= batch["tokens_BT"].shape[1]).long()[None]
    if family == "gemma3":
        inputs["token_type_ids"] = (tokens == backbone.language.config.image_token_id).long()
    return inputs


def greedy(backbone: HfBackbone, vocabulary: Vocabulary, batch: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    rows = vocabulary.rows("latent")
    with torch.no_grad():
        hidden, memory = backbone.begin(batch, batch["tokens_BT"][:, :0], room=length - 1)
        tokens = [backbone.logits(hidden, rows).argmax(-1) + rows.start]
        for _ in range(length - 1):
            tokens.append(backbone.logits(backbone.advance(memory, tokens[-1]), rows).argmax(-1) + rows.start)
    return torch.cat(tokens, dim=1)


@families
def test_a_prompt_is_laid_out_as_the_models_own_processor_would(family: str, folders: dict[str, Path]) -> None:
    _, processor, _ = create(folders[family])
    images = pictures(len(WORDS))
    batch = processor(images, WORDS)
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    before, after = LAYOUTS[family]
    for row, words in enumerate(WORDS):
        expected = tokenizer(f"{before}{words}{after}", add_special_tokens=False)["input_ids"]
        assert batch["tokens_BT"][row][batch["mask_BT"][row].bool()].tolist() == expected
    assert bool((batch["mask_BT"].diff(dim=1) >= 0).all()), "padding is on the left"
    # Under its own settings, at the size at which it changes nothing.
    own = AutoImageProcessor.from_pretrained(folders[family], backend="pil")
    options = {"do_image_splitting": False, "do_resize": False} if family == "smolvlm" else {}
    pixels = own([[image] for one in images for image in one], return_tensors="pt", **options)["pixel_values"]
    assert torch.equal(batch["pixel_values"].flatten(), pixels.flatten())


@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "llava"])
def test_hidden_states_are_those_of_the_models_own_processor_and_forward(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text, the images and the token types of its combined processor, and positions that the model finds itself."""
    folder = make_vlm(family, tmp_path / "model")
    if family == "llava":
        template = (
            "{% for m in messages %}{{ m.role | upper }}: {% for part in m.content %}"
            "{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %}{% endfor %} ASSISTANT:"
        )
        (folder / "chat_template.jinja").write_text(template)
    backbone, processor, _ = create(folder, latent=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    extra = {"llava": {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}}
    extra |= {"idefics3": {"image_seq_len": 4}, "gemma3": {"image_seq_length": 4}, "internvl": {"image_seq_length": 4}}
    kind = PROCESSOR_MAPPING[type(backbone.language.config)]
    # It would ask for torchvision, for the films that nothing here reads.
    monkeypatch.setattr(kind, "check_argument_for_proper_class", lambda *_: None)
    own = kind(
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer=tokenizer,
        **{"video_processor": None} if "video_processor" in inspect.signature(kind).parameters else {},
        **extra.get(family, {}),
    )
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": WORDS[0]}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=processor.tokenizer.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    images = pictures(1)
    options = {"size": {"longest_edge": IMAGE_SIZE}, "do_image_splitting": False} if family == "idefics3" else {}
    opened = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    inputs = own(text=[text], images=images, return_tensors="pt", add_special_tokens=not opened, **options)
    batch = processor(images, WORDS[:1])
    assert batch["tokens_BT"].tolist() == inputs["input_ids"].tolist()
    takes = inspect.signature(backbone.language.forward).parameters
    with torch.no_grad():
        given = {name: value for name, value in inputs.items() if name in takes}
        expected = backbone.language.base_model(**given).last_hidden_state
        hidden, _ = backbone.read(batch, batch["tokens_BT"][:, :0])
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)


def test_paligemmas_combined_processor_makes_the_same_batch(folders: dict[str, Path]) -> None:
    _, processor, _ = create(folders["paligemma"])
    own = PaliGemmaProcessor(
        AutoImageProcessor.from_pretrained(folders["paligemma"], backend="pil"),
        AutoTokenizer.from_pretrained(folders["paligemma"]),
    )
    images = pictures(2)
    batch = processor(images, WORDS[:2])
    expected = own(
        images=images, text=["<image><image>" + words for words in WORDS[:2]], padding=True, return_tensors="pt"
    )
    assert torch.equal(batch["tokens_BT"], expected["input_ids"])
    assert torch.equal(batch["mask_BT"], expected["attention_mask"])
    assert torch.equal(batch["pixel_values"].flatten(0, 1), expected["pixel_values"])
    assert bool((expected["token_type_ids"][expected["attention_mask"].bool()] == 0).all())


@families
def test_words_that_spell_control_tokens_stay_words(family: str, folders: dict[str, Path]) -> None:
    backbone, processor, _ = create(folders[family])
    plain, spelled = (processor(pictures(1), [words])["tokens_BT"][0] for words in ("", SPELLED))
    control = torch.tensor(list(processor.tokenizer.get_added_vocab().values()))
    assert torch.isin(plain, control).sum() == torch.isin(spelled, control).sum()
    image_token = backbone.language.config.image_token_id
    assert (plain == image_token).sum() == (spelled == image_token).sum()
    assert SPELLED in processor.tokenizer.decode(spelled)
    assert len(processor(pictures(1), ["half a pair: \ud83e"])["tokens_BT"][0]) > len(plain)


@families
def test_a_forward_equals_the_models_own(family: str, folders: dict[str, Path]) -> None:
    backbone, processor, vocabulary = create(folders[family])
    batch, tokens = processor(pictures(1), WORDS[:1]), codes(vocabulary, 1)
    with torch.no_grad():
        expected = backbone.language(**own_inputs(family, backbone, batch, tokens)).logits
        hidden, mask = backbone.read(batch, tokens)
    ours = backbone.logits(hidden, range(expected.shape[-1]))
    assert mask.shape == ours.shape[:2]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@families
def test_a_padded_batch_equals_its_samples(family: str, folders: dict[str, Path]) -> None:
    backbone, processor, vocabulary = create(folders[family])
    images, tokens = pictures(3), codes(vocabulary, 3)
    with torch.no_grad():
        together, mask = backbone.read(processor(images, WORDS), tokens)
        assert not mask.all()
        for row, words in enumerate(WORDS):
            alone, _ = backbone.read(processor(images[row : row + 1], [words]), tokens[row : row + 1])
            torch.testing.assert_close(together[row, -alone.shape[1] :], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["growing", "static"])
@families
def test_cached_decoding_gives_the_log_probabilities_of_a_full_forward(
    family: str, compiled: bool, folders: dict[str, Path]
) -> None:
    backbone, processor, vocabulary = create(folders[family])
    if compiled:
        # The caches of fixed size that compiled steps have, without waiting for a compiler.
        backbone._compiled_step = backbone.language.base_model.forward
    batch, tokens = processor(pictures(3), WORDS), codes(vocabulary, 3, length=5)
    with torch.no_grad():
        full, _ = backbone.read(batch, tokens[:, :-1])
        first, memory = backbone.begin(batch, batch["tokens_BT"][:, :0], room=4)
        # Two tokens at once, then one by one; another batch read in between must not matter.
        cached = [first, backbone.advance(memory, tokens[:, :2])]
        backbone.read(processor(pictures(1), ["other"]), tokens[:1])
        cached += [backbone.advance(memory, tokens[:, step : step + 1]) for step in (2, 3)]
    rows = vocabulary.rows("latent")
    expected = backbone.logits(full[:, -5:], rows).log_softmax(-1)
    torch.testing.assert_close(
        backbone.logits(torch.cat(cached, dim=1), rows).log_softmax(-1), expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@families
def test_text_is_as_before_the_segments(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_vlm(family, tmp_path / "model", tied=tied)
    before = AutoModelForImageTextToText.from_pretrained(folder).eval()
    backbone, processor, vocabulary = create(folder)
    text = vocabulary.text
    assert vocabulary.size > before.get_input_embeddings().weight.shape[0] == text + PADDING_ROWS
    for matrix in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, matrix)().weight for model in (before, backbone.language))
        assert torch.equal(old[:text], new[:text])
        fresh = new[text:]
        assert len(fresh.unique(dim=0)) == vocabulary.latent, "new rows differ"
        assert (fresh - old[:text].mean(0)).abs().max() < old.std()
    shared = backbone.language.get_input_embeddings().weight is backbone.language.get_output_embeddings().weight
    assert shared == tied
    inputs = own_inputs(family, backbone, processor(pictures(1), WORDS[:1]), torch.empty(1, 0, dtype=torch.long))
    with torch.no_grad():
        expected, logits = (model(**inputs).logits[..., :text] for model in (before, backbone.language))
    assert torch.equal(logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert processor.tokenizer(WORDS)["input_ids"] == tokenizer(WORDS)["input_ids"]


@families
def test_rows_of_finetuning_follow_those_of_pretraining(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    backbone, processor, vocabulary = create(folders[family])
    latent = backbone.language.get_input_embeddings().weight[: vocabulary.size].clone()
    grown = replace(vocabulary, bins=20, state=10, query=3)
    processor.grow(grown)
    backbone.resize(grown)
    assert torch.equal(backbone.language.get_input_embeddings().weight[: vocabulary.size], latent)
    names = {"latent": "<latent_7>", "bins": "<bin_0>", "state": "<state_9>", "query": "<query_2>"}
    for segment, name in names.items():
        row = grown.rows(segment).start + int(name[:-1].split("_")[1])
        assert processor.tokenizer.encode(name, add_special_tokens=False) == [row]
    backbone.save(tmp_path / "model")
    processor.save(tmp_path / "processor")
    reloaded, loaded = hf.load(
        backbone.config, tmp_path / "model", tmp_path / "processor", vocabulary=grown, num_cameras=2
    )
    batch = processor(pictures(2), WORDS[:2])
    assert all(torch.equal(value, loaded(pictures(2), WORDS[:2])[name]) for name, value in batch.items())
    tokens = torch.tensor([[grown.size - 1], [grown.size - 2]])
    renewed = hf.renew(backbone.config, grown, 2)
    assert len(renewed.language.get_input_embeddings().weight) == grown.size
    with torch.no_grad():
        assert torch.equal(reloaded.eval().read(batch, tokens)[0], backbone.read(batch, tokens)[0])


@families
def test_gradients_reach_the_new_rows_and_the_projection_but_no_frozen_vision(
    family: str, folders: dict[str, Path]
) -> None:
    backbone, processor, vocabulary = create(folders[family])
    backbone.vision.requires_grad_(False)
    batch, tokens = processor(pictures(2), WORDS[:2]), codes(vocabulary, 2)
    rows = vocabulary.rows("latent")

    def gradients() -> dict[str, torch.Tensor]:
        backbone.zero_grad()
        hidden, _ = backbone.read(batch, tokens[:, :-1])
        logits = backbone.logits(hidden[:, -4:], rows)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), (tokens - rows.start).flatten()).backward()
        return {name: value.grad.clone() for name, value in backbone.named_parameters() if value.grad is not None}

    found = gradients()
    assert bool(found["language." + _embedding_name(backbone)][rows.start : rows.stop].any(dim=1).all())
    frozen = {id(parameter) for parameter in backbone.vision.parameters()}
    assert frozen
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != (id(parameter) in frozen)
        assert (name in found) == parameter.requires_grad, name
    projections = [name for name in found if "connector" in name or "merger" in name or "projector" in name]
    assert projections and all(found[name].any() for name in projections)

    backbone.train()
    backbone.language.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(block.gradient_checkpointing for block in backbone.blocks)
    recomputed = gradients()
    assert recomputed.keys() == found.keys()
    assert all(torch.allclose(recomputed[name], value, atol=1e-6) for name, value in found.items())


@families
def test_the_repeated_layers_are_those_of_both_towers(family: str, folders: dict[str, Path]) -> None:
    backbone, _, _ = create(folders[family])
    seen = set(backbone.vision.modules())
    assert [block in seen for block in backbone.blocks].count(True) == 2
    assert len(backbone.blocks) == 4


@families
def test_plain_transformers_says_what_we_say(
    family: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    backbone, processor, vocabulary = create(folders[family], num_cameras=1)
    image = pictures(1, num_cameras=1)
    backbone.save(tmp_path / "model")
    processor.save(tmp_path / "processor")
    policy = {"latent_length": 6, "prompts": {"default": "do: {instruction}"}}
    (tmp_path / "config.json").write_text(json.dumps({"policy": policy}))
    Image.fromarray(image[0][0]).save(tmp_path / "image.png")
    arguments = ["plain_transformers.py", str(tmp_path), str(tmp_path / "image.png"), WORDS[0]]
    monkeypatch.setattr(sys, "argv", arguments)
    example = Path(__file__).parent.parent / "examples" / "plain_transformers.py"
    runpy.run_path(str(example), run_name="__main__")
    ours = greedy(backbone, vocabulary, processor(image, [f"do: {WORDS[0]}"]), 6)
    spoken = "".join(f"<latent_{code}>" for code in vocabulary.codes("latent", ours)[0].tolist())
    assert capsys.readouterr().out.strip() == spoken


@families
def test_text_generation_goes_on_as_before(family: str, folders: dict[str, Path]) -> None:
    before = AutoModelForImageTextToText.from_pretrained(folders[family])
    backbone, processor, vocabulary = create(folders[family], num_cameras=1)
    batch = processor(pictures(1, num_cameras=1), WORDS[:1])
    inputs = own_inputs(family, backbone, batch, torch.empty(1, 0, dtype=torch.long))
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "suppress_tokens": list(range(vocabulary.text, vocabulary.size)),
    }
    told, tells = (model.generate(**inputs, **options) for model in (before, backbone.language))
    assert torch.equal(told, tells)


def test_a_processor_is_pickled_and_opened_for_another_number_of_cameras(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    _, processor, _ = create(folders["qwen3_vl"])
    batch = pickle.loads(pickle.dumps(processor))(pictures(2), WORDS[:2])
    assert all(torch.equal(value, batch[name]) for name, value in processor(pictures(2), WORDS[:2]).items())
    processor.save(tmp_path)
    three = HfProcessor.load(tmp_path, num_cameras=3)
    assert three(pictures(1, 3), [""])["pixel_values"].shape[:2] == (1, 3)
    with pytest.raises(ValueError, match="3 image slots was given 2 images"):
        three(pictures(1, 2), [""])


def test_another_family_is_read_by_its_placeholders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_vlm("llava", tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    backbone, processor, vocabulary = create(folder)
    assert "its chat template has no <image> for an image" in capsys.readouterr().err
    assert (processor.layout.before, processor.layout.after) == ("<s>" + 2 * 16 * "<image>", "")
    batch, tokens = processor(pictures(2, size=50), WORDS[:2]), codes(vocabulary, 2)
    with torch.no_grad():
        expected = backbone.language(
            input_ids=torch.cat([batch["tokens_BT"][:1], tokens[:1]], dim=1),
            pixel_values=batch["pixel_values"][0],
        ).logits
        hidden, _ = backbone.read(batch, tokens)
    torch.testing.assert_close(backbone.logits(hidden, range(expected.shape[-1]))[:1], expected, atol=1e-5, rtol=1e-4)


def test_a_soft_capped_head_is_capped(tmp_path: Path) -> None:
    folder = make_vlm("paligemma", tmp_path / "model")
    backbone, processor, vocabulary = create(folder)
    batch, tokens = processor(pictures(1), WORDS[:1]), codes(vocabulary, 1)
    with torch.no_grad():
        # Some releases of transformers (5.5) leave PaliGemma's cap out.
        uncapped = backbone.language(**own_inputs("paligemma", backbone, batch, tokens)).logits
        hidden, _ = backbone.read(batch, tokens)
    backbone.language.config.get_text_config().final_logit_softcapping = 0.5
    ours = backbone.logits(hidden, vocabulary.rows("latent"))
    torch.testing.assert_close(ours, 0.5 * torch.tanh(uncapped[..., vocabulary.text : vocabulary.size] / 0.5))
    assert ours.abs().max() < 0.5 < uncapped.abs().max()


def test_a_folder_that_is_no_image_text_model_is_named_as_what_it_is(tmp_path: Path) -> None:
    llama = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a LlamaForCausalLM, which is no image-text model; give one such as SmolVLM"):
        create(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no model that transformers knows"):
        create(tmp_path / "empty")


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="asks the hub")
def test_a_hub_id_without_a_network_is_refused() -> None:
    with pytest.raises(ValueError, match="nobody/nothing: neither a folder here nor a model on the hub"):
        create(Path("nobody/nothing"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer.json", "has no tokenizer"),
        ("preprocessor_config.json", "has no image processor"),
        ("model.safetensors", "weights cannot be loaded"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(missing: str, message: str, tmp_path: Path) -> None:
    folder = make_vlm("smolvlm", tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        create(folder)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    folder = make_vlm("smolvlm", tmp_path / "model")
    # The tokenizers library refuses this with a plain Exception.
    (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE", "vocab": 1}}')
    with pytest.raises(UserError, match=r"model: tokenizer.json cannot be loaded"):
        create(folder)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("smolvlm", 40, "multiple of 16 pixels, at most 32, not 40; give --hf-image-size 32"),
        ("qwen3_vl", 40, "multiple of 16 pixels, not 40; give --hf-image-size 32"),
        ("paligemma", 48, "reads images of 32 pixels, not 48; give --hf-image-size 32"),
    ],
)
def test_a_size_that_the_model_cannot_see_is_refused(
    family: str, size: int, message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        hf.create(HfConfig(source=str(folders[family]), image_size=size), texts=[], num_cameras=1, segments={})


def test_a_tokenizer_with_such_tokens_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = make_vlm("qwen3_vl", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<latent_3>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has a token <latent_3> of its own"):
        create(folder)


def test_a_tokenizer_that_splits_an_added_token_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor, vocabulary = create(folders["qwen3_vl"], latent=0)
    monkeypatch.setattr(processor.tokenizer, "add_tokens", lambda tokens: 0)
    with pytest.raises(ValueError, match="does not read <latent_0> and the like as one token each"):
        processor.grow(replace(vocabulary, latent=8))


def test_segments_that_mean_something_do_not_move(folders: dict[str, Path]) -> None:
    backbone, _, vocabulary = create(folders["smolvlm"])
    with_state = replace(vocabulary, state=4)
    backbone.resize(with_state)
    with pytest.raises(ValueError, match="the state segment has rows 315 to 318 and cannot move to 335 to 338"):
        backbone.resize(replace(with_state, bins=20))


def test_the_image_size_is_what_the_model_was_made_for(folders: dict[str, Path]) -> None:
    assert hf.native_image_size(str(folders["qwen3_vl"])) == 224
    assert hf.native_image_size(str(folders["smolvlm"])) == IMAGE_SIZE


def test_a_model_too_large_for_the_memory_is_refused_before_it_is_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapa.engine.memory.available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"smolvlm.*: loading its weights needs 0\.0 GiB of memory, and cpu has"):
        create(folders["smolvlm"])


def _embedding_name(backbone: HfBackbone) -> str:
    embedding = backbone.language.get_input_embeddings().weight
    return next(name for name, value in backbone.language.named_parameters() if value is embedding)
