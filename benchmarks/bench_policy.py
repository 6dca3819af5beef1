"""Compares the speed of a policy with that of its literal twin (literal_policy.py), in training and acting.

    OMP_NUM_THREADS=1 python benchmarks/bench_policy.py --config tiny 100m --out policy.json
    python benchmarks/bench_policy.py --config 7b --weights bf16 --optimizer adamw8bit --models ours --out policy.json

tiny and 100m are the backbone `tiny`; 0.5b, 2b and 7b are the backbone `lwm`, Llamas with random weights over the 256
codes of an image, with the paper's prompt lengthened to --sequence tokens. 7b has the sizes of LAPA-7B. Data are made
up. Training is a whole optimizer step on a batch in memory: forward, backward, clipping, AdamW. Acting is all of
`Policy.infer`, from uint8 images in NumPy to numbers in the robot's units: one action by `bins`, --chunk actions by
`chunk` and `flow`. Figures are medians, after two rounds that do not count. On a CPU the models take turns, so that
noise of the machine affects all; on a GPU only one is in memory at a time, so that its peak memory can be measured.

Useful arithmetic, as in PaLM's appendix B: 2 FLOP for each weight of a layer and each position, and attention in full,
three times that for a training step, and that of the vision part by torch's counter; recomputation does not count. It
is reported as a share of the rate of a large matrix product in the same precision, measured in turns with the rest, and
on a GPU as a share of --peak-tflops. The floor of acting is, for each pass through the language model, the larger of
two times: that arithmetic at that rate, and reading its weights at the bandwidth of a large matrix-vector product.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import transformers
import tyro
from bench_latent import alternate
from literal_policy import LiteralPolicy
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lapa.data.dataset import ActionSpace
from lapa.engine.config import OptimConfig
from lapa.engine.distributed import pick_device
from lapa.engine.optim import build_optimizer
from lapa.files import write_json
from lapa.policy.actions import ActionBins, ActionScale, KeyedSpace, Statistics
from lapa.policy.backbones import renew_backbone
from lapa.policy.backbones.base import PrefixBackbone
from lapa.policy.backbones.tiny import TinyProcessor, train_tokenizer
from lapa.policy.config import BackboneConfig, HeadKind, LwmConfig, TinyConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.prompts import PROMPTS, Prompts
from lapa.policy.runtime import Policy
from lapa.policy.vocabulary import Vocabulary
from lapa.released.lwm import LwmBackbone, LwmProcessor
from lapa.released.vqgan import VQGAN
from lapa.types import Observation

SIZES: dict[str, BackboneConfig] = {
    "debug": TinyConfig(image_size=32, vision_widths=(16, 32), width=64, layers=2, heads=2),
    "tiny": TinyConfig(),
    "100m": TinyConfig(
        image_size=128, vision_widths=(64, 128, 256, 512), vision_depth=2, width=768, layers=12, heads=12
    ),
    "0.5b": LwmConfig(width=1024, inner_width=4096, layers=24, heads=16),
    "2b": LwmConfig(width=2048, inner_width=8192, layers=28, heads=16),
    "7b": LwmConfig(),
}
# Samples of an optimizer step, by size: on a CPU, on a GPU.
BATCHES = {"debug": (4, 32), "tiny": (32, 256), "100m": (8, 64), "0.5b": (1, 64), "2b": (1, 32), "7b": (1, 16)}
INSTRUCTIONS = ("open the drawer", "press the button from above", "push the puck to the green goal")
TAGS = ("<vision>", "</vision>", "<delta>", "</delta>", "<action>", "</action>")
HEADS = ("bins", "chunk", "flow")
CAMERA = "camera"
LATENT_LENGTH, CODEBOOK, BINS, TEXT_ROWS = 16, 8, 256, 32000
H100_BF16_TFLOPS = 989.0
# Sides of the matrices for the matrix product, and for the product with a vector, which must not fit into a cache.
MATRICES = {"cpu": (1024, 4096), "cuda": (8192, 16384)}
Use = Literal["training", "acting"]
COLUMNS = """
| | head | model | batch | ms | samples/s | of the matrix rate | of the peak | floor, ms | peak GiB |
|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class BenchConfig:
    """Measure policies."""

    configs: Annotated[
        tuple[Literal["debug", "tiny", "100m", "0.5b", "2b", "7b"], ...], tyro.conf.arg(name="config")
    ] = ("tiny", "100m")
    """Sizes to measure, one after the other; debug: to try this script."""
    models: tuple[Literal["literal", "ours", "compiled"], ...] = ("literal", "ours")
    """literal: the slow twin; ours: as users get it; compiled: ours with `compile_steps`, for the head `bins`."""
    trains: tuple[Literal["latent", "bins", "chunk", "flow"], ...] = ("latent",)
    """Targets of a training step: latent actions, or robot actions by one of the heads."""
    heads: tuple[HeadKind, ...] = ("bins", "chunk", "flow")
    """Heads by which policies act."""
    batch_size: int | None = None
    """Samples of an optimizer step; by default depending on the size."""
    acting_batches: tuple[int, ...] = (1, 8, 32)
    """Batch sizes of observations. The twin acts on the first only: the rest would take minutes."""
    action_dim: int = 7
    chunk: int = 8
    """Time steps that `chunk` and `flow` predict at once."""
    bins_chunk: int = 1
    """Time steps that `bins` predicts."""
    sequence: int = 384
    """Positions of a training sequence of 0.5b, 2b and 7b; 384 in the paper."""
    weights: Literal["auto", "fp32", "bf16"] = "auto"
    """Weights in training: fp32 or bf16, on a GPU with bf16 autocast. auto: bf16 for 0.5b, 2b and 7b on a GPU.
    Policies act in bf16 on a GPU, in fp32 on a CPU."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the training step's forward and backward."""
    repeats: int = 10
    """Measured rounds, after two for warming up."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    peak_tflops: float = H100_BF16_TFLOPS
    """The GPU's nominal rate; by default that of an H100 or H200 in bf16."""
    out: Path | None = None
    """JSON of all measurements, written after each row."""


