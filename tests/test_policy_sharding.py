"""A policy whose weights are shared out over two processes (FSDP2, gloo) learns what it learns in one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lapa.policy.config import VQGANConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import Policy
from lapa.released import lwm
from lapa.sources.synthetic import write_synthetic_dataset
from test_policy_training import write_labels
from torchrun import torchrun
from vlms import make_vlm

SMALL_LWM = lwm.LwmConfig(
    width=32,
    inner_width=64,
    layers=2,
    heads=2,
    max_length=128,
    vqgan=VQGANConfig(
        resolution=32,
        hidden_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        z_channels=4,
        quantized_embed_dim=4,
        num_embeddings=16,
    ),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharding")
    write_labels(root / "labels", write_synthetic_dataset(root / "videos", episodes=4, frames=8))
    make_vlm("smolvlm", root / "vlm")
    torch.manual_seed(0)
    backbone, processor, vocabulary = lwm.create(SMALL_LWM, texts=["move right"], num_cameras=1, segments={})
    model = LatentPolicy(PolicyConfig(vocabulary, ("front",), SMALL_LWM), backbone)
    Policy(model, processor).save_pretrained(root / "lwm", run={})
    return root


def pretrained(root: Path, out: Path, processes: int, *options: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses step by step, and the weights of the language model that was written."""
    given = ["--data", root / "videos", "--labels", root / "labels", "--out", out, "--preset", "debug"]
    run = ["-m", "lapa", "policy", "pretrain", *map(str, given), "--steps", "3", "--log-every", "1", *options]
    torchrun(*run, *(["--shard"] if processes > 1 else []), processes=processes)
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], load_file(out / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf with adapters", "lwm"])
def test_two_processes_learn_what_one_does(root: Path, tmp_path: Path, kind: str) -> None:
    options = ["--policy", str(root / "lwm"), "--text-weight", "0.01"]
    if kind != "lwm":
        options = ["--backbone", f"hf:{root / 'vlm'}", "--lora-rank", "2"]
    one_losses, one = pretrained(root, tmp_path / "one", 1, *options)
    two_losses, two = pretrained(root, tmp_path / "two", 2, *options)
    assert len(one_losses) == 3 and two_losses == pytest.approx(one_losses, abs=1e-5)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3)
    if kind != "lwm":
        before = load_file(root / "vlm" / "model.safetensors")
        name = next(name for name in before if name.endswith("embed_tokens.weight"))
        num_text = json.loads((tmp_path / "two" / "config.json").read_text())["policy"]["vocabulary"]["text"]
        assert torch.equal(two[name][:num_text], before[name][:num_text]), "the old rows are held"
        assert not torch.equal(two[name][num_text : num_text + 8], before[name][num_text : num_text + 8])
