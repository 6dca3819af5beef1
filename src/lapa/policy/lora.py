"""LoRA: trains a language model through small adapters and leaves its weights as they are.

LoRA (https://arxiv.org/abs/2106.09685) through `peft`, in place: the model stays the class of transformers that it is.
The vocabulary's new rows are trained whole; its old rows, those of text, stay as they are, bit by bit.

    add_lora(language, rank=16, new_rows=range(32000, 32264))
    ...                                                         # train
    merge_lora(language)
    language.save_pretrained("MODEL")

The optimizer must not decay `vocabulary_weights(language)`: decay would change the old rows without any gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lapa.errors import UserError


def add_lora(language: PreTrainedModel, rank: int, new_rows: Sequence[int] = ()) -> None:
    """Puts adapters on every linear layer of the decoder's attention and MLP, in place, and freezes everything else.

    The model's output stays the same until it is trained. The adapters and the `new_rows` of embedding and head are
    trained; the caller unfreezes others afterwards, such as a projection of image tokens.
    Raises UserError where peft is missing or the rank is below 1.
    """
    if rank < 1:
        raise UserError(f"the LoRA rank must be at least 1 (8 to 64 are usual), got {rank}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f'LoRA needs peft ({error}); install it: pip install "lapa-vla[lora]"') from None
    assert not has_lora(language), "adapters are added once"
    decoder = language.get_decoder()
    linears = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear)}
    head = language.get_output_embeddings()
    names = [name for name, module in language.named_modules() if id(module) in linears and module is not head]
    # With alpha = rank, adapters are added unscaled.
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), language)
    for parameter in language.parameters():
        if parameter.requires_grad:
            # Adapters are in fp32 whatever the model is in: bf16 would lose their small steps.
            parameter.data = parameter.data.float()
    if len(new_rows):
        for weight in vocabulary_weights(language):
            weight.requires_grad_(True)
        hold_old_rows(language, new_rows)


def hold_old_rows(language: PreTrainedModel, new_rows: Sequence[int]) -> None:
    """Sets the gradients of all rows of embedding and head but the new ones to zero. Part of `add_lora`.

    Sharding (FSDP2) replaces the parameters: call it again on the sharded model before training.
    """
    for weight in vocabulary_weights(language):
        if not weight.requires_grad:
            continue
        learns_R = torch.zeros(len(weight), dtype=torch.bool)
        learns_R[torch.tensor(new_rows)] = True
        if isinstance(weight, DTensor):
            _hold_sharded(weight, learns_R)
        else:
            _hold(weight, learns_R)


def merge_lora(language: PreTrainedModel) -> None:
    """Adds the adapters to the weights that they adapt, and removes them: an ordinary model with the same output.

    Frozen weights stay frozen.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in language.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(language.get_submodule(parent), child, module.get_base_layer())
    del language.peft_config


def has_lora(language: PreTrainedModel) -> bool:
    """Whether the model has adapters that are not merged."""
    return hasattr(language, "peft_config")


def vocabulary_weights(language: PreTrainedModel) -> list[nn.Parameter]:
    """The weights with a row for each token: embedding and head, or one where they are tied."""
    embedding, head = language.get_input_embeddings().weight, language.get_output_embeddings().weight
    return [embedding] if embedding is head else [embedding, head]  # type: ignore[list-item]


def _hold(weight: nn.Parameter, learns_R: Tensor) -> None:
    # Applies before the gradient is accumulated, and so before DistributedDataParallel reduces it.
    learns = {weight.device: learns_R.to(weight.device)}

    def only_new(gradient_RD: Tensor) -> Tensor:
        device = gradient_RD.device
        if device not in learns:
            learns[device] = learns_R.to(device)
        return gradient_RD.masked_fill(~learns[device][:, None], 0)

    weight.register_hook(only_new)


def _hold_sharded(weight: DTensor, learns_R: Tensor) -> None:
    # Autograd does not use the sharded parameter; FSDP2 calls these hooks once it has reduced the gradient.
    learns = distribute_tensor(learns_R.to(weight.device), weight.device_mesh, weight.placements).to_local()

    def only_new(sharded: Tensor) -> None:
        assert isinstance(sharded.grad, DTensor), "a sharded parameter has a sharded gradient"
        sharded.grad.to_local().masked_fill_(~learns[:, None], 0)

    weight.register_post_accumulate_grad_hook(only_new)