@dataclass(frozen=True)
class Row:
    """One measurement: `samples` in `seconds`, and the rates of the machine at that time."""

    config: str
    use: Use
    head: str
    model: str
    samples: int
    seconds: float | None = None
    passes: tuple[float, ...] = ()
    """Useful arithmetic in FLOP of each pass through the language model; of a training step in one sum."""
    weight_bytes: int = 0
    """Bytes of the weights that each of these passes reads."""
    matrix_flops: float = 0.0
    """FLOP a second of a large matrix product."""
    bandwidth: float = 0.0
    """Bytes a second that a large matrix-vector product reads."""
    gib: float | None = None
    """Peak of the GPU's memory in GiB."""
    failed: str | None = None

    @property
    def floor(self) -> float:
        """The least possible seconds of acting."""
        return sum(max(flops / self.matrix_flops, self.weight_bytes / self.bandwidth) for flops in self.passes)


@dataclass(frozen=True)
class Bench:
    """A policy for each head, all with one backbone, and their instruction. `latent` trains, and does not act."""

    name: str
    policies: dict[str, Policy]
    instruction: str
    device: torch.device

    @property
    def backbone(self) -> PrefixBackbone:
        backbone = self.policies["latent"].model.backbone
        assert isinstance(backbone, PrefixBackbone)
        return backbone

    def positions(self, head: str) -> int:
        """Returns the positions of a training sequence; in acting, of the observation and the predicted tokens."""
        config = self.policies[head].model.config
        predicted = {
            "latent": len(config.latent_opening) + LATENT_LENGTH + len(config.latent_closing) - 1,
            "bins": len(config.action_opening) + config.chunk * config.action_dim - 1,
            "chunk": len(config.action_opening) + config.chunk,
            "flow": len(config.action_opening),
        }[head]
        with torch.no_grad():
            return predicted + self.backbone.prefix(self.batch(head, 1))[0].shape[1]

    def observations(self, count: int) -> list[Observation]:
        rng, side = np.random.default_rng(0), self.backbone.config.image_size
        images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        return [Observation({CAMERA: image}, self.instruction) for image in images]

    def batch(self, head: str, count: int) -> dict[str, Tensor]:
        """Returns a training batch on the device."""
        policy, rng = self.policies[head], np.random.default_rng(1)
        chunk, items = policy.chunk, []
        for number, seen in enumerate(self.observations(count)):
            item: dict[str, Any] = {
                "images": seen.images,
                "instruction": seen.instruction,
                "dataset": None,
                "index": number,
            }
            if head == "latent":
                item |= {"codes_L": rng.integers(0, CODEBOOK, LATENT_LENGTH), "has_codes": True}
            else:
                item |= {"actions_KA": _actions(rng, chunk, policy.action_dim), "action_mask_K": np.ones(chunk, bool)}
            items.append(item)
        return {name: value.to(self.device) for name, value in policy.collate(items).items()}


