"""Frozen vision towers: features as transformers computes them, loading, saving, and what a holder sees of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTMAEConfig,
    ViTMAEModel,
)

import lapa.latent.features as features
from lapa.latent.features import IMAGENET_MEAN, IMAGENET_STD, VisionTower

PATCH, NATIVE_GRID, DIM = 4, 4, 32
SHAPE = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH}
WIDE = {**SHAPE, "intermediate_size": 48}
SIZED = {"image_size": NATIVE_GRID * PATCH}
TEXT = {**WIDE, "vocab_size": 10}
# How many tokens come before those of the patches.
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SHAPE, **SIZED, mlp_ratio=2)), 1),
    "dinov2 registers": (
        lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**SHAPE, **SIZED, mlp_ratio=2, num_register_tokens=3)
        ),
        4,
    ),
    "dinov3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**WIDE, **SIZED, num_register_tokens=2)), 3),
    "siglip vision": (lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE, **SIZED)), 0),
    "siglip": (lambda: SiglipModel(SiglipConfig(vision_config={**WIDE, **SIZED}, text_config=TEXT)), 0),
    "siglip2 any aspect": (lambda: Siglip2VisionModel(Siglip2VisionConfig(**WIDE, num_patches=NATIVE_GRID**2)), 0),
}


def build(name: str) -> PreTrainedModel:
    """Random weights, away from the tiny ones of a fresh model, whose features hardly depend on the image."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def write(model: PreTrainedModel, folder: Path, mean: float = 0.4, std: float = 0.3) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [mean] * 3, "image_std": [std] * 3}))
    return folder


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    return write(build(name), tmp_path / "model")


def images(num: int = 2, size: int = NATIVE_GRID * PATCH) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(1))


def small_tower(grid: int = 2) -> VisionTower:
    return VisionTower(build("dinov2"), grid)


class Holder(nn.Module):
    """A model that reads features and has parameters and an average of its own."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(tower.dim, 1)

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(pixels_NCHW)).mean()


def literal(model: PreTrainedModel, name: str, pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """The model's own features at its native size, called by hand, as [N, h, w, D]."""
    normalised = (pixels_NCHW - 0.4) / 0.3
    if name == "siglip2 any aspect":
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        patches = torch.stack([torch.from_numpy(convert_image_to_patches(x.numpy(), PATCH)) for x in normalised])
        tokens = model(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
            spatial_shapes=torch.tensor([[NATIVE_GRID, NATIVE_GRID]] * len(patches)),
        ).last_hidden_state
    else:
        vision = model.vision_model if name == "siglip" else model
        tokens = vision(pixel_values=normalised).last_hidden_state
    num_prefix = MODELS[name][1]
    assert tokens.shape[1] == num_prefix + NATIVE_GRID**2
    rows = tokens[:, num_prefix:].reshape(len(pixels_NCHW), NATIVE_GRID, NATIVE_GRID, DIM)
    return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@torch.no_grad()
def test_features_are_those_of_transformers_at_the_native_size(name, folder):
    expected = literal(build(name), name, images())
    got = VisionTower.from_pretrained(folder, NATIVE_GRID)(images())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().mean() > 0.05


@pytest.mark.parametrize(("grid", "size"), [(2, 16), (3, 50), (7, 20)])
def test_any_square_size_gives_the_grid(name, folder, grid, size):
    tower = VisionTower.from_pretrained(folder, grid)
    got = tower(images(2, size))
    assert got.shape == (2, grid, grid, DIM)
    assert tower.dim == DIM
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.mean(-1), torch.zeros(2, grid, grid), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.std(-1, unbiased=False), torch.ones(2, grid, grid), atol=1e-3, rtol=0)
    assert torch.equal(tower(images(2, size)), got)


def test_images_are_resized_before_anything_else():
    tower = small_tower(3)
    resized = F.interpolate(images(2, 50), (12, 12), mode="bilinear", antialias=True)
    assert torch.equal(tower(images(2, 50)), tower(resized))


