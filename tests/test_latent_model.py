"""The latent action model: interface, shapes, options, saving; learning is tested with the stage."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lapa.checksums import SUMS
from lapa.data.transforms import resize_and_crop
from lapa.errors import UserError
from lapa.latent import model as model_file
from lapa.latent.config import LatentModelConfig
from lapa.latent.model import LatentActionModel, lam_fingerprint

PAPER = LatentModelConfig(
    image_size=32, patch_size=8, dim=16, spatial_depth=1, temporal_depth=1, heads=2, dim_head=8, quant_dim=6
)
TINY = replace(
    PAPER, patch_norm=False, quantizer="fsq", standardize_z=True, predict="change", action_input="attend_and_add"
)


def reconstruct(model, frames_BTCHW, codes_BL=None):
    """The second frame predicted from the first and its own codes, or the given ones."""
    return model.decode(frames_BTCHW[:, 0], model.codes(frames_BTCHW) if codes_BL is None else codes_BL)


CONFIGS = {
    "paper": PAPER,
    "released": replace(PAPER, layout="released"),
    "tiny": TINY,
    "augmented": replace(TINY, augment=True),
    "standard nsvq": replace(PAPER, standardize_z=True, latent_length=1, codebook_size=64),
    "many codes": replace(TINY, latent_length=12, codebook_size=30),
    "vq": replace(TINY, quantizer="vq"),
}


def frames(batch: int = 3, seed: int = 0, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 2, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=CONFIGS)
def model(request) -> LatentActionModel:
    torch.manual_seed(0)
    model = LatentActionModel(CONFIGS[request.param])
    model.initialise(frames(32, seed=1))
    # As training would: until then a model that predicts the change gives back the first frame, whatever the codes.
    torch.nn.init.normal_(model.to_pixels.project.weight, std=0.1)
    return model


def test_shapes_and_types(model):
    config = model.eval().config
    action = model.encode(frames())
    assert action.codes_BL.shape == (3, config.latent_length)
    assert action.codes_BL.dtype == torch.int64
    assert action.z_BLD.shape == action.quantized_BLD.shape == (3, config.latent_length, config.quant_dim)
    assert action.codes_BL.min() >= 0
    assert action.codes_BL.max() < config.codebook_size
    assert torch.equal(model.codes(frames()), action.codes_BL)
    assert reconstruct(model, frames()).shape == (3, 3, 32, 32)
    assert reconstruct(model, frames()).dtype == torch.float32
    assert torch.equal(reconstruct(model, frames(), action.codes_BL), reconstruct(model, frames()))


def test_every_trainable_parameter_gets_a_gradient_in_training(model):
    torch.nn.init.normal_(model.to_pixels.project.weight)
    losses = model.train()({"frames_BTCHW": frames()})
    losses.loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    own_term = {"quantizer"} if model.config.quantizer == "vq" else set()
    assert losses.parts.keys() == {"reconstruction", "copy", "batch_codes_used", "batch_perplexity"} | own_term
    assert not any(part.requires_grad for part in losses.parts.values())


def test_evaluation_is_deterministic_and_changes_nothing(model):
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    assert model.loss(frames()).loss == model.loss(frames()).loss
    model.train()
    model.codes(frames())
    reconstruct(model, frames())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_loss_is_the_error_of_the_reconstruction(model):
    expected = (reconstruct(model.eval(), frames()) - frames()[:, 1] / 255).square().mean()
    torch.testing.assert_close(model.loss(frames()).loss.detach(), expected)


def test_relative_errors_count_small_changes_as_much_as_large_ones():
    torch.manual_seed(0)
    plain = LatentActionModel(TINY).eval()
    torch.nn.init.normal_(plain.to_pixels.project.weight)
    relative = LatentActionModel(replace(TINY, error="relative")).eval()
    relative.load_state_dict(plain.state_dict())
    pairs = frames()
    # The first pair changes by a tenth of what the others do.
    pairs[0, 1] = (pairs[0, 0].float() * 0.9 + pairs[0, 1].float() * 0.1).byte()
    second_BCHW, first_BCHW = pairs[:, 1] / 255, pairs[:, 0] / 255
    error_B = (reconstruct(plain, pairs) - second_BCHW).square().mean((1, 2, 3))
    copy_B = (first_BCHW - second_BCHW).square().mean((1, 2, 3))
    weight_B = copy_B.mean() / (copy_B + 0.3 * copy_B.mean())
    torch.testing.assert_close(relative.loss(pairs).loss.detach(), (weight_B * error_B).mean())
    assert weight_B[0] > 3 * weight_B[1]
    torch.testing.assert_close(relative.loss(pairs).parts["reconstruction"], error_B.mean())
    # Nothing moves in any pair: no division by zero.
    assert torch.isfinite(relative.loss(pairs[:, :1].repeat(1, 2, 1, 1, 1)).loss)


def test_saved_and_loaded_is_the_same_model(model, tmp_path):
    model.eval().save_pretrained(tmp_path, extra={"pairs": {"horizon": 0.6}})
    again = LatentActionModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.horizon == model.config.horizon_seconds
    assert not again.training
    assert torch.equal(reconstruct(again, frames()), reconstruct(model, frames()))
    assert torch.equal(again.codes(frames()), model.codes(frames()))
    assert json.loads((tmp_path / "config.json").read_text())["pairs"] == {"horizon": 0.6}


def test_a_continuous_model_has_latent_actions_and_no_codes(tmp_path):
    torch.manual_seed(0)
    model = LatentActionModel(replace(TINY, quantizer="continuous", standardize_z=False))
    torch.nn.init.normal_(model.to_pixels.project.weight)
    losses = model.train().loss(frames())
    losses.loss.backward()
    assert losses.parts.keys() == {"reconstruction", "copy", "quantizer"}
    assert not model.discrete
    model.eval().save_pretrained(tmp_path)
    action = LatentActionModel.from_pretrained(tmp_path).encode(frames())
    assert action.codes_BL is None
    assert torch.equal(action.quantized_BLD, model.encode(frames()).quantized_BLD)
    assert model.predict(frames()[:, 0], action.quantized_BLD).shape == (3, 3, 32, 32)
    for ask in (model.codes, lambda frames_BTCHW: reconstruct(model, frames_BTCHW)):
        with pytest.raises(ValueError, match="a continuous latent action model has no codes"):
            ask(frames())


def test_a_model_with_an_option_of_an_earlier_version_loads(tmp_path):
    LatentActionModel(TINY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    whole["model"] |= {"reversal_weight": 0.1, "composition_weight": 0.0}
    path.write_text(json.dumps(whole))
    (tmp_path / SUMS).unlink()
    assert LatentActionModel.from_pretrained(tmp_path).config == TINY


def test_true_actions_supervise_where_they_are_known_and_only_there():
    torch.manual_seed(0)
    model = LatentActionModel(replace(TINY, action_dim=2)).train()
    model.initialise(frames(32, seed=1))
    model.standardise_actions(np.array([[10.0, 0.0], [14.0, 2.0]], np.float32))
    known = torch.tensor([[12.0, 1.0], [float("nan")] * 2, [14.0, 3.0]])
    losses = model.loss(frames(), actions_BA=known)
    read = model.to_action(model.encode(frames()).quantized_BLD.flatten(1))[[0, 2]]
    expected = (read - torch.tensor([[0.0, 0.0], [1.0, 2.0]])).square().mean()
    torch.testing.assert_close(losses.parts["action"], expected.detach())
    losses.loss.backward()
    assert torch.isfinite(model.to_action.weight.grad).all()
    assert model.to_action.weight.grad.abs().sum() > 0
    nothing_known = model.loss(frames(), actions_BA=torch.full((3, 2), float("nan")))
    assert nothing_known.parts["action"] == 0
    assert "action" not in model.loss(frames()).parts


def test_training_sees_augmented_pairs(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("lapa.latent.model.augment_pairs", lambda frames: 255 - frames)
    models = {on: LatentActionModel(replace(TINY, augment=on, predict="frame")) for on in (False, True)}
    first = models[False].state_dict()

    def loss(on, pairs, training):
        models[on].load_state_dict(first)
        return models[on].train(training).loss(pairs).loss.detach()

    assert loss(True, frames(), training=True) == loss(False, 255 - frames(), training=True)
    assert loss(True, frames(), training=False) == loss(False, frames(), training=False)


@pytest.mark.parametrize(("saved", "read"), [("off", False), ("data", True), ("view", True)])
def test_models_of_earlier_versions_say_how_they_were_augmented(tmp_path, saved, read):
    LatentActionModel(TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["augment"] = saved
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "SHA256SUMS").unlink()
    assert LatentActionModel.from_pretrained(tmp_path).config.augment is read


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    folder = tmp_path_factory.mktemp("tower")
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    return folder


@pytest.mark.parametrize("predict", ["frame", "change"])
@pytest.mark.parametrize(("inputs", "targets"), [("features", "pixels"), ("pixels", "features"), ("both", "both")])
def test_vision_features_as_inputs_and_targets(tower, tmp_path, inputs, targets, predict):
    torch.manual_seed(0)
    config = replace(TINY, inputs=inputs, targets=targets, vision_tower=str(tower), predict=predict)
    model = LatentActionModel(config)
    model.initialise(frames(32, seed=1))
    for head in ("to_pixels", "to_features"):
        if hasattr(model, head):
            for parameter in getattr(model, head).parameters():
                torch.nn.init.normal_(parameter, std=0.1)
    losses = model.train()({"frames_BTCHW": frames()})
    losses.loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert ("reconstruction" in losses.parts) == (targets != "features")
    assert ("feature_reconstruction" in losses.parts) == (targets != "pixels")
    action = model.eval().encode(frames())
    prediction, target = model.predict(frames()[:, 0], action.quantized_BLD), model.target(frames()[:, 1])
    assert prediction.shape == target.shape == ((3, 24, 4, 4) if targets == "features" else (3, 3, 32, 32))
    losses = model.loss(frames())
    if targets == "both":
        parts = losses.parts
        expected = parts["reconstruction"] + model.config.feature_weight * parts["feature_reconstruction"]
    else:
        expected = (prediction - target).square().mean()
    torch.testing.assert_close(losses.loss.detach(), expected)
    model.save_pretrained(tmp_path / "lam")
    again = LatentActionModel.from_pretrained(tmp_path / "lam")
    assert torch.equal(again.encode(frames()).codes_BL, action.codes_BL)
    assert torch.equal(again.predict(frames()[:, 0], action.quantized_BLD), prediction)
    if targets == "features":
        with pytest.raises(ValueError, match="predicts features, not pixels"):
            reconstruct(again, frames())
    fingerprint = lam_fingerprint(tmp_path / "lam")
    weights = tmp_path / "lam" / "vision_tower" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert lam_fingerprint(tmp_path / "lam") != fingerprint
    weights.unlink()
    with pytest.raises(ValueError, match=r"vision_tower/model\.safetensors: no such file"):
        lam_fingerprint(tmp_path / "lam")


def test_predicting_the_change_begins_at_the_first_frame():
    model = LatentActionModel(TINY).eval()
    assert torch.equal(reconstruct(model, frames()), frames()[:, 0] / 255)
    losses = model.loss(frames())
    torch.testing.assert_close(losses.loss.detach(), losses.parts["copy"])


def test_order_of_codes_matters():
    torch.manual_seed(0)
    model = LatentActionModel(PAPER).eval()
    ahead, back = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[3, 2, 1, 0]])
    first = frames(1)[:, 0]
    assert (model.decode(first, ahead) - model.decode(first, back)).abs().max() > 1e-3


def test_clean_and_released_layouts_have_as_many_parameters():
    sizes = {
        layout: sum(p.numel() for p in LatentActionModel(replace(PAPER, layout=layout)).parameters())
        for layout in ("clean", "released")
    }
    assert sizes["clean"] == sizes["released"]


def test_fingerprint_changes_with_weights_and_config_only(tmp_path):
    model = LatentActionModel(TINY)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", extra={"note": "another run"})
    assert lam_fingerprint(tmp_path / "a") == lam_fingerprint(tmp_path / "b")
    with torch.no_grad():
        model.from_latents.bias.add_(1)
    model.save_pretrained(tmp_path / "b")
    assert lam_fingerprint(tmp_path / "a") != lam_fingerprint(tmp_path / "b")
    longer = LatentActionModel(replace(TINY, horizon_seconds=1.2))
    longer.load_state_dict(model.state_dict())
    longer.save_pretrained(tmp_path / "a")
    assert lam_fingerprint(tmp_path / "a") != lam_fingerprint(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": 7}, "patch_size 7 does not divide image_size 32"),
        ({"latent_length": 5}, "laid out as 5 x 1 codes, which does not fit the 4 x 4 patches"),
        ({"latent_length": 0}, "latent_length 0 and codebook_size 8 carry no information"),
        ({"codebook_size": 1}, "latent_length 4 and codebook_size 1 carry no information"),
        ({"inputs": "features"}, "need a vision tower: add --vision-tower"),
        ({"vision_tower": "some/model"}, "given but not used: add --inputs features"),
        (
            {"targets": "both", "vision_tower": "some/model", "layout": "released"},
            "layout released with a vision tower has features in and out",
        ),
    ],
)
def test_impossible_configs_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(PAPER, **change)


def test_wrong_input_is_refused():
    model = LatentActionModel(TINY)
    with pytest.raises(ValueError, match="frames must be uint8 of shape"):
        model.encode(frames().float())
    with pytest.raises(ValueError, match="resize them to the model's image_size"):
        model.encode(frames(size=64))
    with pytest.raises(ValueError, match=r"codes must be of shape \[3, 4\], got \[3, 5\]"):
        reconstruct(model, frames(), torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 8\), got 8 to 8"):
        reconstruct(model, frames(), torch.full((3, 4), 8))


def test_what_is_not_a_saved_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        LatentActionModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no such folder|neither a folder here nor a model on the hub"):
        LatentActionModel.from_pretrained(tmp_path / "absent" / "folder")
    model = LatentActionModel(TINY)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half of a file")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or changed"):
        LatentActionModel.from_pretrained(tmp_path)
    (tmp_path / SUMS).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: does not fit the config next to it"):
        LatentActionModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for read in (LatentActionModel.from_pretrained, lam_fingerprint):
        with pytest.raises(ValueError, match=r"model\.safetensors: (missing|no such file)"):
            read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="give the folder of a latent action model"):
        lam_fingerprint(tmp_path)


def _two_processes(rank: int, folder: str) -> None:
    """Each process trains one step on half of the pairs; rank 0 saves gradients and state."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = LatentActionModel(TINY).train()
    torch.nn.init.constant_(model.to_pixels.project.weight, 0.01)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped({"frames_BTCHW": frames(8)[rank * 4 : rank * 4 + 4]}).loss.backward()
    if rank == 0:
        gradients = {name: p.grad for name, p in model.named_parameters()}
        torch.save((gradients, dict(model.named_buffers())), f"{folder}/result.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_standardize_over_two_processes_is_that_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_two_processes, args=(str(tmp_path),), nprocs=2)
    gradients, buffers = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.manual_seed(0)
    model = LatentActionModel(TINY).train()
    torch.nn.init.constant_(model.to_pixels.project.weight, 0.01)
    model.loss(frames(8)).loss.backward()
    torch.testing.assert_close(dict(model.named_buffers()), buffers)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-3, msg=name)


