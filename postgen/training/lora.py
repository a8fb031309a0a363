"""Trained LoRA adapters: their configuration, and how they are added to the networks of a denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from postgen.errors import UserError, shown
from postgen.families import Denoiser
from postgen.families.lora import check_lora, load_loras, parse_lora
from postgen.families.lora_file import CHANGES_MODEL
from postgen.settings import Part

_MOST = 65536
"""Upper bound of rank and alpha, above the width of any layer."""


@dataclass(kw_only=True)
class AdapterConfig(Part):
    """Settings of the trained LoRA adapters.

    Raises:
        UserError: a value is outside its range.
    """

    part: ClassVar[str] = "lora"

    use_peft: bool = True
    """Train LoRA adapters (true) or all weights of the denoiser (false)."""

    lora_r: int = 32
    """Rank of the adapters."""

    lora_alpha: int = 64
    """Scale of the adapters: their output is multiplied by lora_alpha / lora_r."""

    lora_target_modules: list[str] = field(default_factory=list)
    """Suffixes of the names of adapted layers. An empty list uses the layers of the model's attention."""

    lora_path: str | None = None
    """LoRA to continue training from: a file in any supported format, or a folder (of a run; with two experts, one
    LoRA in each of `transformer/` and `transformer_2/`). Training keeps its rank and layers, and trains it even with
    `use_peft: false`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lora_r", "lora_alpha"):
            self.require(1 <= getattr(self, name) <= _MOST, name, f"at least 1 and at most {_MOST}")


def add_adapters(pipe: Any, denoiser: Denoiser, config: AdapterConfig, peft_config: Any = None) -> str | None:
    """Add trainable float32 adapters to the networks of a denoiser.

    Args:
        pipe: the pipeline of the denoiser.
        denoiser: names the networks, and the layers to adapt by default.
        config: settings of the adapters.
        peft_config: a `peft.LoraConfig` that replaces the settings in `config`.

    Returns:
        The name of the adapters; None if the configuration has no adapters.

    Raises:
        UserError: both `lora_path` and `peft_config` are given, the LoRA file does not fit, a target layer does not
            exist, or `peft_config` is no `LoraConfig`, or trains or changes other weights.
    """
    if config.lora_path and peft_config is not None:
        raise UserError("peft_config with lora_path: the LoRA has its own rank and layers, remove one of the two")
    if peft_config is not None:
        _check_peft(peft_config)
    networks: dict[str, Any] = dict(denoiser.transformers)
    if config.lora_path:
        _go_on_from(pipe, config.lora_path, networks)
        adapter = "lora0"
    elif config.use_peft or peft_config is not None:
        peft_config = peft_config if peft_config is not None else _peft_config(config, denoiser)
        adapter = "default"
        for module in networks.values():
            _check_targets(module, peft_config.target_modules)
            _check_takes_adapters(module)
            module.add_adapter(peft_config, adapter_name=adapter)
    else:
        return None
    for module in networks.values():
        for name, parameter in module.named_parameters():
            if f".{adapter}." in name and "lora_" in name:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
    return adapter


def _go_on_from(pipe: Any, path: str, networks: dict[str, Any]) -> None:
    """Load a LoRA to continue from, and check that it adapts exactly the networks that are trained and exported."""
    if (scale := parse_lora(path).scale) != 1:
        raise UserError(f"lora_path {path}: training continues from a LoRA at scale 1, remove the scale {scale:g}")
    check_lora(path)
    load_loras(pipe, [path], adapters_only=True)
    adapted = {name for name, part in pipe.components.items() if "lora0" in getattr(part, "peft_config", {})}
    if missing := sorted(set(networks) - adapted):
        raise UserError(
            f"lora_path {path} has no LoRA for {', '.join(missing)}, but training needs one: give a folder with a LoRA"
            f" for each of {', '.join(networks)}"
        )
    if others := sorted(adapted - set(networks)):
        raise UserError(
            f"lora_path {path} changes {', '.join(others)}, which training does not train or export: give a LoRA for "
            f"{', '.join(networks)} only"
        )


def _peft_config(config: AdapterConfig, denoiser: Denoiser) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(config.lora_target_modules or denoiser.lora_targets),
    )


def _check_peft(config: Any) -> None:
    """Refuse a configuration of peft whose adapters the export could not hold, before anything is trained.

    Raises:
        UserError: it is no `LoraConfig`, or trains or changes other weights than those of LoRA.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise UserError(
            f"peft_config is a {type(config).__name__}, it must be a peft.LoraConfig, because diffusers loads no other"
            " adapters"
        )
    if CHANGES_MODEL.fullmatch(began := str(config.init_lora_weights)):
        raise UserError(
            f"peft_config has init_lora_weights {began}, which also changes the model's weights, and exports do not"
            ' contain these: use True or "gaussian"'
        )
    if config.bias != "none":
        raise UserError(
            f"peft_config has bias {config.bias!r}, which trains biases of the model, and a LoRA file cannot hold"
            ' them: use bias="none"; lora_bias=True adds biases to the LoRA'
        )
    for name in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if value := getattr(config, name, None):
            raise UserError(
                f"peft_config has {name} {shown(value)}, which is not part of a LoRA file of diffusers: leave it out"
            )


def _check_takes_adapters(module: nn.Module) -> None:
    if not hasattr(module, "add_adapter"):
        raise UserError(
            f"diffusers does not support LoRA for {type(module).__name__}: train all weights with use_peft: false"
        )


def _check_targets(module: nn.Module, targets: Any) -> None:
    if not isinstance(targets, list | tuple | set):
        return  # a regular expression; peft itself raises an error if it matches no layer
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d)]
    for target in sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            endings = dict.fromkeys(".".join(p for p in name.split(".")[-2:] if not p.isdigit()) for name in names)
            raise UserError(
                f"lora_target_modules: {target!r} matches no layer of {type(module).__name__}. Its layers end in "
                f"{', '.join(list(endings)[:12])}"
            )
