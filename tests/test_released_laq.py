"""The published model: goldens A and C of the released code, and the names of the published weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from literal import LiteralModel
from safetensors.torch import load_file
from transformers import Dinov2Model, DINOv3ViTModel

from lapa.errors import UserError
from lapa.latent.features import VisionTower
from lapa.latent.model import LatentActionModel
from lapa.released import laq
from lapa.released.config import ImportLaqConfig
from lapa.released.laq import (
    BACKBONE,
    PUBLISHED_CONFIG,
    dino_sizes,
    dino_tower,
    from_released,
    released_config,
    released_constants,
    released_names,
)

GOLDEN = Path(__file__).parent / "golden"
# Gradients that are zero in exact arithmetic (a bias under a softmax, or under a difference) are rounding noise.
ROUNDING = 1e-8
ABLATION = "dinov3-cs64_sl49_dim256 (ablation)"


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


class DinoGolden(Golden):
    """A case of the golden of LARYBench's models, with its tiny backbone in a folder of transformers."""

    def __init__(self, prefix: str, folder: Path):
        facts = json.loads((GOLDEN / "laq_dino.json").read_text())
        self.facts = next(case for case in facts["cases"] if case["prefix"] == prefix)
        every = load_file(GOLDEN / "laq_dino.safetensors")
        own = {key.removeprefix(prefix): value for key, value in every.items() if key.startswith(prefix)}
        self.tensors = {key: value for key, value in own.items() if key.split(".")[0] in ("sd", "in", "out")}
        self.weights = {key[3:]: value for key, value in self.tensors.items() if key.startswith("sd.")}
        kind = dict(self.facts["backbone"])
        backbone = {"dinov2": Dinov2Model, "dinov3_vit": DINOv3ViTModel}[kind.pop("type")]
        model = backbone(backbone.config_class(**kind))
        model.load_state_dict(
            {key.removeprefix(BACKBONE): value for key, value in self.weights.items() if key.startswith(BACKBONE)}
        )
        model.save_pretrained(folder)
        self.tower = dino_tower(str(folder), self.facts["config"]["image_size"])
        self.model = from_released(self.weights, self.facts["config"], str(folder), self.tower)
        self.frames_BTCHW = rearrange(self.tensors["in.video_u8"], "b c t h w -> b t c h w")
        self.given_BL = self.tensors["in.user_codes"].reshape(-1, self.model.config.latent_length)


@pytest.fixture(params=["", "v3."])
def dino(request, tmp_path) -> DinoGolden:
    return DinoGolden(request.param, tmp_path / "dino")


@torch.no_grad()
def test_dino_features_codes_and_reconstructions(dino):
    model, outputs = dino.model, dino.tensors
    view = model._view(dino.frames_BTCHW)
    dino.agrees("features", view.features_BTHWD)
    if "out.encoded" in outputs:
        dino.agrees("encoded", model.encode_tokens(view.features_BTHWD, model.position_bias()))
    action = model.encode(dino.frames_BTCHW)
    dino.agrees("z", action.z_BLD)
    assert torch.equal(action.codes_BL, outputs["out.ids"])
    dino.agrees("quantised", model.action_tokens(action.quantized_BLD))
    dino.agrees("quantised_user", model.action_tokens(model.embed(dino.given_BL.long())))
    noisy = model.quantizer(action.z_BLD, outputs["in.noise"]).quantized_BLD
    dino.agrees("quantised_noise", model.action_tokens(noisy))
    for name, quantized in (("recon", action.quantized_BLD), ("recon_noise", noisy)):
        predicted = model.predict(dino.frames_BTCHW[:, 0], quantized)
        dino.agrees(name, rearrange(predicted, "b d h w -> b h w d"))


def test_dino_training_loss_and_every_gradient(dino):
    facts, model = dino.facts["train"], dino.model.train()
    losses = model.loss(dino.frames_BTCHW, noise=dino.tensors["in.noise"])
    losses.loss.backward()
    assert losses.loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    assert losses.parts["feature_copy"].item() == pytest.approx(facts["copy_mse"], rel=1e-5)
    assert sum(p.numel() for p in model.parameters()) == dino.facts["n_params_trainable"]
    parameters, names = dict(model.named_parameters()), released_names(model)
    checked = 0
    for released, expected in facts["grad_norms"].items():
        if expected is None:
            assert parameters[names[released]].grad is None, released
        elif released in names:
            norm = parameters[names[released]].grad.norm().item()
            # A bias under a softmax has none: rounding.
            assert norm == pytest.approx(expected, rel=1e-3, abs=10 * ROUNDING), released
            checked += 1
    assert checked > 50
    held = [p.grad for p in parameters.values() if p.grad is not None]
    assert torch.cat([g.flatten() for g in held]).norm().item() == pytest.approx(facts["grad_norm_total"], rel=1e-4)


