"""How fast the policy trains and acts: samples/s of an optimiser step, and the latency of one chunk of actions.

    python benchmarks/bench_policy.py                          # the preset tiny, on the GPU if there is one
    python benchmarks/bench_policy.py --image-size 96 --width 192 --heads 6

The batch is made up and lies in memory, so this is the model alone; the data reader has bench_data.py. The decoding's
literal twin, a full forward for each token, is measured in the same process. Medians; `peak` is the share of the
machine's matrix product rate, measured here, that the training step's matrix products and convolutions reach.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from lapa.engine.distributed import pick_device
from lapa.engine.optim import OptimConfig, build_optimizer
from lapa.policy.actions import ActionBins
from lapa.policy.backbones import BackboneConfig, TinyConfig
from lapa.policy.checkpoint import PolicyParts
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import Policy
from lapa.policy.tokenizer import train_tokenizer
from lapa.policy.vocabulary import Vocabulary
from lapa.types import Observation

INSTRUCTIONS = ["open the drawer", "press the button from above", "push the puck to the green goal"]


@dataclass(frozen=True)
class BenchConfig:
    """Measure a policy's speed."""

    backbone: Annotated[BackboneConfig, tyro.conf.arg(name="")] = field(default_factory=TinyConfig)
    batch_size: int = 32
    chunk: int = 5
    action_dim: int = 4
    repeats: int = 15
    literal_repeats: int = 3
    device: str = "auto"


def main(config: BenchConfig) -> None:
    torch.manual_seed(0)
    device, rng = pick_device(config.device), np.random.default_rng(0)
    actions = rng.normal(size=(5000, config.action_dim)).clip(-1, 1)
    bins, tokenizer = ActionBins.fit(actions), train_tokenizer(INSTRUCTIONS)
    vocabulary = Vocabulary(text=len(tokenizer), latent=8)
    pretrained = LatentPolicy(PolicyConfig(vocabulary, ("corner4",), config.backbone, latent_length=4))
    model = pretrained.with_actions(bins.counts_A.tolist(), config.chunk, ("corner4",))
    policy = Policy(PolicyParts(model, tokenizer, bins), device)
    batch = _made_up_batch(policy, config, rng)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}; {parameters:,} parameters; {config}")

    model.train()
    optimizer = build_optimizer(model, OptimConfig())

    def training_step() -> None:
        model(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as flops:
        training_step()
    seconds = _median_seconds(training_step, config.repeats, device)
    share = flops.get_total_flops() / seconds / _matmul_rate(device)
    print(f"training: {config.batch_size / seconds:.0f} samples/s ({1e3 * seconds:.0f} ms/step, {share:.0%} of peak)")
    model.eval()
    for size in (1, 16):
        observations = [_observation(rng, number) for number in range(size)]
        seconds = _median_seconds(partial(policy.infer, observations), config.repeats, device)
        seen = policy.inputs.observed([list(o.images.values()) for o in observations], INSTRUCTIONS[:1] * size)
        literal = _median_seconds(partial(_decode_literally, policy, seen), config.literal_repeats, device)
        print(
            f"acting, batch {size}: {1e3 * seconds:.0f} ms from pictures to {config.chunk} x {config.action_dim} "
            f"actions ({size / seconds:.0f} chunks/s); without cache {1e3 * literal:.0f} ms"
        )


def _observation(rng: np.random.Generator, number: int) -> Observation:
    image_HWC = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    return Observation({"corner4": image_HWC}, INSTRUCTIONS[number % len(INSTRUCTIONS)])


def _made_up_batch(policy: Policy, config: BenchConfig, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    items = []
    for number in range(config.batch_size):
        observation = _observation(rng, number)
        actions_KA = rng.normal(size=(config.chunk, config.action_dim)).astype(np.float32)
        mask_K = np.ones(config.chunk, bool)
        seen = {"images": observation.images, "instruction": observation.instruction, "index": number}
        items.append({**seen, "actions_KA": actions_KA, "action_mask_K": mask_K})
    return {name: value.to(policy.device) for name, value in policy.inputs.collate(items).items()}


@torch.no_grad()
def _decode_literally(policy: Policy, batch: dict[str, torch.Tensor]) -> None:
    model, rows = policy.model, policy.model.config.vocabulary.rows("bins")
    seen = {name: value.to(policy.device) for name, value in batch.items()}
    shape = (len(seen["tokens_BT"]), model.action_field.length)
    tokens_BF = torch.full(shape, rows.start, device=policy.device)
    for step in range(model.action_field.length):
        tokens_BF[:, step] = rows.start + model.field_logits(seen, model.action_field, tokens_BF)[:, step].argmax(-1)


def _median_seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def _matmul_rate(device: torch.device, size: int = 2048) -> float:
    """Floating point operations a second of a large fp32 matrix product."""
    square = torch.randn(size, size, device=device)
    return 2 * size**3 / _median_seconds(lambda: square @ square, 8, device)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))