@dataclass
class Results:
    """All measurements. Each row is printed and written at once, so that a killed run keeps its rows."""

    about: dict[str, Any]
    out: Path | None
    peak_tflops: float | None
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(_cells(row, self.peak_tflops), flush=True)
        if self.out is not None:
            write_json(self.out, {**self.about, "rows": [asdict(row) for row in self.rows]})

    @contextmanager
    def failure_as_row(self, row: Row) -> Iterator[None]:
        """Turns a failure (out of memory, or in compiling) into a row with the reason."""
        try:
            yield
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            reason = "out of memory" if out_of_memory else (str(error).splitlines() or [type(error).__name__])[0]
            self.add(replace(row, failed=reason))


def main(config: BenchConfig) -> None:
    device = pick_device(config.device)
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\n{time.strftime('%Y-%m-%d')}, {where}, {versions}")
    options = {key: value for key, value in asdict(config).items() if key != "out"}
    about = {"device": where, "versions": versions, "options": options}
    results = Results(about, config.out, config.peak_tflops if on_gpu else None)
    for name in config.configs:
        # A failure keeps the rows before it, and the next size is measured.
        with results.failure_as_row(Row(name, "training", "-", "-", 0)):
            measure(name, config, device, results)
        measured = [row for row in results.rows if row.config == name and row.seconds]
        if measured:
            flops, bandwidth = (
                statistics.median(getattr(row, rate) for row in measured) for rate in ("matrix_flops", "bandwidth")
            )
            print(f"\nmedians: matrix product {flops / 1e12:.3g} TFLOP/s, reading {bandwidth / 1e9:.3g} GB/s")


def measure(name: str, config: BenchConfig, device: torch.device, results: Results) -> None:
    """Measures one size with all models, in training and acting."""
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    automatic = "bf16" if on_gpu and isinstance(SIZES[name], LwmConfig) else "fp32"
    weights = automatic if config.weights == "auto" else config.weights
    bench = build(name, config, device, torch.bfloat16 if weights == "bf16" else torch.float32)
    language, vision = (
        sum(p.numel() for p in part.parameters()) for part in (bench.backbone.language, bench.backbone.vision)
    )
    print(
        f"\n{name}: language {language / 1e6:,.1f}M, vision {vision / 1e6:,.1f}M parameters; positions of a "
        f"sequence: {', '.join(f'{bench.positions(head)} ({head})' for head in ('latent', *HEADS))}; weights in "
        f"training: {weights}"
    )
    print(COLUMNS)
    literal = "literal" in config.models
    twin = LiteralPolicy(bench.policies["latent"].model) if literal and not on_gpu else None
    if "ours" in config.models:
        measure_training(bench, config, twin, results)
    bench.backbone.zero_grad(set_to_none=True)
    for policy in bench.policies.values():
        policy.model.to(torch.bfloat16 if on_gpu else torch.float32).eval()
    measure_acting(bench, config, twin, results)
    if literal and on_gpu:
        measure_twin_alone(bench, config, torch.bfloat16 if weights == "bf16" else torch.float32, results)


