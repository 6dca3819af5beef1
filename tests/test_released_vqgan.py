"""The image tokenizer: the golden of the released code, the published sizes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from lapa import config as configs
from lapa.errors import UserError
from lapa.policy.config import VQGANConfig
from lapa.released.vqgan import VQGAN, from_released, released_shapes
from released_files import golden

FACTS, TENSORS, PARAMS = golden("vqgan_small")
CONFIG = configs.from_dict(VQGANConfig, FACTS["config"])
IMAGES = TENSORS["in.image_u8"]


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    return from_released(PARAMS, CONFIG)


def test_codes_are_those_of_the_released_code(vqgan):
    torch.testing.assert_close(vqgan.latents(IMAGES), TENSORS["out.z"], atol=1e-5, rtol=1e-5)
    assert torch.equal(vqgan.encode(IMAGES), TENSORS["out.indices"].long())
    assert torch.equal(vqgan.codebook_KD[vqgan.encode(IMAGES)], PARAMS["quantize/embeddings"][TENSORS["out.indices"]])


def test_the_decoded_image_is_that_of_the_released_code(vqgan):
    torch.testing.assert_close(vqgan.decode(TENSORS["out.indices"]), TENSORS["out.decoded"], atol=1e-4, rtol=0)


def test_the_published_sizes_have_the_published_names_and_shapes():
    shapes = released_shapes(VQGANConfig())
    assert shapes == {name: tuple(shape) for name, shape in FACTS["full_param_shapes"].items()}
    assert sum(map(math.prod, shapes.values())) == FACTS["full_params"] == 146_244_675
    assert VQGANConfig().num_tokens == 256


def test_it_is_frozen_and_keeps_its_precision_under_autocast(vqgan):
    assert not any(parameter.requires_grad for parameter in vqgan.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vqgan(IMAGES), TENSORS["out.indices"].long())


def test_a_saved_tokenizer_gives_the_same_codes(vqgan, tmp_path):
    vqgan.save(tmp_path)
    loaded = VQGAN.load(tmp_path)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.encode(IMAGES), vqgan.encode(IMAGES))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_that_do_not_fit_are_named(tmp_path):
    wrong = {**PARAMS, "extra/kernel": torch.zeros(1), "quant_conv/bias": torch.zeros(3)}
    del wrong["encoder/Conv_0/kernel"]
    with pytest.raises(ValueError) as error:
        from_released(wrong, CONFIG)
    assert "encoder/Conv_0/kernel: missing" in str(error.value)
    assert "extra/kernel: not a name" in str(error.value)
    assert "quant_conv/bias: shape (3,), expected (16,)" in str(error.value)
    VQGAN(CONFIG).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit the config"):
        VQGAN.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: missing"):
        VQGAN.load(tmp_path)


@pytest.mark.parametrize(
    "sizes, complaint",
    [({"resolution": 0}, "at least 1"), ({"channel_mult": (1, -1)}, "at least 1"), ({"hidden_channels": 30}, "of 32")],
)
def test_impossible_sizes_are_refused(sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        VQGANConfig(**sizes)


def test_an_image_of_another_size_is_refused(vqgan):
    with pytest.raises(ValueError, match="64 x 64"):
        vqgan.encode(IMAGES[:, :32])
