"""The latent action model and its quantisers: interface, shapes, state, saving; learning is tested with the stage."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import lapa.latent.quantizer as quantizers
from lapa.latent.model import LatentActionModel, LatentModelConfig, lam_fingerprint
from lapa.latent.quantizer import NSVQ, FiniteScalar, Standardize

PAPER = LatentModelConfig(
    image_size=32, patch_size=8, dim=16, spatial_depth=1, temporal_depth=1, heads=2, dim_head=8, quant_dim=6
)
TINY = replace(PAPER, quantizer="fsq", standardize_z=True, predict="change", action_input="attend_and_add")
CONFIGS = {
    "paper": PAPER,
    "released": replace(PAPER, layout="released"),
    "tiny": TINY,
    "standard nsvq": replace(PAPER, standardize_z=True, latent_length=1, codebook_size=64),
    "many codes": replace(TINY, latent_length=12, codebook_size=15, fsq_levels=(5, 3)),
}


def frames(batch: int = 3, seed: int = 0, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 2, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=CONFIGS)
def model(request) -> LatentActionModel:
    torch.manual_seed(0)
    model = LatentActionModel(CONFIGS[request.param])
    model.initialise(frames(32, seed=1))
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
    assert model.reconstruct(frames()).shape == (3, 3, 32, 32)
    assert model.reconstruct(frames()).dtype == torch.float32
    assert torch.equal(model.reconstruct(frames(), action.codes_BL), model.reconstruct(frames()))


def test_every_trainable_parameter_gets_a_gradient_in_training(model):
    torch.nn.init.normal_(model.to_pixels.project.weight)
    losses = model.train()({"frames_BTCHW": frames()})
    losses.loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert losses.parts.keys() == {"reconstruction", "copy", "codes_used", "perplexity"}
    assert not any(part.requires_grad for part in losses.parts.values())


def test_evaluation_is_deterministic_and_changes_nothing(model):
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    assert model.loss(frames()).loss == model.loss(frames()).loss
    model.train()
    model.codes(frames())
    model.reconstruct(frames())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_loss_is_the_error_of_the_reconstruction(model):
    expected = (model.eval().reconstruct(frames()) - frames()[:, 1] / 255).square().mean()
    torch.testing.assert_close(model.loss(frames()).loss.detach(), expected)


def test_saved_and_loaded_is_the_same_model(model, tmp_path):
    model.eval().save_pretrained(tmp_path, extra={"pairs": {"horizon": 0.6}})
    again = LatentActionModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.horizon == model.config.horizon_seconds
    assert not again.training
    assert torch.equal(again.reconstruct(frames()), model.reconstruct(frames()))
    assert json.loads((tmp_path / "config.json").read_text())["pairs"] == {"horizon": 0.6}


def test_predicting_the_change_begins_at_the_first_frame():
    model = LatentActionModel(TINY).eval()
    assert torch.equal(model.reconstruct(frames()), frames()[:, 0] / 255)
    losses = model.loss(frames())
    torch.testing.assert_close(losses.loss.detach(), losses.parts["copy"])


def test_order_of_codes_matters():
    torch.manual_seed(0)
    model = LatentActionModel(PAPER).eval()
    ahead, back = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[3, 2, 1, 0]])
    first = frames(1)[:, 0]
    assert (model.decode(first, ahead) - model.decode(first, back)).abs().max() > 1e-6


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


def test_nsvq_is_finite_where_a_latent_is_its_code():
    quantizer = NSVQ(4, 3).train()
    z = quantizer.codebook_KD.detach()[None].clone().requires_grad_()
    quantizer(z).quantized_BLD.square().sum().backward()
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(quantizer.codebook_KD.grad).all()


def test_nsvq_noise_is_as_long_as_the_error():
    torch.manual_seed(0)
    quantizer, z, noise = NSVQ(4, 3).eval(), torch.randn(5, 2, 4), torch.randn(10, 4)
    out = quantizer(z, noise)
    error = (z - quantizer.embed(out.codes_BL)).norm(dim=-1)
    torch.testing.assert_close((out.quantized_BLD - z).norm(dim=-1), error)
    direction = torch.nn.functional.normalize(noise.view(z.shape), dim=-1)
    torch.testing.assert_close(out.quantized_BLD, z + error[..., None] * direction)


def test_dead_codes_come_back_to_life_and_apart(monkeypatch):
    """Seven of eight codes lie far away: after one replacement all are used, and no two are the same."""
    monkeypatch.setattr(quantizers, "REPLACE_EVERY", 4)
    torch.manual_seed(0)
    quantizer = NSVQ(4, 8).train()
    with torch.no_grad():
        quantizer.codebook_KD[1:] = 100.0
        quantizer.codebook_KD[0] = 0.0
    used = quantizer.codebook_KD[0].clone()
    for _ in range(3):
        quantizer(torch.randn(64, 2, 4))
    assert (quantizer.codebook_KD[1:] == 100).all()
    quantizer(torch.randn(64, 2, 4))
    assert torch.equal(quantizer.codebook_KD[0], used)
    assert torch.pdist(quantizer.codebook_KD.detach()).min() > 0.05
    assert len(quantizer.codes(torch.randn(256, 2, 4)).unique()) == 8
    assert not quantizer.uses_K.any()


def test_replacement_counts_samples_not_batches(monkeypatch):
    """A code chosen once in every batch of 256 is dead, though the released count (once a batch) calls it alive."""
    monkeypatch.setattr(quantizers, "REPLACE_EVERY", 4)
    torch.manual_seed(0)
    quantizer = NSVQ(2, 2).train()
    with torch.no_grad():
        quantizer.codebook_KD.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
    for _ in range(4):
        z = 0.1 * torch.randn(256, 1, 2)
        z[0] = 50.0
        quantizer(z)
    assert quantizer.codebook_KD[1].norm() < 60
    assert not torch.equal(quantizer.codebook_KD[1], torch.tensor([50.0, 50.0]))


def test_initialisation_spreads_the_codebook_over_the_data():
    torch.manual_seed(0)
    centres = 5 * torch.randn(8, 4)
    quantizer = NSVQ(4, 8)
    quantizer.initialise((centres[torch.arange(256) % 8] + 0.01 * torch.randn(256, 4))[:, None])
    nearest = torch.cdist(centres, quantizer.codebook_KD.detach()).min(dim=1)
    assert nearest.values.max() < 0.1
    assert len(nearest.indices.unique()) == 8


def test_initialisation_from_fewer_latents_than_codes_keeps_codes_apart():
    quantizer = NSVQ(4, 8)
    quantizer.initialise(torch.randn(2, 1, 4))
    assert torch.pdist(quantizer.codebook_KD.detach()).min() > 0


@pytest.mark.parametrize("levels", [(8,), (5, 3), (2, 2, 2)])
def test_fsq_codes_go_there_and_back(levels):
    torch.manual_seed(0)
    quantizer = FiniteScalar(6, levels)
    torch.nn.init.normal_(quantizer.project_in.weight, std=2.0)
    out = quantizer(torch.randn(200, 4, 6))
    torch.testing.assert_close(quantizer.embed(out.codes_BL), out.quantized_BLD)
    assert len(out.codes_BL.unique()) == torch.tensor(levels).prod()


def test_standardize_trains_on_the_batch_and_evaluates_on_running_moments():
    torch.manual_seed(0)
    module, data = Standardize(2, 3), lambda: 5 + 0.01 * torch.randn(64, 2, 3)
    out = module.train_step(data())
    torch.testing.assert_close(out.mean(0), torch.zeros(2, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.var(0, correction=0), torch.ones(2, 3), atol=1e-3, rtol=0)
    for _ in range(200):
        module.train_step(data())
    assert module(data()).mean().abs() < 0.3
    assert 0.7 < module(data()).std() < 1.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": 7}, "patch_size 7 does not divide image_size 32"),
        ({"fsq_levels": (3, 3)}, r"fsq_levels \(3, 3\) make 9 codes, but codebook_size is 8"),
        ({"latent_length": 5}, "laid out as 5 x 1 codes, which does not fit the 4 x 4 patches"),
    ],
)
def test_impossible_configs_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(PAPER, **change)


def test_wrong_input_is_refused():
    model = LatentActionModel(TINY)
    with pytest.raises(ValueError, match="frames must be uint8 of shape"):
        model.codes(frames().float())
    with pytest.raises(ValueError, match="resize them to the model's image_size"):
        model.codes(frames(size=64))
    with pytest.raises(ValueError, match=r"codes must be of shape \[3, 4\], got \[3, 5\]"):
        model.reconstruct(frames(), torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 8\), got 8 to 8"):
        model.reconstruct(frames(), torch.full((3, 4), 8))


def test_what_is_not_a_saved_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        LatentActionModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a folder here nor a model on the hub"):
        LatentActionModel.from_pretrained(tmp_path / "absent" / "folder")
    model = LatentActionModel(TINY)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half of a file")
    with pytest.raises(ValueError, match=r"model\.safetensors: not the weights"):
        LatentActionModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for read in (LatentActionModel.from_pretrained, lam_fingerprint):
        with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
            read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not the folder of a latent action model"):
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
