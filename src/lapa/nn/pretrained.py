"""Models of transformers from a folder that a stranger may have made.

No code runs that a folder names: neither a module of its own (`auto_map`) nor an attention kernel of the hub. Weights
are safetensors, never pickles, and no model is built that is larger than they are (saved.py).

    config = read_config(folder); model, report = load_model(AutoModel, folder, config)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from lapa.errors import UserError
from lapa.files import read_json
from lapa.nn.saved import damaged, require_few, require_sizes, shapes_of_folder

# For every `from_pretrained` of transformers.
NO_CODE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
# Values by which a config may name code to run. An attention of None is sdpa where the model has it, else eager.
CODE = ("auto_map", "custom_pipelines")
KERNELS = ("_attn_implementation_internal", "_experts_implementation_internal")


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder of transformers, without the code and the kernels that it names. Raises as transformers.

    Sizes beyond the folder's weights are a UserError, and weights of fewer bits, which cannot be trained.
    """
    path = Path(folder) / "config.json"
    if path.is_file():
        require_sizes(path, read_json(path), shapes_of_folder(folder))
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **NO_CODE)
    for part in _parts(config):
        if getattr(part, "quantization_config", None) is not None:
            raise UserError(f"{folder}: its weights are quantised; give the model in bf16 or fp32")
        for name in CODE:
            vars(part).pop(name, None)
        for name in KERNELS:
            setattr(part, name, None)
    return config


def load_model(kind: Any, folder: Path, config: PreTrainedConfig, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model of transformers by the class `kind`, and the report of its loading. Raises as transformers does.

    A model larger than the weights of the folder is a UserError.
    """
    path = folder / "config.json"
    build = kind.from_config if hasattr(kind, "from_config") else kind
    with damaged(f"{path}: no model can be built from it"), torch.device("meta"):
        model = build(config)
    num = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    require_few(path, num, shapes_of_folder(folder))
    plain = {"use_safetensors": True, "attn_implementation": None, "output_loading_info": True}
    loaded, report = kind.from_pretrained(folder, config=config, **plain, **NO_CODE, **options)
    return loaded, report


def _parts(config: Any) -> Iterator[PreTrainedConfig]:
    """A config and all configs in it."""
    if isinstance(config, PreTrainedConfig):
        yield config
        config = list(vars(config).values())
    if isinstance(config, dict):
        config = list(config.values())
    if isinstance(config, list | tuple):
        for value in config:
            yield from _parts(value)