@pytest.mark.parametrize("wrapped", ["bare", "checkpoint", "average"])
def test_dino_becomes_a_folder_with_its_codes(dino, wrapped, tmp_path):
    files = {
        "bare": {f"module.{name}": tensor for name, tensor in dino.weights.items()},
        "checkpoint": {"model": dino.weights, "optim": {"state": {}}, "steps": 3},
        "average": {"initted": torch.tensor(True), "step": torch.tensor(3)}
        | {f"{kind}.{name}": tensor for kind in ("ema_model", "online_model") for name, tensor in dino.weights.items()},
    }
    path, sizes = tmp_path / "laq_dino.pt", tmp_path / "sizes.json"
    torch.save(files[wrapped], path)
    sizes.write_text(json.dumps(dino.facts["config"]))
    config = ImportLaqConfig(path, out=tmp_path / "lam", vision_tower=str(tmp_path / "dino"), sizes=sizes)
    laq.run(config)
    model = LatentActionModel.from_pretrained(tmp_path / "lam")
    assert torch.equal(model.codes(dino.frames_BTCHW), dino.tensors["out.ids"])
    assert model.tower.mean == (0.5, 0.5, 0.5) and not model.tower.standardised


def test_dino_has_every_published_name_and_parameter():
    facts = json.loads((GOLDEN / "laq_dino.json").read_text())
    names = facts["names"]["LAPA-DINOv2 and LAPA-DINOv3, trainable and buffers (identical)"]
    absent = facts["names"]["absent in cs64_sl49_dim256"]
    ablated = {name: shape for name, shape in names.items() if name not in absent}
    ablated |= facts["names"]["differs in cs64_sl49_dim256"]
    tower = torch.nn.Module()
    tower.dim = 1024
    for kind, expected in (("LAPA-DINOv2", names), ("LAPA-DINOv3", names), (ABLATION, ablated)):
        published = facts["published"][kind]
        with torch.device("meta"):
            model = LatentActionModel(released_config(published["config"], "dino"), tower)
        shapes = {name: list(tensor.shape) for name, tensor in to_released(model).items()}
        assert shapes == expected
        assert sum(p.numel() for p in model.parameters()) == published["n_params_trainable"]
        meta = {name: torch.zeros(shape, device="meta") for name, shape in expected.items()}
        assert dino_sizes(meta, published["config"]["patch_size"]) == published["config"]


def test_dino_that_does_not_fit_is_refused(dino, tmp_path, monkeypatch):
    path, asked = tmp_path / "laq.pt", []

    def tower_of(name: str, size: int) -> VisionTower:
        asked.append(name)
        return dino.tower

    def refused(complaint: str, weights: dict[str, torch.Tensor]) -> None:
        torch.save(weights, path)
        with pytest.raises(UserError, match=complaint) as error:
            laq.run(ImportLaqConfig(path, out=tmp_path / "lam"))
        assert str(path) in str(error.value) and not (tmp_path / "lam").exists()

    monkeypatch.setattr(laq, "dino_tower", tower_of)
    refused("vq.codebooks", {name: tensor for name, tensor in dino.weights.items() if name != "vq.codebooks"})
    # The published backbone of its kind, by the names of the file.
    assert asked == [laq.DINOV3 if dino.facts["backbone"]["type"] == "dinov3_vit" else laq.DINOV2]
    patch = next(name for name, tensor in dino.weights.items() if name.startswith(BACKBONE) and tensor.ndim == 4)
    refused("patches of 7 pixels, the vision tower 2", {**dino.weights, patch: torch.zeros(1, 3, 7, 7)})
    refused("sizes cannot be read off", {**dino.weights, "vq.cnn_encoder.0.weight": torch.zeros(8, 8, 5, 5)})
    wrong = {**dino.weights, "extra": torch.zeros(1)}
    with pytest.raises(UserError, match="extra: not a name of the released model"):
        from_released(wrong, dino.facts["config"], "dino", dino.tower)
    with pytest.raises(UserError, match="16, 49, 64 codes, not 4" if dino.model.config.grid == 14 else "16, 64, 81"):
        from_released(dino.weights, {**dino.facts["config"], "code_seq_len": 4}, "dino", dino.tower)
