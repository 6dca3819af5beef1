"""The public API: what `import lapa` gives, without loading anything, and the commands as functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lapa
from lapa.policy.config import FinetuneConfig


def test_importing_loads_nothing_heavy_and_names_everything() -> None:
    code = "import lapa, sys; print(sorted(lapa.__all__) == sorted(set(lapa.__all__) & set(dir(lapa))), "
    code += "*({'torch', 'numpy', 'transformers', 'av', 'lapa.policy'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["True"]


@pytest.mark.parametrize("name", lapa.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    assert getattr(lapa, name).__doc__


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        lapa.Polcy  # noqa: B018


def test_the_stages_run_as_functions(tmp_path: Path) -> None:
    from lapa.sources.synthetic import write_synthetic_dataset

    videos = write_synthetic_dataset(tmp_path / "videos", episodes=4, frames=8, size=32).root
    robot = write_synthetic_dataset(tmp_path / "robot", episodes=3, frames=8, size=32, actions=True).root
    few = {"preset": "debug", "steps": 2, "batch_size": 4}
    lapa.train_latent(data=videos, out=tmp_path / "lam", **few)
    lapa.label(lam=tmp_path / "lam", data=str(videos), out=tmp_path / "labels")
    lapa.pretrain(data=[videos], labels=[tmp_path / "labels"], out=tmp_path / "latent", **few)
    config = lapa.configure("policy finetune", policy=tmp_path / "latent", data=robot, out=tmp_path / "policy", **few)
    lapa.finetune(config)
    policy, dataset = lapa.Policy.from_pretrained(tmp_path / "policy"), lapa.open_dataset(robot)
    image, instruction = dataset.frames(0, [0])[0], dataset[0].instruction
    assert policy.infer({"front": image, "instruction": instruction}).shape == (policy.chunk, dataset.action_dim)
    assert policy.fps == dataset.fps == 10
    pair = np.stack([image, dataset.frames(0, [3])[0]])
    assert lapa.LatentActionModel.from_pretrained(tmp_path / "lam").codes(pair[None]).shape == (1, 4)


def test_options_become_the_config_of_the_command_line() -> None:
    config = lapa.configure(
        "policy finetune", preset="debug", data=["a", "b:2"], out="o", flow={"width": 16}, augment=True
    )
    assert isinstance(config, FinetuneConfig) and config.data == ("a", "b:2") and config.out == Path("o")
    assert (config.flow.width, config.augment, config.loop.device) == (16, True, "cpu")
    measured = lapa.configure("policy measure", policy="P", data="d", steps=None)
    assert measured.policy == Path("P") and measured.steps is None


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("latent trian", {}, "unknown command 'latent trian'; did you mean 'latent train'"),
        ("latent train", {"preset": "tinny", "data": "d", "out": "o"}, "unknown preset 'tinny'; did you mean 'tiny'"),
        ("latent train", {"stps": 3}, "unknown option of lapa latent train 'stps'; did you mean 'steps'"),
        ("latent train", {"steps": 3}, "lapa latent train needs data, out"),
        ("latent train", {"data": "d", "out": "o", "steps": "many"}, "lapa latent train: .*steps"),
    ],
)
def test_mistakes_are_user_errors(command: str, options: dict, message: str) -> None:
    with pytest.raises(lapa.UserError, match=message):
        lapa.configure(command, **options)


def test_a_config_of_another_command_is_refused(tmp_path: Path) -> None:
    config = lapa.configure("policy measure", policy="P", data="d")
    with pytest.raises(
        lapa.UserError, match=r"expected a FinetuneConfig, got MeasureConfig; make one with lapa\.configure"
    ):
        lapa.finetune(config)
    with pytest.raises(lapa.UserError, match="not both"):
        lapa.finetune(config, steps=3)
    with pytest.raises(lapa.UserError, match="no such dataset folder"):
        lapa.train_latent(preset="debug", data=tmp_path / "none", out=tmp_path / "lam")
