"""The quantisers: one interface, state that follows the data, codes that stay alive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lapa.latent.quantizers as quantizers
from lapa.latent.config import LatentModelConfig
from lapa.latent.quantizers import (
    NSVQ,
    VARIANCE_FLOOR,
    Continuous,
    FiniteScalar,
    MovingAverages,
    Standardize,
    build_quantizer,
)

BASE = LatentModelConfig(image_size=64, patch_size=8, quant_dim=6, standardize_z=True)
DISCRETE = ("nsvq", "vq", "fsq")


@pytest.mark.parametrize(("codebook_size", "latent_length"), [(8, 4), (2, 1), (64, 49), (5, 12)])
@pytest.mark.parametrize("name", DISCRETE)
def test_any_vocabulary_and_length(name, codebook_size, latent_length):
    torch.manual_seed(0)
    quantizer = build_quantizer(replace(BASE, quantizer=name, codebook_size=codebook_size, latent_length=latent_length))
    z = 3 + 0.01 * torch.randn(128, latent_length, 6)
    quantizer.initialise(z)
    learned = quantizer.train()(z)
    assert learned.codes_BL.shape == (128, latent_length)
    assert learned.quantized_BLD.shape == z.shape
    found = quantizer.eval().quantize(z)
    assert 0 <= int(found.codes_BL.min()) <= int(found.codes_BL.max()) < codebook_size
    assert len(found.codes_BL.unique()) > 0.8 * codebook_size
    torch.testing.assert_close(quantizer.embed(found.codes_BL), found.quantized_BLD)
    torch.testing.assert_close(quantizer(z).quantized_BLD, found.quantized_BLD)


@pytest.mark.parametrize("name", [*DISCRETE, "continuous"])
def test_the_gradient_reaches_the_latents_and_evaluation_changes_nothing(name):
    torch.manual_seed(0)
    quantizer = build_quantizer(replace(BASE, quantizer=name))
    z = torch.randn(32, 4, 6, requires_grad=True)
    quantizer.initialise(z.detach())
    learned = quantizer.train()(z)
    (learned.quantized_BLD * torch.randn(32, 4, 6)).sum().backward()
    assert z.grad.abs().sum() > 0
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.quantize(torch.randn(8, 4, 6))
    quantizer.eval()(torch.randn(8, 4, 6))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_a_vocabulary_is_split_into_levels_whose_product_it_is():
    levels = {size: replace(BASE, codebook_size=size).levels for size in (8, 16, 17, 64, 100, 256, 4096)}
    assert levels[8] == (8,)
    assert levels[16] == (16,)
    assert levels[17] == (17,)
    assert levels[64] == (8, 8)
    assert levels[256] == (8, 8, 4)
    assert all(torch.tensor(found).prod() == size for size, found in levels.items())


def test_moving_averages_follow_the_latents_and_revive_dead_codes():
    torch.manual_seed(0)
    quantizer, centres = MovingAverages(4, 8), 5 * torch.randn(8, 4)

    def data():
        return (centres[torch.randint(8, (256,))] + 0.01 * torch.randn(256, 4))[:, None]

    quantizer.initialise(data())
    with torch.no_grad():
        quantizer.codebook.codebook[1:] = 100.0
    for _ in range(300):
        out = quantizer.train()(data())
    assert len(quantizer.quantize(data()).codes_BL.unique()) >= 7
    assert out.loss < 1.0


def test_a_continuous_latent_is_sampled_in_training_and_its_mean_in_evaluation():
    torch.manual_seed(0)
    quantizer, z = Continuous(4), torch.randn(256, 2, 4)
    one, two = (quantizer.train()(z) for _ in range(2))
    assert one.codes_BL is None
    assert not torch.equal(one.quantized_BLD, two.quantized_BLD)
    assert torch.equal(quantizer.quantize(z).quantized_BLD, quantizer.eval()(z).quantized_BLD)
    with torch.no_grad():
        quantizer.moments.weight.zero_()
        quantizer.moments.bias.zero_()
    # A unit normal is what the divergence wants; any other mean costs half its square.
    assert quantizer.train()(z).loss == 0
    quantizer.moments.bias.data[:4] = 2.0
    torch.testing.assert_close(quantizer(z).loss, torch.tensor(1e-4 * 2.0))
    with pytest.raises(ValueError, match="has no codes"):
        quantizer.embed(torch.zeros(1, 2, dtype=torch.int64))


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
    assert len(quantizer.quantize(torch.randn(256, 2, 4)).codes_BL.unique()) == 8
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


def test_standardize_has_the_values_of_running_moments_and_the_gradient_of_the_batch():
    torch.manual_seed(0)
    module, data = Standardize(2, 3), lambda: 5 + 0.01 * torch.randn(64, 2, 3)
    for _ in range(200):
        module.train_step(data())
    z, weights = data().requires_grad_(), torch.randn(64, 2, 3)
    out = module.train_step(z)
    torch.testing.assert_close(out, module(z))
    assert out.mean().abs() < 0.3
    assert 0.7 < out.std() < 1.3
    (gradient,) = torch.autograd.grad((out * weights).sum(), z)
    by_batch = (z - z.mean(0)) * (z.var(0, correction=0) + VARIANCE_FLOOR).rsqrt()
    (expected,) = torch.autograd.grad((by_batch * weights).sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-2)
    module.initialise(z)
    torch.testing.assert_close(module(z).mean(0), torch.zeros(2, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(module(z).var(0, correction=0), torch.ones(2, 3), atol=1e-3, rtol=0)