def build(name: str, config: BenchConfig, device: torch.device, dtype: torch.dtype) -> Bench:
    """Builds policies with random weights, made on the device in their precision."""
    sizes = SIZES[name]
    actions_NA = _actions(np.random.default_rng(0), 5000, config.action_dim)
    bins, scale = ActionBins.fit(actions_NA, BINS), ActionScale.fit(actions_NA)
    prompts = Prompts(PROMPTS["paper"]) if isinstance(sizes, LwmConfig) else Prompts()
    tokenizer = train_tokenizer([*(prompts.text(words) for words in INSTRUCTIONS), *TAGS])
    segments = {"latent": CODEBOOK, "bins": BINS, "query": config.chunk}
    processor: TinyProcessor | LwmProcessor
    if isinstance(sizes, LwmConfig):
        vocabulary = Vocabulary(TEXT_ROWS, sizes.vision_rows, **segments)
        processor = LwmProcessor(tokenizer, sizes, vocabulary.rows("vision").start)
    else:
        assert isinstance(sizes, TinyConfig)
        vocabulary = Vocabulary(len(tokenizer), **segments)
        processor = TinyProcessor(tokenizer, sizes.image_size)
    with _created_on(device, dtype):
        backbone = renew_backbone(sizes, vocabulary, num_cameras=1)
    if isinstance(backbone, LwmBackbone):
        # The VQGAN is always float32, but would otherwise be made in the precision of the rest.
        with _created_on(device, torch.float32):
            backbone.vqgan = VQGAN(backbone.config.vqgan).eval()
    opening, closing = processor.tags("latent")
    shared = PolicyConfig(
        vocabulary=vocabulary,
        cameras=(CAMERA,),
        backbone=sizes,
        prompts=prompts,
        latent_length=LATENT_LENGTH,
        latent_opening=opening,
        latent_closing=closing,
        action_opening=processor.tags("bins")[0],
        spaces=(KeyedSpace("robot", ActionSpace.named([f"action_{number}" for number in range(config.action_dim)])),),
        action_bins=tuple(bins.counts_A.tolist()),
        chunk=config.bins_chunk,
    )
    policies = {}
    for head in HEADS:
        of_head = shared if head == "bins" else replace(shared, head=head, action_bins=(), chunk=config.chunk)
        with _created_on(device, dtype):
            model = LatentPolicy(of_head, backbone)
        statistics = {"robot": Statistics(bins if head == "bins" else scale)}
        policies[head] = Policy(model, processor, statistics).to(str(device))
    policies["latent"] = policies["bins"]
    words = INSTRUCTIONS[0]
    if isinstance(sizes, LwmConfig):
        room = config.sequence - len(opening) - LATENT_LENGTH - len(closing) + 1
        words = _lengthened(words, lambda longer: processor.tokens(prompts.text(longer), 1), room)
    return Bench(name, policies, words, device)


def measure_training(bench: Bench, config: BenchConfig, twin: LiteralPolicy | None, results: Results) -> None:
    """Measures optimizer steps of ours and, in turns, of the twin, which only has the heads of the vocabulary."""
    samples = config.batch_size or BATCHES[bench.name][bench.device.type == "cuda"]
    for head in config.trains:
        row = Row(bench.name, "training", head, "ours", samples)
        with results.failure_as_row(row):
            model = bench.policies[head].model
            row = replace(row, passes=(samples * training_flops(bench, head),))
            batch, works = bench.batch(head, samples), {"ours": training_step(model, config, bench.device)}
            if twin is not None and head in ("latent", "bins"):
                works["literal"] = twin_step(twin, model, head, bench.device)
            timed(row, {name: partial(work, batch) for name, work in works.items()}, config, bench.device, results)