def test_models_saved_with_values_that_are_no_options_any_more_load(tmp_path):
    torch.manual_seed(0)
    saved = replace(
        TINY, quantizer="fsq", codebook_size=8, fsq_levels=(2, 2, 2), action_weight=0.5, commitment_weight=0.1,
        feature_weight=0.2, kl_weight=0.3,
    )  # fmt: skip
    model = LatentActionModel(saved).eval()
    model.initialise(frames(32, seed=1))
    model.save_pretrained(tmp_path)
    again = LatentActionModel.from_pretrained(tmp_path)
    assert again.config == saved
    assert torch.equal(again.codes(frames(4)), model.codes(frames(4)))
    with pytest.raises(UserError, match=r"fsq_levels \(2, 3\) do not make codebook_size 8"):
        replace(saved, fsq_levels=(2, 3))


@pytest.mark.parametrize("name", ["tiny", "released"])
def test_codes_takes_images_in_any_form_and_resizes_them(name):
    torch.manual_seed(0)
    model, size = LatentActionModel(CONFIGS[name]).eval(), 32
    model.initialise(frames(32, seed=1))
    images_BTHWC = np.random.default_rng(0).integers(0, 256, (3, 2, 48, 40, 3), np.uint8)
    small = [[resize_and_crop(image[None], size)[0] for image in pair] for pair in images_BTHWC]
    expected = model.encode(torch.from_numpy(np.array(small)).permute(0, 1, 4, 2, 3)).codes_BL
    assert len(expected.unique(dim=0)) == 3
    first = images_BTHWC.transpose(0, 1, 4, 2, 3)
    images = [[Image.fromarray(image) for image in pair] for pair in images_BTHWC]
    tensor = torch.from_numpy(images_BTHWC)
    for given in (images_BTHWC, first, tensor, torch.from_numpy(first.copy()), tensor / 255, images):
        assert torch.equal(model.codes(given), expected)
    assert torch.equal(model.codes([(a, b) for a, b in first]), expected)
    for pair in (images_BTHWC[0], torch.from_numpy(first[0].copy()), images[0], tuple(images_BTHWC[0])):
        assert torch.equal(model.codes(pair), expected[:1])