def test_rows_are_rows_and_columns_are_columns():
    """Without attention or position, a feature depends on its own patch alone."""
    model = build("dinov2")
    model.encoder.layer = nn.ModuleList()
    nn.init.zeros_(model.embeddings.position_embeddings)
    tower = VisionTower(model, NATIVE_GRID)
    plain, changed = images(1), images(1)
    changed[:, :, PATCH : 2 * PATCH, 3 * PATCH :] += 0.5
    differs = (tower(plain) - tower(changed)).abs().amax(-1)[0] > 1e-4
    assert differs.nonzero().tolist() == [[1, 3]]


def test_saved_and_read_again_bit_for_bit(folder, tmp_path):
    tower = VisionTower.from_pretrained(folder, 3)
    tower.save_pretrained(tmp_path / "lam" / "vision_tower")
    again = VisionTower.from_pretrained(tmp_path / "lam" / "vision_tower", 3)
    assert torch.equal(again(images()), tower(images()))
    assert (again.mean, again.std) == (tower.mean, tower.std) == ((0.4,) * 3, (0.3,) * 3)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), tower.model.parameters(), strict=True))
    assert type(again.model) is type(tower.model)
    written = (tmp_path / "lam" / "vision_tower" / "config.json").read_text()
    assert str(tmp_path) not in written
    weights = load_file(tmp_path / "lam" / "vision_tower" / "model.safetensors")
    assert not any(key.startswith("text_model") for key in weights)


def test_half_precision_weights_are_computed_in_float32(tmp_path):
    write(build("siglip vision").to(torch.bfloat16), tmp_path / "half")
    tower = VisionTower.from_pretrained(tmp_path / "half", 2)
    assert {p.dtype for p in tower.model.parameters()} == {torch.float32}


def test_frozen(name, folder):
    tower = VisionTower.from_pretrained(folder, 2)
    pixels = images().requires_grad_()
    assert not tower(pixels).requires_grad
    holder = Holder(tower).train()
    assert not any(p.requires_grad for p in tower.model.parameters())
    assert not any(module.training for module in tower.model.modules())
    before = [p.clone() for p in tower.model.parameters()]
    optimizer = torch.optim.AdamW(holder.parameters(), lr=1.0, weight_decay=1.0)
    holder.requires_grad_()(images()).backward()
    optimizer.step()
    assert holder.head.weight.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(before, tower.model.parameters(), strict=True))


def test_the_holder_sees_no_parameters_and_its_state_has_no_tower():
    holder = Holder(small_tower())
    assert set(holder.state_dict()) == {"head.weight", "head.bias"}
    assert [name for name, _ in holder.named_parameters()] == ["head.weight", "head.bias"]
    other = Holder(small_tower())
    torch.nn.init.constant_(other.head.weight, 1)
    assert not torch.equal(other(images()), holder(images()))
    other.load_state_dict(holder.state_dict())
    assert torch.equal(other(images()), holder(images()))
    averaged = copy.deepcopy(holder)
    assert torch.equal(averaged(images()), holder(images()))


def test_it_moves_with_its_holder():
    holder = Holder(small_tower())
    expected = holder.tower(images())
    holder.to(torch.bfloat16)
    assert {p.dtype for p in holder.tower.model.parameters()} == {torch.bfloat16}
    half = holder.tower(images())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.2, rtol=0)
    holder(images()).backward()
    assert {p.device.type for p in Holder(small_tower()).to("meta").tower.model.parameters()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_computes_what_the_cpu_does(folder):
    tower = VisionTower.from_pretrained(folder, 3)
    expected = tower(images())
    torch.testing.assert_close(tower.cuda()(images().cuda()).cpu(), expected, atol=2e-2, rtol=0)


def test_autocast_gives_float32_features():
    tower = small_tower()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tower(images())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, tower(images()), atol=0.2, rtol=0)


