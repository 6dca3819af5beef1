"""The training loop of every stage, one function that reads from top to bottom.

A stage gives a model whose `forward(batch)` is its loss, a dataset and an optional evaluation; the loop adds devices,
precision, accumulation, the schedule, metrics, checkpoints and a clean stop.

    lapa latent train --preset debug --data DATASET --out LAM
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lapa.console import progress, say
from lapa.engine.batches import StepSampler, batch_loader
from lapa.engine.checkpoint import (
    SHARDED,
    SINGLE,
    THREADS,
    TRAINING,
    RunState,
    load_checkpoint,
    random_state,
    resumable,
    save_checkpoint,
    seed_everything,
)
from lapa.engine.config import LoopConfig
from lapa.engine.distributed import Processes, pick_device, start
from lapa.engine.memory import GIB, explained_out_of_memory, require_memory, training_bytes
from lapa.engine.metrics import MetricLog
from lapa.engine.optim import build_optimizer, learning_rate, set_learning_rate
from lapa.engine.sharding import gather, load_sharded, prepare_moments, reshard, save_sharded, shard
from lapa.engine.trackers import Tracker, require_tracker
from lapa.errors import UserError
from lapa.types import Losses, TrainableModel, TrainingDataset

Value = TypeVar("Value")

# Parameters below which a second thread costs more than it gives on a busy machine, and gives little on an idle one.
SMALL = 3_000_000


def _named(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


@dataclass(frozen=True)
class TrainResult:
    """metrics: the last evaluation and speed. finished: False where `stop_after` ended the run early."""

    metrics: dict[str, float]
    finished: bool
    step: int


def train(
    model: TrainableModel,
    dataset: TrainingDataset,
    collate: Callable[[list[Any]], dict[str, Any]],
    config: LoopConfig,
    out: Path,
    *,
    run_config: dict[str, Any],
    description: str,
    resume: bool = False,
    prepare: Callable[[nn.Module], None] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    draw: Callable[[nn.Module], Mapping[str, Image.Image]] | None = None,
    summary: Callable[[Mapping[str, float]], str] = _named,
) -> TrainResult:
    """Trains `model` in place, keeping its state in `out/training`.

    collate: makes a batch, a dictionary with `index`, of a list of samples.
    run_config: the resolved config, as plain values; a checkpoint resumes only under the same one, with as many steps
    or more. The last checkpoint stays, so that a finished run can be resumed with more steps.
    description: what is trained, for messages.
    prepare: data-dependent initialisation, called on the device at the start of a new run.
    evaluate: called in eval mode without gradients every `eval_every` steps and at the end, on the main process;
    with `shard` on all of them, with a sharded copy of the model. With `shard`, `model` has the trained weights in the
    main process in the end, on the CPU, and none in the others.
    draw: images for the tracker, by name; called after each evaluation, as `evaluate` is, where there is a tracker.
    summary: the figures of an evaluation as a line of the log.
    Raises FloatingPointError naming the samples where the loss or its gradient is not finite, UserError where a
    checkpoint does not fit or memory is too small, KeyboardInterrupt after a signal, once the checkpoint is written.
    """
    _require_sense(config)
    half = _uses_half(config, pick_device(config.device))
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    with (
        start(config.device, alone=config.shard) as processes,
        _threads_for(model, processes.device),
        _stop_signals() as stop_asked,
        explained_out_of_memory(_less_memory(config, batches=True)),
    ):
        device, state = processes.device, out / TRAINING
        checkpoint = state / (SHARDED if config.shard else SINGLE)
        resuming = resume and resumable(state, shard=config.shard)
        seed_everything(config.seed)
        _require_room(model, config, processes, description, half=half)
        _cast(model, config.weights)
        if prepare is not None and not resuming:
            prepare(model.to(device))
        plain = model
        if config.shard:
            model = shard(model, processes, half=half, compile=config.compile)
        model.to(device)
        ema = _averaged(model, config.ema_decay)
        optimizer = build_optimizer(model, config.optim)
        if config.shard:
            prepare_moments(model, optimizer)
        autocast = _autocast(device) if half else nullcontext
        run = RunState(model, ema, optimizer, run_config)
        first_step = 0
        if resuming:
            load = load_sharded if config.shard else load_checkpoint
            first_step = load(checkpoint, run, rank=processes.rank, world=processes.world)
            say(f"resuming at step {first_step} of {config.steps}, with the learning rate of this number of steps")
        if processes.world > 1 and first_step == 0:
            # Each process draws its own noise, whatever they share.
            torch.manual_seed(config.seed + processes.rank)
        last_step = min(config.steps, config.stop_after or config.steps)
        sampler = StepSampler(
            len(dataset), config.batch_size, seed=config.seed, first_step=first_step, last_step=last_step,
            accumulate=config.accumulate, rank=processes.rank, world=processes.world,
            groups=dataset.groups,
        )  # fmt: skip
        # Samples that are in memory already need no processes to read them.
        needs_workers = device.type == "cuda" and not dataset.in_memory
        workers = config.workers if config.workers is not None else 4 * needs_workers
        loader = batch_loader(dataset, collate, sampler, workers=workers, pin_memory=device.type == "cuda")
        stepped = model if config.shard else processes.averaged(_compiled(model) if config.compile else model)
        tracker = Tracker(
            config.tracker if processes.is_main else None, state, out.resolve().name, run_config, first_step
        )
        log = MetricLog(state, first_step, tracker, enabled=processes.is_main)
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(
            f"{description}: {num_trained:,} trained parameters on {_device_name(device)}"
            f"{f' x {processes.world} processes' if processes.world > 1 else ''}, "
            f"{len(dataset):,} samples, {config.steps} steps of {config.batch_size}"
        )

        def save(step: int) -> None:
            random_states = processes.gather(random_state() | _threads(device))
            if config.shard:
                save_sharded(checkpoint, run, step, random_states)
            elif processes.is_main:
                save_checkpoint(checkpoint, run, step, random_states)

        def evaluated(step: int) -> dict[str, float]:
            # A sharded model runs in all processes or in none.
            if evaluate is None or not (processes.is_main or config.shard):
                return {}
            trained = ema.module if ema is not None else model
            figures = _evaluate(trained, evaluate, autocast)
            log.write(step, {f"eval/{name}": value for name, value in figures.items()})
            if draw is not None and config.tracker is not None:
                for name, image in _evaluate(trained, draw, autocast).items():
                    tracker.image(step, f"eval/{name}", image)
            return figures

        metrics: dict[str, float] = {}
        note = ""
        step, batches, saved_at = first_step, iter(loader), time.monotonic()
        window_started, window_steps = time.monotonic(), 0
        model.train()
        with progress() as bar:
            task = bar.add_task(description, total=config.steps, completed=first_step, note="")
            while step < last_step:
                rate = learning_rate(config.optim, step, config.steps)
                set_learning_rate(optimizer, rate)
                parts: dict[str, float] = {}
                for micro in range(config.accumulate):
                    batch = _to_device(next(batches), device)
                    with _gradient_sync(stepped, last=micro == config.accumulate - 1):
                        with autocast():
                            losses: Losses = stepped(batch)
                        loss = losses.loss
                        (loss / config.accumulate).backward()
                    _require_finite("loss", loss, batch, dataset, step)
                    if (step + 1) % config.log_every == 0 or step + 1 == last_step:
                        for name, value in {"loss": loss.detach(), **losses.parts}.items():
                            parts[name] = parts.get(name, 0.0) + float(value) / config.accumulate
                gradient_norm = _clip(model, config.optim.clip)
                _require_finite("gradient norm", gradient_norm, batch, dataset, step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if ema is not None:
                    ema.update_parameters(model)
                step += 1
                window_steps += 1

                if parts:
                    parts = processes.mean(parts)
                    speed = window_steps / (time.monotonic() - window_started)
                    peak = _peak_memory(device)
                    log.write(
                        step, {**parts, "lr": rate, "gradient_norm": float(gradient_norm), "steps_per_s": speed, **peak}
                    )
                    note = f"loss {parts['loss']:.4f}  {speed * config.batch_size:.0f} samples/s"
                    bar.update(task, note=note)
                    metrics.update(train_loss=parts["loss"], samples_per_s=speed * config.batch_size, **peak)
                    window_started, window_steps = time.monotonic(), 0
                bar.update(task, completed=step)
                stopping = processes.any(stop_asked.is_set())
                if evaluate is not None and step % config.eval_every == 0 and step < config.steps and not stopping:
                    bar.update(task, note="validation")
                    if figures := evaluated(step):
                        say(f"step {step}, {summary(figures)}")
                    bar.update(task, note=note)
                    window_started, window_steps = time.monotonic(), 0
                minutes_up = processes.any(time.monotonic() - saved_at > 60 * config.save_every_minutes)
                if stopping or minutes_up or step % config.save_every_steps == 0 or step == last_step:
                    save(step)
                    saved_at = time.monotonic()
                if stopping:
                    break

        finished = step >= config.steps
        if finished:
            metrics.update(evaluated(step))
            if ema is not None:
                model.load_state_dict(ema.module.state_dict())
        else:
            say(f"stopped after step {step} of {config.steps} with a checkpoint; go on with --resume")
        log.close()
        model.eval()
        if stop_asked.is_set() and not finished:
            raise KeyboardInterrupt
        if config.shard:
            gather(model, into=plain, keep=processes.is_main)
        return TrainResult(metrics, finished, step)


@contextmanager
def _threads_for(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While a small model is trained on a CPU, torch has one thread, unless OMP_NUM_THREADS gives another number.

    A resumed run goes on with the number of its checkpoint: another number sums in another order.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and THREADS not in os.environ and sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads(device: torch.device) -> dict[str, int]:
    """The number of threads of this process, where results depend on it."""
    return {"threads": torch.get_num_threads()} if device.type == "cpu" else {}


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, for a checkpoint and a clean end; a second SIGINT ends the loop at once."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        say(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint")

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _averaged(model: nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def _autocast(device: torch.device) -> Callable[[], Any]:
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def _require_sense(config: LoopConfig) -> None:
    require_tracker(config.tracker)
    # torchao 0.18 takes the moments of sharded bf16 weights for bf16, and fails at the first step.
    eight_bits = config.weights == "bf16" and config.optim.optimizer == "adamw8bit"
    excluded = {
        "--weights bf16 does not go with --precision fp32": config.weights == "bf16" and config.precision == "fp32",
        "--shard does not go with --optimizer muon": config.shard and config.optim.optimizer == "muon",
        "--shard does not go with --ema-decay": config.shard and config.ema_decay is not None,
        "--shard does not go with --optimizer adamw8bit and --weights bf16 at once": config.shard and eight_bits,
    }
    for what, asked in excluded.items():
        if asked:
            raise UserError(f"{what}: leave out one of them")


def _uses_half(config: LoopConfig, device: torch.device) -> bool:
    automatic = device.type == "cuda" or config.weights == "bf16"
    return config.precision == "bf16" or (config.precision == "auto" and automatic)


def _cast(model: TrainableModel, weights: str) -> None:
    """Casts all weights but those of `model.full_precision()`; buffers (angles, counts) stay as they are.

    Frozen weights too: models of transformers cast their inputs to the precision of their first weight.
    """
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    kept = {id(p) for module in model.full_precision() for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _require_room(model: nn.Module, config: LoopConfig, processes: Processes, what: str, *, half: bool) -> None:
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    needed = training_bytes(
        sum(p.numel() for p in parameters),
        trained,
        config.weights,
        config.optim.optimizer,
        autocast=half,
        ema=config.ema_decay is not None,
        shards=processes.world if config.shard else 1,
    )
    if processes.device.type == "cpu":
        needed -= sum(p.numel() * p.element_size() for p in parameters)
    require_memory(
        needed,
        processes.device,
        f"training the {trained:,} weights of the {what} (without activations)",
        _less_memory(config),
    )


def _less_memory(config: LoopConfig, *, batches: bool = False) -> list[str]:
    """Options not yet used that need less memory; batches: also those that need less for activations."""
    options = {
        "--gradient-checkpointing": batches and not config.gradient_checkpointing,
        f"--accumulate {2 * config.accumulate}": batches,
        "--optimizer adamw8bit": config.optim.optimizer == "adamw",
        "--weights bf16": config.weights == "fp32",
        "--shard over the GPUs of torchrun": not config.shard,
        "training fewer weights (LoRA)": True,
        "a smaller model": True,
    }
    return [option for option, helps in options.items() if helps]


def _clip(model: nn.Module, most: float) -> torch.Tensor:
    """Scales gradients down to this total norm; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _peak_memory(device: torch.device) -> dict[str, float]:
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / GIB} if device.type == "cuda" else {}


def _gradient_sync(model: nn.Module, *, last: bool) -> Any:
    """Gradients travel between processes only with the last micro-batch of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _require_finite(what: str, value: torch.Tensor, batch: dict[str, Any], dataset: TrainingDataset, step: int) -> None:
    if torch.isfinite(value):
        return
    samples = [dataset.describe(int(index)) for index in batch["index"]]
    raise FloatingPointError(
        f"the {what} of step {step + 1} is {value.item()}, with the samples: {'; '.join(samples)}. "
        "The last checkpoint is whole: lower --lr, or look at these samples"
    )


def _evaluate(model: nn.Module, evaluate: Callable[[nn.Module], Value], autocast: Callable[[], Any]) -> Value:
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast():
        values = evaluate(model)
    reshard(model)
    model.train(was_training)
    return values


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' * (threads > 1)})"