@pytest.mark.parametrize(
    "frames",
    [
        "a.png", None, [], np.zeros((2, 3, 8, 8, 3), np.uint8), np.full((2, 2, 8, 8, 3), 255.0),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 2, 8, 8, 4), np.uint8), [Image.new("RGB", (8, 8))], [[Image.new("RGB", (8, 8))]], [1, 2],
        {"front": np.zeros((8, 8, 3), np.uint8)}, np.zeros((1, 2, 0, 8, 3), np.uint8),
    ],
)  # fmt: skip
def test_codes_of_anything_else_is_a_mistake_in_one_line(frames):
    with pytest.raises(
        UserError, match=r"^got .*; give pairs \[B, 2, 3, H, W\]|^frames: (expected an RGB image|floats must)"
    ) as raised:
        LatentActionModel(TINY).codes(frames)
    assert "\n" not in str(raised.value)


def test_a_model_is_printed_in_one_line():
    model = LatentActionModel(TINY)
    num = sum(parameter.numel() for parameter in model.parameters())
    assert repr(model) == f"LatentActionModel(32 x 32 px, 4 codes of 8 values (fsq), horizon 0.6 s, {num:,} parameters)"
    assert "continuous" in repr(LatentActionModel(replace(TINY, quantizer="continuous")))
    assert "LatentActionModel(32" in repr(torch.nn.Sequential(model))