def test_distributed_training_does_not_touch_it(tmp_path):
    holder = Holder(small_tower())
    before = [p.clone() for p in holder.tower.model.parameters()]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(holder)
        for _ in range(2):
            wrapped(images()).backward()
    finally:
        dist.destroy_process_group()
    assert holder.head.weight.grad is not None
    assert all(p.grad is None for p in holder.tower.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, holder.tower.model.parameters(), strict=True))


def test_it_can_be_compiled(name, folder):
    tower = VisionTower.from_pretrained(folder, 3)
    holder = Holder(tower)
    expected = holder(images())
    torch.testing.assert_close(torch.compile(holder, backend="eager")(images()), expected)


def test_no_normalisation_means_imagenets_and_says_so(tmp_path, monkeypatch):
    build("dinov2").save_pretrained(tmp_path / "bare")
    said: list[str] = []
    monkeypatch.setattr(features, "warn", said.append)
    tower = VisionTower.from_pretrained(tmp_path / "bare", 2)
    assert (tower.mean, tower.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert len(said) == 1
    assert f"{tmp_path / 'bare'} has no preprocessor_config.json" in said[0]


@pytest.mark.parametrize(
    "written", ['{"image_mean": [0.5]}', '{"image_mean": [1, 1, 1], "image_std": [0, 1, 1]}', "[]", '{"image_mean": 3}']
)
def test_a_wrong_normalisation_is_named(tmp_path, written):
    folder = write(build("dinov2"), tmp_path)
    (folder / "preprocessor_config.json").write_text(written)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: needs image_mean and image_std"):
        VisionTower.from_pretrained(folder, 2)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing: neither a folder here nor a model on the hub"):
        VisionTower.from_pretrained("nobody/nothing", 2)
    with pytest.raises(ValueError, match="absent: no such folder"):
        VisionTower.from_pretrained(tmp_path / "absent", 2)
    with pytest.raises(ValueError, match=r"not a model that transformers can load.*needs config\.json"):
        VisionTower.from_pretrained(tmp_path, 2)


def test_a_name_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    folder = write(build("dinov2"), tmp_path / "snapshot")
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    tower = VisionTower.from_pretrained("facebook/dinov2-small", 2)
    assert asked == ["facebook/dinov2-small"]
    assert tower.mean == (0.4,) * 3


SMALL_BERT = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
SMALL_RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
SMALL_SWIN = SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2)
MASKED = ViTMAEConfig(**WIDE, **SIZED, decoder_num_hidden_layers=1, decoder_num_attention_heads=1)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: BertModel(SMALL_BERT), "a bert model, which reads input_ids, not images"),
        (lambda: ResNetModel(SMALL_RESNET), "resnet has no square patches"),
        (lambda: SwinModel(SMALL_SWIN), "not usable as a vision tower"),
        (lambda: ViTMAEModel(MASKED), "vit_mae has no token for each patch"),
        (lambda: Dinov2Model(Dinov2Config(**{**SHAPE, "patch_size": [4, 8]}, image_size=16)), "no square patches"),
    ],
    ids=["text", "no patches", "merged patches", "masked patches", "oblong patches"],
)
def test_models_that_will_not_do_are_named(tmp_path, model, complaint):
    write(model(), tmp_path)
    with pytest.raises(ValueError, match=complaint) as caught:
        VisionTower.from_pretrained(tmp_path, 2)
    assert str(tmp_path) in str(caught.value)
    assert "choose a DINOv2, DINOv3 ViT or SigLIP model" in str(caught.value)


def test_missing_and_broken_weights_are_named(tmp_path):
    folder = write(build("dinov2"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 1 parameters of its dinov2 \(layernorm\.weight"):
        VisionTower.from_pretrained(folder, 2)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a model that transformers can load"):
        VisionTower.from_pretrained(folder, 2)


def test_wrong_pixels_are_named():
    tower = small_tower()
    with pytest.raises(ValueError, match=r"square images \[N, 3, H, H\], got \[2, 3, 16, 8\]"):
        tower(images()[..., :8])
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got torch\.uint8"):
        tower((images() * 255).to(torch.uint8))
    with pytest.raises(ValueError, match="grid 0 must be at least 1"):
        small_tower(0)
