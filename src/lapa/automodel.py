"""Latent action models and policies for AutoConfig and AutoModel of transformers, by `model_type` in their config.json.

    import lapa
    from transformers import AutoModel

    lam = AutoModel.from_pretrained("user/lam")  # a lapa.LatentActionModel
    policy = AutoModel.from_pretrained("user/policy", statistics_key="bridge")  # a lapa.Policy

`import lapa` imports neither torch nor transformers: what is here is registered when transformers' own table of models
is imported (lapa.on_import), before or after.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from lapa.errors import UserError


class LapaLamConfig(PreTrainedConfig):
    """config.json of a latent action model; `model` is its own config."""

    model_type = "lapa_lam"


class LapaPolicyConfig(PreTrainedConfig):
    """config.json of a policy; `policy` is its own config."""

    model_type = "lapa_policy"


class LamForAuto:
    """AutoModel's entry for latent action models."""

    config_class: ClassVar[type[PreTrainedConfig]] = LapaLamConfig

    @staticmethod
    def from_pretrained(folder_or_hub_id: str, **options: Any) -> Any:
        """As `lapa.LatentActionModel.from_pretrained`, with its options, and on the device of `device_map`."""
        from lapa.engine.distributed import pick_device
        from lapa.latent.model import LatentActionModel

        options = _own(options)
        device = pick_device(options.pop("device", "cpu"))
        return LatentActionModel.from_pretrained(folder_or_hub_id, **options).to(device)


class PolicyForAuto:
    """AutoModel's entry for policies."""

    config_class: ClassVar[type[PreTrainedConfig]] = LapaPolicyConfig

    @staticmethod
    def from_pretrained(folder_or_hub_id: str, **options: Any) -> Any:
        """As `lapa.Policy.from_pretrained`, with its options, and on the device of `device_map`."""
        from lapa.policy.runtime import Policy

        return Policy.from_pretrained(folder_or_hub_id, **_own(options))


def register_configs() -> None:
    """Registers both kinds with AutoConfig."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for config in (LapaLamConfig, LapaPolicyConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_models() -> None:
    """Registers both kinds with AutoModel."""
    from transformers.models.auto.modeling_auto import AutoModel

    for model in (LamForAuto, PolicyForAuto):
        AutoModel.register(model.config_class, model, exist_ok=True)


def _own(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those that AutoModel adds for models of transformers, `device_map` as `device`.

    Raises UserError where it names several devices.
    """
    added = ("config", "trust_remote_code", "adapter_kwargs")
    own = {name: value for name, value in options.items() if name not in added and not name.startswith("_")}
    if own.get("revision") is not None:
        own["revision"] = str(own["revision"])
    if (devices := own.pop("device_map", None)) is not None:
        named = set(devices.values()) if isinstance(devices, dict) else {devices}
        if len(named) > 1:
            raise UserError(
                f"device_map={devices}: a model of lapa is on one device; give device_map='auto' or its name"
            )
        (device,) = named
        own["device"] = f"cuda:{device}" if isinstance(device, int) else str(device)
    return own
