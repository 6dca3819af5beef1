"""The training loop of every stage, read from top to bottom.

A stage brings a model whose `forward(batch)` is its loss, a map-style dataset and an optional evaluation;
the loop brings devices, precision, accumulation, the schedule, metrics, checkpoints and a clean way to stop.

    lapa latent train --preset debug --data DATASET --out LAM
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lapa.console import progress, say
from lapa.engine.batches import StepSampler, batch_loader
from lapa.engine.checkpoint import load_checkpoint, random_state, save_checkpoint, seed_everything
from lapa.engine.distributed import Processes, start
from lapa.engine.metrics import MetricLog
from lapa.engine.optim import OptimConfig, build_optimizer, learning_rate
from lapa.types import Losses


@dataclass(frozen=True)
class LoopConfig:
    """How long, how fast and where to train."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Samples of one optimiser step, over all processes and accumulations."""
    accumulate: int = 1
    """Micro-batches whose gradients are added up before one optimiser step."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)
    ema_decay: float | None = None
    """Average the weights with this decay and keep the average in the end."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    compile: bool = False
    """Compile the model with torch.compile."""
    workers: int | None = None
    """Processes that read data; by default none on a CPU, four for each GPU."""
    seed: int = 0
    log_every: int = 20
    eval_every: int = 500
    save_every_steps: int = 1000
    save_every_minutes: float = 5.0
    """A checkpoint is written at whichever comes first."""
    stop_after: int | None = None
    """Stop with a checkpoint after this many steps of the run; go on later with --resume."""


@dataclass(frozen=True)
class TrainResult:
    """metrics: the last evaluation and speed. finished: False where `stop_after` ended the run early."""

    metrics: dict[str, float]
    finished: bool
    step: int


