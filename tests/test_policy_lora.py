"""LoRA in place: where adapters go, what learns, what stays bit by bit, and the ordinary model that is left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from lapa.policy.lora import add_lora, has_lora, hold_old_rows, merge_lora, vocabulary_weights

pytest.importorskip("peft")

ROWS, NEW = 64, range(50, 60)
TEXT = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SIGHT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
         "image_size": 32, "patch_size": 8}  # fmt: skip
QWEN_SIGHT = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 8}  # fmt: skip
# What counts from 0 in each layer of all of these.
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def llama(tied: bool = False) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=tied))


def smolvlm() -> PreTrainedModel:
    text = {"model_type": "llama", **TEXT}
    return SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=text, vision_config=SIGHT, scale_factor=2))


def qwen25() -> PreTrainedModel:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_SIGHT))


def qwen3() -> PreTrainedModel:
    vision = {**QWEN_SIGHT, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=TEXT, vision_config=vision))


def paligemma() -> PreTrainedModel:
    text = {"model_type": "gemma", **TEXT}
    vision = {"model_type": "siglip_vision_model", "projection_dim": 32, **SIGHT}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32))


FAMILIES = [llama, smolvlm, qwen25, qwen3, paligemma]
TOKENS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def learn(model: PreTrainedModel, steps: int = 3, fused: bool = False) -> None:
    """AdamW with decay on all but the vocabulary, on text and new tokens alike."""
    vocabulary = vocabulary_weights(model)
    others = [p for p in model.parameters() if p.requires_grad and all(p is not weight for weight in vocabulary)]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.1}, {"params": vocabulary, "weight_decay": 0.0}], lr=1e-2, fused=fused
    )
    tokens = torch.cat([TOKENS, torch.tensor([[50, 59, 55], [51, 51, 58]])], dim=1)
    for _ in range(steps):
        hidden = model.train().get_decoder()(input_ids=tokens[:, :-1]).last_hidden_state
        # As the policy does: straight through the head's weight.
        scores = F.linear(hidden, model.get_output_embeddings().weight.to(hidden.dtype)).float()
        loss = F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("build", FAMILIES)
def test_adapters_are_on_attention_and_mlp_of_the_decoder_only(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    before, parameters = logits(model), dict(model.named_parameters())
    add_lora(model, rank=4)
    assert torch.equal(logits(model), before)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    prefix = next(name for name, module in model.named_modules() if module is model.get_decoder())
    assert adapted == {f"{prefix}.layers.{layer}.{part}.{name}" for layer in (0, 1) for part, name in _parts()}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in parameters.values())
    assert type(model) is type(build()) and type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("build", [*FAMILIES, lambda: llama(tied=True)])
def test_new_rows_learn_and_old_rows_stay_bitwise(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    add_lora(model, rank=4, new_rows=NEW)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    learn(model, fused=True)
    weights = {id(weight) for weight in vocabulary_weights(model)}
    old = [row for row in range(ROWS) if row not in NEW]
    for name, parameter in model.named_parameters():
        if id(parameter) in weights:
            assert torch.equal(parameter[old], before[name][old]), name
            assert (parameter[[50, 51, 59]] != before[name][[50, 51, 59]]).all(), name
        elif "lora_" in name:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("build", FAMILIES)
def test_a_merged_model_is_an_ordinary_one_that_gives_the_same(
    build: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = build()
    names = list(model.state_dict())
    untrained = logits(model)
    add_lora(model, rank=4, new_rows=NEW)
    learn(model)
    trained = logits(model)
    merge_lora(model)
    assert not has_lora(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(untrained, trained, atol=1e-2)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_adapters_of_a_bf16_model_are_fp32() -> None:
    model = llama().to(torch.bfloat16)
    add_lora(model, rank=4, new_rows=NEW)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    old = vocabulary_weights(model)[0][:50].clone()
    learn(model)
    assert torch.equal(vocabulary_weights(model)[0][:50], old)
    trained = logits(model)
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), trained, atol=5e-2, rtol=5e-2)


def test_adapters_are_added_unscaled() -> None:
    model = llama()
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    add_lora(model, rank=4)
    adapted = model.model.layers[0].mlp.up_proj
    nn.init.ones_(adapted.lora_B["default"].weight)
    product = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    merge_lora(model)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight - before, product)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_old_rows_of_a_sharded_model_stay_bitwise(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = llama()
    add_lora(model, rank=4, new_rows=NEW)
    before = [weight.detach().clone() for weight in vocabulary_weights(model)]
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    hold_old_rows(model, NEW)
    weights = vocabulary_weights(model)
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS).logits.logsumexp(-1).mean().backward()
        optimizer.step()
    for weight, then in zip(weights, before, strict=True):
        assert isinstance(weight, DTensor)
        assert torch.equal(weight.full_tensor()[:50], then[:50])
    assert (weights[1].full_tensor()[NEW.start : NEW.stop] != before[1][NEW.start : NEW.stop]).all()


def test_old_rows_stay_bitwise_among_processes(one_process: None) -> None:
    model = llama(tied=True)
    add_lora(model, rank=4, new_rows=NEW)
    (weight,) = vocabulary_weights(model)
    before = weight.detach().clone()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(input_ids=TOKENS).logits.logsumexp(-1).mean().backward()
        optimizer.step()
    assert torch.equal(weight[:50], before[:50])
    assert (weight[NEW.start : NEW.stop] != before[NEW.start : NEW.stop]).all()


def test_an_impossible_rank_is_named() -> None:
    with pytest.raises(ValueError, match=r"rank must be at least 1.*got 0"):
        add_lora(llama(), rank=0)


def test_without_peft_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'pip install "lapa-vla\[lora\]"'):
        add_lora(llama(), rank=4)


def _parts() -> Iterator[tuple[str, str]]:
    return ((("mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"), name) for name in PROJECTIONS)
