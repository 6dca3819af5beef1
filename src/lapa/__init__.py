"""Latent Action Pretraining (LAPA, Ye et al., ICLR 2025, https://arxiv.org/abs/2410.11758).

From videos without action labels to a robot policy. What a user imports is here, loaded when it is used:

    import lapa

    dataset = lapa.open_dataset("rlds:bridge_dataset/1.0.0")
    codes_BL = lapa.LatentActionModel.from_pretrained("LAM").codes(frames)
    policy = lapa.Policy.from_pretrained("POLICY")
    actions_KA = policy.infer({"front": image, "instruction": "open the drawer"})

`lapa --help` lists the commands in the order of the flow; lapa.api has them as functions.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lapa.on_import import after_import

if TYPE_CHECKING:
    from lapa.api import configure, evaluate, finetune, label, pretrain, probe, train_latent
    from lapa.data.dataset import Dataset, Episode
    from lapa.data.labels import Labels
    from lapa.data.spec import open_dataset
    from lapa.data.writer import DatasetWriter
    from lapa.errors import UserError
    from lapa.latent.model import LatentActionModel
    from lapa.policy.runtime import Policy
    from lapa.types import Observation

__version__ = "0.2.0"
__all__ = [
    "Dataset",
    "DatasetWriter",
    "Episode",
    "Labels",
    "LatentActionModel",
    "Observation",
    "Policy",
    "UserError",
    "configure",
    "evaluate",
    "finetune",
    "label",
    "open_dataset",
    "pretrain",
    "probe",
    "train_latent",
]

_MODULES = {
    "api": ("configure", "evaluate", "finetune", "label", "pretrain", "probe", "train_latent"),
    "data.dataset": ("Dataset", "Episode"),
    "data.labels": ("Labels",),
    "data.spec": ("open_dataset",),
    "data.writer": ("DatasetWriter",),
    "errors": ("UserError",),
    "latent.model": ("LatentActionModel",),
    "policy.runtime": ("Policy",),
    "types": ("Observation",),
}
_HOMES = {name: f"lapa.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lapa' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


after_import("transformers.models.auto.configuration_auto", "lapa.automodel:register_configs")
after_import("transformers.models.auto.modeling_auto", "lapa.automodel:register_models")