def train(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    config: LoopConfig,
    out: Path,
    *,
    run_config: dict[str, Any],
    description: str,
    resume: bool = False,
    prepare: Callable[[nn.Module], None] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> TrainResult:
    """Trains `model` in place, keeping its state in `out/training`.

    prepare: data-dependent initialisation, on the device, only at the start of a new run.
    evaluate: called in eval mode without gradients every `eval_every` steps and at the end, on the main process.
    Raises FloatingPointError naming the samples where the loss or its gradient is not finite; ValueError where a
    checkpoint does not fit; KeyboardInterrupt after a signal, once the checkpoint is written.
    """
    with start(config.device) as processes, _stop_signals() as stop_asked:
        device, state = processes.device, out / "training"
        seed_everything(config.seed)
        model.to(device)
        ema = _averaged(model, config.ema_decay)
        optimizer = build_optimizer(model, config.optim)
        autocast = _autocast(config.precision, device)
        first_step = 0
        if resume and (state / "checkpoint.pt").exists():
            first_step = load_checkpoint(
                state / "checkpoint.pt",
                model=model,
                ema=ema,
                optimizer=optimizer,
                run_config=run_config,
                rank=processes.rank,
                world=processes.world,
            )
            say(f"resuming at step {first_step} of {config.steps}")
        elif prepare is not None:
            prepare(model)
            ema = _averaged(model, config.ema_decay)
        if processes.world > 1 and first_step == 0:
            # Each process draws its own noise, whatever they share.
            torch.manual_seed(config.seed + processes.rank)
        last_step = min(config.steps, config.stop_after or config.steps)
        sampler = StepSampler(
            len(dataset), config.batch_size, seed=config.seed, first_step=first_step, last_step=last_step,
            accumulate=config.accumulate, rank=processes.rank, world=processes.world,
        )  # fmt: skip
        # Samples that are in memory already need no processes to read them.
        needs_workers = device.type == "cuda" and not getattr(dataset, "in_memory", False)
        workers = config.workers if config.workers is not None else 4 * needs_workers
        loader = batch_loader(dataset, collate, sampler, workers=workers, pin_memory=device.type == "cuda")
        stepped = _parallel(model, processes, compile=config.compile)
        log = MetricLog(state, first_step, enabled=processes.is_main)
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(
            f"{description}: {num_trained:,} trained parameters on {_device_name(device)}"
            f"{f' x {processes.world} processes' if processes.world > 1 else ''}, "
            f"{len(dataset):,} samples, {config.steps} steps of {config.batch_size}"
        )

        def save(step: int) -> None:
            random_states = processes.gather(random_state())
            if processes.is_main:
                save_checkpoint(
                    state / "checkpoint.pt",
                    step=step,
                    model=model,
                    ema=ema,
                    optimizer=optimizer,
                    run_config=run_config,
                    random_states=random_states,
                )

        def evaluated() -> dict[str, float]:
            if evaluate is None or not processes.is_main:
                return {}
            return _evaluate(ema.module if ema is not None else model, evaluate, autocast)

        metrics: dict[str, float] = {}
        step, batches, saved_at = first_step, iter(loader), time.monotonic()
        window_started, window_steps = time.monotonic(), 0
        model.train()
        with progress() as bar:
            task = bar.add_task(description, total=config.steps, completed=first_step, note="")
            while step < last_step:
                rate = learning_rate(config.optim, step, config.steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                parts: dict[str, float] = {}
                for micro in range(config.accumulate):
                    batch = _to_device(next(batches), device)
                    with _gradient_sync(stepped, last=micro == config.accumulate - 1):
                        with autocast():
                            losses: Losses = stepped(batch)
                        loss: torch.Tensor = losses.loss  # type: ignore[assignment]
                        (loss / config.accumulate).backward()
                    _require_finite("loss", loss, batch, dataset, step)
                    if (step + 1) % config.log_every == 0 or step + 1 == last_step:
                        for name, value in {"loss": loss.detach(), **losses.parts}.items():
                            parts[name] = parts.get(name, 0.0) + float(value) / config.accumulate  # type: ignore[arg-type]
                gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
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
                    log.write(
                        step,
                        {**parts, "lr": rate, "gradient_norm": float(gradient_norm), "steps_per_s": speed},
                    )
                    bar.update(task, note=f"loss {parts['loss']:.4f}  {speed * config.batch_size:.0f} samples/s")
                    metrics.update(train_loss=parts["loss"], samples_per_s=speed * config.batch_size)
                    window_started, window_steps = time.monotonic(), 0
                bar.update(task, completed=step)
                stopping = processes.any(stop_asked.is_set())
                if evaluate is not None and step % config.eval_every == 0 and step < last_step and not stopping:
                    figures = evaluated()
                    log.write(step, {f"eval/{name}": value for name, value in figures.items()})
                    window_started, window_steps = time.monotonic(), 0
                minutes_up = processes.any(time.monotonic() - saved_at > 60 * config.save_every_minutes)
                if stopping or minutes_up or step % config.save_every_steps == 0 or step == last_step:
                    save(step)
                    saved_at = time.monotonic()
                if stopping:
                    break

        finished = step >= config.steps
        if finished:
            figures = evaluated()
            log.write(step, {f"eval/{name}": value for name, value in figures.items()})
            metrics.update(figures)
            if ema is not None:
                model.load_state_dict(ema.module.state_dict())
        else:
            say(f"stopped after step {step} of {config.steps} with a checkpoint; go on with --resume")
        log.close()
        model.eval()
        if stop_asked.is_set() and not finished:
            raise KeyboardInterrupt
        return TrainResult(metrics, finished, step)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask the loop to checkpoint and leave; a second SIGINT stops it at once."""
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


def _autocast(precision: str, device: torch.device) -> Callable[[], Any]:
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def _parallel(model: nn.Module, processes: Processes, *, compile: bool) -> nn.Module:
    stepped: nn.Module = torch.compile(model) if compile else model  # type: ignore[assignment]
    if processes.world == 1:
        return stepped
    return DistributedDataParallel(stepped, device_ids=[processes.device] if processes.device.type == "cuda" else None)


def _gradient_sync(model: nn.Module, *, last: bool) -> Any:
    """Gradients travel between processes only with the last micro-batch of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _require_finite(what: str, value: torch.Tensor, batch: dict[str, Any], dataset: Any, step: int) -> None:
    if torch.isfinite(value):
        return
    samples = [dataset.describe(int(index)) for index in batch["index"]]
    raise FloatingPointError(
        f"the {what} of step {step + 1} is {value.item()}, with the samples: {'; '.join(samples)}. "
        "The last checkpoint is whole: lower --lr, or look at these samples"
    )


def _evaluate(
    model: nn.Module, evaluate: Callable[[nn.Module], dict[str, float]], autocast: Callable[[], Any]
) -> dict[str, float]:
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast():
        values = evaluate(model)
    model.train(was_training)
    return values


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"
