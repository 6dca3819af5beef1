"""Every preset builds what it names, and can be saved and loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from lapa import cli, config, presets
from lapa.latent.features import VisionTower
from lapa.latent.model import LatentActionModel
from lapa.policy.backbones import renew_backbone
from lapa.policy.heads import build_head
from lapa.policy.vocabulary import Vocabulary

ALL = [(stage, name) for stage, named in presets.STAGES.items() for name in named]
GIVEN: dict[str, Any] = {"data": ("data",), "out": Path("out"), "labels": ("labels",)}


def filled(stage: str, name: str) -> Any:
    """A preset with the options a user must give."""
    preset = presets.named(stage, name)
    required = {key: value for key, value in GIVEN.items() if getattr(preset, key, None) is presets.REQUIRED}
    return replace(preset, **required)


@pytest.mark.parametrize(("stage", "name"), ALL)
def test_a_preset_survives_saving(stage: str, name: str, tmp_path: Path) -> None:
    preset = filled(stage, name)
    assert preset.preset == name
    config.save(preset, tmp_path / "config.json")
    assert config.load(type(preset), tmp_path / "config.json") == preset


@pytest.mark.parametrize(("stage", "name"), ALL)
def test_a_preset_is_what_the_command_line_starts_from(stage: str, name: str) -> None:
    verb = next(verb for verb in cli.VERBS if verb.presets == stage)
    labels = ["--labels", "labels"] if stage == "pretrain" else []
    options = ["--preset", name, "--data", "data", "--out", "out", *labels]
    assert cli.parse(verb, options) == filled(stage, name)
    assert cli.parse(verb, [*options, "--steps", "7", "--lr", "0.5"]).loop.optim.lr == 0.5


@pytest.mark.parametrize("name", presets.LATENT)
def test_a_latent_preset_builds(name: str) -> None:
    # Only the large models stay without storage.
    tower: Any = torch.nn.Module() if presets.LATENT[name].model.uses_features else None
    if tower is not None:
        tower.dim = 1024
    with torch.device("meta" if name in ("paper", "dino") else "cpu"):
        model = LatentActionModel(presets.LATENT[name].model, tower)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


def test_dino_learns_from_features_and_keeps_its_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 2}
    tower = VisionTower(Dinov2Model(Dinov2Config(**shape)), grid=14)
    preset = presets.LATENT["dino"].model
    small = replace(preset, dim=32, spatial_depth=1, temporal_depth=1, heads=2, dim_head=16, quant_dim=8)
    model = LatentActionModel(small, tower)
    frames_BTCHW = torch.randint(0, 256, (4, 2, 3, 224, 224), dtype=torch.uint8)
    model.initialise(frames_BTCHW)
    losses = model.train().loss(frames_BTCHW)
    losses.loss.backward()
    # The first prediction is that nothing changes.
    torch.testing.assert_close(losses.parts["feature_reconstruction"], losses.parts["feature_copy"])
    assert model.to_features.weight.grad.norm() > 0 and not any(p.requires_grad for p in tower.model.parameters())
    codes_BL = model.eval().codes(frames_BTCHW)
    assert codes_BL.shape == (4, 49) and 0 <= int(codes_BL.min()) <= int(codes_BL.max()) < 64
    assert len(codes_BL.unique()) > 8
    model.save_pretrained(tmp_path)
    assert torch.equal(LatentActionModel.from_pretrained(tmp_path).codes(frames_BTCHW), codes_BL)


def test_paper_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = LatentActionModel(replace(presets.LATENT["paper"].model, layout="released"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 343_796_080


@pytest.mark.parametrize("name", ["debug", "tiny"])
def test_the_flow_head_of_a_small_preset_is_no_larger_than_its_backbone(name: str) -> None:
    preset = presets.FINETUNE[name]
    with torch.device("meta"):
        backbone = renew_backbone(preset.tiny, Vocabulary(600), num_cameras=1)
        head = build_head("flow", preset.tiny.width, preset.chunk, 7, preset.flow)
    backbone_size, head_size = (sum(p.numel() for p in part.parameters()) for part in (backbone, head))
    assert head_size < backbone_size


@pytest.mark.parametrize("name", presets.BACKBONES)
def test_a_backbone_preset_builds(name: str) -> None:
    with torch.device("meta"):
        backbone = renew_backbone(presets.BACKBONES[name], Vocabulary(600), num_cameras=1)
    assert sum(parameter.numel() for parameter in backbone.parameters()) > 0


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown preset 'papr'; did you mean 'paper'"):
        presets.named("latent", "papr")
