"""Sharding (FSDP2): weights, gradients and optimiser state of a model too large for one GPU, split over the processes.

With torch's `fully_shard`, a unit (a block of the model) is gathered before its forward and freed after it.

torchrun --nproc-per-node 8 -m lapa policy pretrain --shard --preset paper ...

Its checkpoint is a folder to which every process writes its shard, and which any number of processes can read.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lapa.checksums import read_sums, sums_of, verify, write_marker
from lapa.engine.checkpoint import RunState, lasting, require_same_run, restore_random_states
from lapa.engine.distributed import Processes
from lapa.errors import UserError
from lapa.files import errors_about, inside, read_object, write_json
from lapa.types import TrainableModel

# In a checkpoint's folder, what is not tensors; it is written last.
STATE = "state.json"


def shard(model: TrainableModel, processes: Processes, *, half: bool = False, compile: bool = False) -> TrainableModel:
    """A copy of `model` whose parameters are shared out over the processes; `gather` brings them back into `model`.

    Until then the parameters of `model` have no storage (meta). Units are those of `model.shard_units()` and the model
    itself; they go to the device one by one, so `model` may be on the CPU.
    half: a unit is gathered in bf16, weights stay as they are, gradients are added up in fp32. What is computed in
    which precision is left to autocast, as without sharding.
    Raises UserError for a parameter that is a single number without an axis, which cannot be shared out.
    """
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UserError(f"cannot shard the parameter {scalars[0]!r}, which has no axis; give it the shape [1]")
    sharded = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for parameter in model.parameters():
        # FSDP2 takes no other layout, such as the channels_last of convolutions.
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    policy = MixedPrecisionPolicy()
    if half:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for unit in sharded.shard_units():
        if compile:
            unit.compile()
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    for name in sharded.sharded_methods:
        register_fsdp_forward_method(sharded, name)
    _replace_parameters(model, {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()})
    sharded.after_sharding()
    return sharded


def reshard(model: nn.Module) -> None:
    """Frees the parameters that a forward without backward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(sharded: nn.Module, into: nn.Module, *, keep: bool) -> None:
    """Ends what `shard` began: `into`, the model that it was given, gets the weights where `keep` is set, on the CPU.

    Every process must call this. Without `keep` the parameters of `into` stay without storage (meta).
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(sharded, options=options)
    into.train(sharded.training)
    if keep:
        _replace_parameters(into, weights)
        for name, buffer in into.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        into.to("cpu")


def prepare_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Creates the optimiser's state of all weights, as it is before the first step.

    So a checkpoint holds the state of weights without a gradient too, which loading requires.
    """
    get_state_dict(model, optimizer)
    for state in optimizer.state.values():
        # get_state_dict makes a step without gradients.
        state["step"].zero_()


def save_sharded(path: Path, run: RunState, step: int, random_states: list[dict[str, Any]]) -> None:
    """Writes the run's tensors into a folder next to `path`, and then `path`, which names it and holds the rest.

    Every process must call this. The checkpoint before stays until this one is complete.
    """
    written = path.parent / f"step-{step}"
    if dist.get_rank() == 0 and written.exists():
        shutil.rmtree(written)
    dist.barrier()
    weights, moments = get_state_dict(run.model, run.optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=written)
    except (CheckpointException, OSError) as error:
        raise OSError(
            f"{written}: could not be written ({_reason(error)}); make room and run the command again with --resume"
        ) from error
    sums = sums_of(written, _share(path.name for path in written.iterdir()))
    known = {name: digest for each in _gathered(sums) for name, digest in each.items()}
    if dist.get_rank() == 0:
        state = {"step": step, "run_config": lasting(run.run_config), "random": random_states}
        write_marker(written, STATE, state, (), known.items())
        write_json(path, {"folder": written.name})
        _remove_others(path.parent, written.name)
    dist.barrier()


def load_sharded(path: Path, run: RunState, *, rank: int, world: int) -> int:
    """Restores what `save_sharded` wrote, by any number of processes, and returns the step; as `load_checkpoint`."""
    latest = read_object(path, "use --overwrite to start anew", folder=str)
    with errors_about(path):
        folder = inside(path.parent, latest["folder"])
    _verify(folder)
    # Earlier versions kept the state in the file that names the folder.
    noted = path if "run_config" in latest else folder / STATE
    state = read_object(noted, "use --overwrite to start anew", step=int, run_config=dict, random=list)
    require_same_run(path, state["run_config"], run.run_config)
    weights, moments = get_state_dict(run.model, run.optimizer)
    try:
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    except (CheckpointException, OSError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({_reason(error)}); use --overwrite to start anew"
        ) from error
    set_state_dict(run.model, run.optimizer, model_state_dict=weights, optim_state_dict=moments)
    if rank == 0:
        # Of a run that was killed while it wrote them.
        _remove_others(path.parent, latest["folder"])
    step: int = state["step"]
    restore_random_states(state["random"], step=step, rank=rank, world=world)
    return step


def _verify(folder: Path) -> None:
    """Compares the files of a checkpoint with their checksums, each in one process. Raises UserError in all of them."""
    sums, error = read_sums(folder), ""
    try:
        verify(folder, "use --overwrite to start anew", {name: sums[name] for name in _share(sums)})
    except UserError as found:
        error = str(found)
    if errors := [each for each in _gathered(error) if each]:
        raise UserError(errors[0])


def _share(names: Iterable[str]) -> list[str]:
    """The files that this process reads."""
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def _gathered(value: Any) -> list[Any]:
    """The values of all processes."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _remove_others(folder: Path, kept: str) -> None:
    """Removes the checkpoints but the one that counts."""
    for old in folder.glob("step-*"):
        if old.name != kept:
            shutil.rmtree(old)


def _replace_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts new parameters in the place of the old ones, which may be on another device; tied ones stay tied."""
    new = {old: nn.Parameter(values[name], old.requires_grad) for name, old in model.named_parameters()}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, new[old])


def _reason(error: BaseException) -> str:
    """The last line of a message of DCP; above it is the traceback of each process."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