def measure_acting(bench: Bench, config: BenchConfig, twin: LiteralPolicy | None, results: Results) -> None:
    """Measures acting, from images to actions: first eager, in turns with the twin, then compiled."""
    for model in ("ours", "compiled"):
        if model not in config.models:
            continue
        if model == "compiled":
            bench.backbone.compile_steps()
        for head in config.heads if model == "ours" else ("bins",):
            for samples in config.acting_batches:
                row = Row(bench.name, "acting", head, model, samples)
                with results.failure_as_row(row):
                    policy, observations = bench.policies[head], bench.observations(samples)
                    works: dict[str, Callable[[], object]] = {model: partial(policy.infer, observations)}
                    if twin is not None and (model, head, samples) == ("ours", "bins", config.acting_batches[0]):
                        works["literal"] = partial(act_literally, twin, policy, observations)
                    timed(acting_floor(bench, row), works, config, bench.device, results)


def measure_twin_alone(bench: Bench, config: BenchConfig, weights: torch.dtype, results: Results) -> None:
    """Measures the twin on a GPU, after ours."""
    policy, samples = bench.policies["bins"], config.batch_size or BATCHES[bench.name][1]
    acting = acting_floor(bench, Row(bench.name, "acting", "bins", "literal", config.acting_batches[0]))
    training = Row(bench.name, "training", "latent", "literal", samples)
    training = replace(training, passes=(samples * training_flops(bench, "latent"),))
    observations, batch = bench.observations(acting.samples), bench.batch("latent", samples)
    twin = LiteralPolicy(policy.model)
    # This frees the memory of ours: the twin needs only its config and its processor.
    bench.backbone.language.to("meta")
    with results.failure_as_row(acting):
        works = {"literal": partial(act_literally, twin, policy, observations)}
        timed(acting, works, config, bench.device, results)
    with results.failure_as_row(training):
        step = twin_step(twin.to(weights), policy.model, "latent", bench.device)
        timed(training, {"literal": partial(step, batch)}, config, bench.device, results)


def training_step(
    model: LatentPolicy, config: BenchConfig, device: torch.device
) -> Callable[[Mapping[str, Tensor]], None]:
    """Returns an optimizer step like the training loop's. The image tokenizer stays frozen, as in the paper."""
    model.train()
    model.freeze(vision=isinstance(model.backbone, LwmBackbone))
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    optimizer = build_optimizer(model, OptimConfig(optimizer=config.optimizer))
    stepped = torch.compile(model) if config.compile else model

    def step(batch: Mapping[str, Tensor]) -> None:
        with _autocast(model, device):
            loss = stepped(batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OptimConfig().clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def twin_step(
    twin: LiteralPolicy, model: LatentPolicy, head: str, device: torch.device
) -> Callable[[Mapping[str, Tensor]], None]:
    """Returns the same for the twin, which updates one parameter after the other."""
    optimizer = torch.optim.AdamW(twin.parameters(), lr=OptimConfig().lr, foreach=False, fused=False)

    def step(batch: Mapping[str, Tensor]) -> None:
        target = model.latent_field if head == "latent" else model.action_field
        tokens_BF = batch["latent_BL"] if head == "latent" else batch["action_BKA"].flatten(1)
        with _autocast(twin, device):
            loss = twin(batch, target, tokens_BF)
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), OptimConfig().clip, foreach=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def act_literally(twin: LiteralPolicy, policy: Policy, observations: Sequence[Observation]) -> np.ndarray:
    """Does what `Policy.infer` does, with the twin instead of the model."""
    batch = policy.batch(policy.checked(observations))
    tokens_BF = twin.act(batch, policy.model.action_field)
    bins_BKA = policy.model.config.vocabulary.codes("bins", tokens_BF).view(len(tokens_BF), -1, policy.action_dim)
    return policy.decode(bins_BKA.cpu().numpy())


def training_flops(bench: Bench, head: str) -> float:
    """Returns the useful arithmetic of a training step, in FLOP for each sample."""
    frozen = not any(parameter.requires_grad for parameter in bench.backbone.vision.parameters())
    return 3 * forward_flops(bench, bench.positions(head)) - frozen * 2 * _vision_flops(bench)


