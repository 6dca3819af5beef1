"""Every preset builds what it names, and can be saved and loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapa import cli, config, presets
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
    # FSQ computes its levels while it is built, so only the large model stays without storage.
    with torch.device("meta" if name == "paper" else "cpu"):
        model = LatentActionModel(presets.LATENT[name].model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


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
