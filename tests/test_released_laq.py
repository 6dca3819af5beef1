"""The published model: goldens A and C of the released code, and the names of the published weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from literal import LiteralModel
from safetensors.torch import load_file

from lapa.latent.model import LatentActionModel
from lapa.released.laq import (
    PUBLISHED_CONFIG,
    from_released,
    released_config,
    released_constants,
    released_names,
)

GOLDEN = Path(__file__).parent / "golden"
# Gradients that are zero in exact arithmetic (a bias under a softmax, or under a difference) are rounding noise.
ROUNDING = 1e-8


class Golden:
    def __init__(self, name: str):
        self.facts = json.loads((GOLDEN / f"laq_{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"laq_{name}.safetensors")
        self.weights = {key[3:]: value for key, value in self.tensors.items() if key.startswith("sd.")}
        self.model = from_released(self.weights, self.facts["config"])
        self.frames_BTCHW = rearrange(self.tensors["in.video_u8"], "b c t h w -> b t c h w")
        self.given_BL = self.tensors["in.user_codes"].reshape(-1, self.model.config.latent_length)

    def agrees(self, name: str, ours: torch.Tensor) -> None:
        theirs = self.tensors[f"out.{name}"]
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


@pytest.fixture(params=["A", "C"])
def golden(request) -> Golden:
    return Golden(request.param)


@torch.no_grad()
def test_tokens_and_codes(golden):
    model = golden.model
    tokens, bias = model.patch_embedding(golden.frames_BTCHW / 255), model.position_bias()
    golden.agrees("patch_tokens", tokens)
    golden.agrees("spatial_bias", bias)
    encoded = model.encode_tokens(tokens, bias)
    golden.agrees("first_tokens", encoded[:, :1])
    golden.agrees("last_tokens", encoded[:, 1:])
    action = model.encode(golden.frames_BTCHW)
    golden.agrees("z_delta", rearrange(action.z_BLD, "b l d -> (b l) d"))
    assert torch.equal(action.codes_BL, golden.tensors["out.ids"])
    assert torch.equal(model.codes(golden.frames_BTCHW), golden.tensors["out.ids"])
    golden.agrees("action_tokens", model.action_tokens(action.quantized_BLD))
    golden.agrees("action_tokens_user", model.action_tokens(model.quantizer.embed(golden.given_BL)))


def test_reconstructions(golden):
    first_BCHW, codes_BL = golden.frames_BTCHW[:, 0], golden.model.codes(golden.frames_BTCHW)
    golden.agrees("recon", golden.model.decode(first_BCHW, codes_BL))
    golden.agrees("recon_user", golden.model.decode(first_BCHW, golden.given_BL))
    golden.agrees(
        "recon_user_int2", golden.model.decode(golden.frames_BTCHW[:, 0], torch.full_like(golden.given_BL, 2))
    )


def test_training_loss_and_every_gradient(golden):
    facts, model = golden.facts["train"], golden.model.train()
    losses = model.loss(golden.frames_BTCHW, noise=golden.tensors["in.noise"])
    losses.loss.backward()
    assert losses.loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    share = torch.bincount(model.codes(golden.frames_BTCHW).flatten(), minlength=model.config.codebook_size)
    share = share / share.sum()
    assert (share > 0).sum() == facts["num_unique_indices"]
    assert torch.special.entr(share).sum().exp().item() == pytest.approx(facts["perplexity"], rel=1e-5)
    parameters, names = dict(model.named_parameters()), released_names(model)
    for released, expected in facts["grad_norms_all"].items():
        if released not in names:
            assert released in released_constants(model) and not expected
        elif expected is None:
            assert parameters[names[released]].grad is None, released
        else:
            norm = parameters[names[released]].grad.norm().item()
            assert norm == pytest.approx(expected, rel=1e-4, abs=ROUNDING), released
    held = [p.grad for p in parameters.values() if p.grad is not None]
    assert torch.cat([g.flatten() for g in held]).norm().item() == pytest.approx(facts["grad_norm_total"], rel=1e-5)


def test_the_literal_twin_is_the_released_model(golden):
    literal, facts = literal_twin(golden), golden.facts["train"]
    assert torch.equal(literal.codes(golden.frames_BTCHW), golden.tensors["out.ids"])
    golden.agrees("recon", literal.reconstruct(golden.frames_BTCHW))
    loss = literal(golden.frames_BTCHW, golden.tensors["in.noise"])
    loss.backward()
    assert loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    for name, parameter in literal.named_parameters():
        expected = facts["grad_norms_all"][name]
        if expected is None or not parameter.numel():
            assert parameter.grad is None or not parameter.numel(), name
        else:
            assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-4, abs=ROUNDING), name


def test_our_model_is_the_literal_twin(golden):
    torch.manual_seed(0)
    literal, model = literal_twin(golden), golden.model.train()
    frames = torch.randint(0, 256, (5, *golden.frames_BTCHW.shape[1:]), dtype=torch.uint8)
    noise = torch.randn(5 * model.config.latent_length, model.config.quant_dim)
    theirs, ours = literal(frames, noise), model.loss(frames, noise=noise).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    theirs.backward(), ours.backward()
    predicted = model.eval().decode(frames[:, 0], model.codes(frames))
    torch.testing.assert_close(predicted, literal.reconstruct(frames), rtol=1e-4, atol=1e-4)
    parameters = dict(model.named_parameters())
    for released, name in released_names(model).items():
        expected, grad = literal.get_parameter(released).grad, parameters[name].grad
        if expected is None:
            assert grad is None, name
        else:
            assert (grad - expected).norm() <= 1e-4 * expected.norm() + ROUNDING, name


def literal_twin(golden: Golden) -> LiteralModel:
    literal = LiteralModel(golden.facts["config"])
    literal.load_state_dict(golden.weights)
    return literal


def to_released(model: LatentActionModel) -> dict[str, torch.Tensor]:
    """The weights under the released names: the inverse of `from_released`."""
    own = model.state_dict()
    held = {name: own[ours].clone() for name, ours in released_names(model).items()}
    reference = next(iter(held.values()))
    empty = {name: reference.new_zeros(shape) for name, shape in released_constants(model).items()}
    return held | empty


def test_names_go_there_and_back(golden):
    again = to_released(golden.model)
    assert again.keys() == golden.weights.keys()
    assert all(torch.equal(again[name], golden.weights[name]) for name in again)
    assert sum(p.numel() for p in golden.model.parameters()) == golden.facts["n_params"]


def test_paper_has_every_published_name_and_parameter():
    published = json.loads((GOLDEN / "laq_paper_keys.json").read_text())
    assert published["config"] == PUBLISHED_CONFIG
    with torch.device("meta"):
        model = LatentActionModel(released_config(PUBLISHED_CONFIG))
    shapes = {name: list(tensor.shape) for name, tensor in to_released(model).items()}
    assert shapes == {key["name"]: key["shape"] for key in published["keys"]}
    assert len(shapes) == 493
    assert sum(p.numel() for p in model.parameters()) == 343_796_080


def test_every_name_is_accounted_for():
    golden = Golden("A")
    missing, extra, misshapen, offset = (
        "vq.codebooks",
        "vq.codebook",
        "vq.project_in.weight",
        "enc_spatial_transformer.norm_out.beta",
    )
    weights = {name: tensor for name, tensor in golden.weights.items() if name != missing}
    weights[extra] = golden.weights[missing]
    weights[misshapen] = torch.zeros(3, 4)
    weights[offset] = torch.ones(64)
    with pytest.raises(ValueError) as error:
        from_released(weights, golden.facts["config"])
    message = str(error.value)
    assert f"{missing}: missing" in message and f"{extra}: not a name" in message
    assert f"{misshapen}: shape (3, 4), expected (16, 64)" in message and f"{offset}: expected zeros" in message
    assert len(message.split("; ")) == 4 and "\n" not in message


def test_published_config_is_checked():
    with pytest.raises(ValueError, match=r"unknown key .*'code_seq_length'; did you mean 'code_seq_len'"):
        released_config({**PUBLISHED_CONFIG, "code_seq_length": 4})
    with pytest.raises(ValueError, match="needs the keys heads"):
        released_config({key: value for key, value in PUBLISHED_CONFIG.items() if key != "heads"})