def forward_flops(bench: Bench, positions: int) -> float:
    """Returns the useful arithmetic of a forward pass with one image and this many positions, in FLOP."""
    return _vision_flops(bench) + _language_flops(bench, 0, positions)


def acting_floor(bench: Bench, row: Row) -> Row:
    """Returns the row with its passes through the language model: the observation, then each token but the last."""
    config = bench.policies[row.head].model.config
    tokens = config.chunk * config.action_dim if row.head == "bins" else 1
    last = bench.positions(row.head)
    first = last - tokens + 1
    passes = [forward_flops(bench, first)]
    passes += [_language_flops(bench, position, 1) for position in range(first, last)]
    weights = [p for block in bench.backbone.language.model.layers for p in block.parameters()]
    return replace(
        row,
        passes=tuple(row.samples * flops for flops in passes),
        weight_bytes=sum(p.numel() * p.element_size() for p in weights),
    )


def timed(
    row: Row, works: Mapping[str, Callable[[], object]], config: BenchConfig, device: torch.device, results: Results
) -> None:
    """Adds the row of each model: median seconds, in turns with the matrix products, and the peak of GPU memory."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    multiplied, read = (torch.randn(side, side, device=device, dtype=dtype) for side in MATRICES[device.type])
    probes: dict[str, Callable[[], object]] = {
        "product": lambda: multiplied @ multiplied,
        "reading": lambda: read @ read[0],
    }
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    medians = alternate({**works, **probes}, config.repeats, device)
    seconds = {name: by_clock for name, (by_clock, _) in medians.items()}
    gib = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    rates = {
        "matrix_flops": 2 * len(multiplied) ** 3 / seconds["product"],
        "bandwidth": read.numel() * read.element_size() / seconds["reading"],
    }
    for model in works:
        results.add(replace(row, model=model, seconds=seconds[model], gib=gib, **rates))


def _cells(row: Row, peak_tflops: float | None) -> str:
    """Returns the row in the columns of `COLUMNS`."""
    start = f"| {row.use} | {row.head} | {row.model} | {row.samples} |"
    if row.seconds is None:
        return f"{start} {row.failed} |" + " |" * 5
    achieved, training = sum(row.passes) / row.seconds, row.use == "training"
    share = f"{achieved / row.matrix_flops:.0%}" if training else "-"
    of_peak = f"{achieved / peak_tflops / 1e12:.0%}" if training and peak_tflops else "-"
    floor, memory = "-" if training else f"{1e3 * row.floor:.3g}", f"{row.gib:.1f}" if row.gib else "-"
    speed = f"{1e3 * row.seconds:.4g} | {row.samples / row.seconds:.3g}"
    return f"{start} {speed} | {share} | {of_peak} | {floor} | {memory} |"


@contextmanager
def _created_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _autocast(model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """Returns the autocast of the training loop: bf16 on a GPU, and wherever weights are bf16."""
    half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return torch.autocast(device.type, torch.bfloat16, enabled=half or device.type == "cuda")


def _language_flops(bench: Bench, before: int, positions: int) -> float:
    """Returns the FLOP of the layers' matrices, and of full attention of `positions` to themselves and those before."""
    config, layers = bench.backbone.language.config, bench.backbone.language.model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    attention = 4 * positions * (before + positions) * config.hidden_size * len(layers)
    return float(2 * weights * positions + attention)


def _vision_flops(bench: Bench) -> float:
    """Returns the FLOP of the vision part for one image."""
    batch = bench.batch("bins", 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bench.backbone.prefix(batch)
    return float(counter.get_total_flops())


def _lengthened(words: str, tokens: Callable[[str], list[int]], length: int) -> str:
    """Returns the words, lengthened until the prompt with them has at least `length` tokens."""
    longer = words
    while len(tokens(longer)) < length:
        longer += " the"
    return longer


def _actions(rng: np.random.Generator, count: int, action_dim: int) -> np.ndarray:
    return rng.normal(size=(count, action_dim)).clip(-1, 1).astype(np.float32)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))