def test_known_actions_count_and_unknown_ones_do_not():
    nan = float("nan")
    predicted, actions = torch.ones(4, 2), torch.tensor([[1.0, 3.0], [nan, nan], [2.0, 1.0], [nan, nan]])
    assert model_file.known_actions_error(predicted, actions) == (4 + 1) / 4
    assert model_file.known_actions_error(predicted, torch.full((4, 2), nan)) == 0


def test_known_actions_of_two_processes_weigh_as_in_one_batch(monkeypatch):
    """One process knows three pairs, the other none: the mean of both losses is the loss of the whole."""
    nan, predicted = float("nan"), torch.zeros(4, 1)
    here, there = torch.tensor([[1.0], [2.0], [3.0], [nan]]), torch.full((4, 1), nan)
    whole = model_file.known_actions_error(torch.zeros(8, 1), torch.cat([here, there]))
    monkeypatch.setattr(model_file, "mean_everywhere", lambda count: torch.tensor(3 / 2))
    parts = [model_file.known_actions_error(predicted, actions) for actions in (here, there)]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_a_collapse_of_every_position_to_its_own_code_shows_in_the_batch():
    even = model_file.batch_usage(torch.arange(16)[:, None].repeat(1, 4) % 8, 8)
    assert even["batch_codes_used"] == 8
    assert even["batch_perplexity"] == pytest.approx(8, rel=1e-5)
    collapsed = model_file.batch_usage(torch.tensor([[0, 2, 5, 7]]).repeat(16, 1), 8)
    assert collapsed["batch_codes_used"] == collapsed["batch_perplexity"] == 1
