"""LoRA adapters that are trained: their configuration, and how they are put into a denoiser's networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from postgen.errors import UserError
from postgen.families import Denoiser
from postgen.families.lora import check_lora, load_loras, parse_lora
from postgen.families.lora_file import CHANGES_MODEL
from postgen.settings import Part

_MOST = 65536
"""Rank and alpha: more than the width of any layer."""


@dataclass(kw_only=True)
class AdapterConfig(Part):
    """Which LoRA adapters are trained.

    Raises:
        UserError: a value outside its range.
    """

    part: ClassVar[str] = "lora"

    use_peft: bool = True
    """Train LoRA adapters; without it all weights of the denoiser."""

    lora_r: int = 32
    """Rank."""

    lora_alpha: int = 64
    """The update is scaled by lora_alpha / lora_r."""

    lora_target_modules: list[str] = field(default_factory=list)
    """Endings of layer names; empty takes those of the model's attention."""

    lora_path: str | None = None
    """A LoRA to go on from, under any keys, or the folder of a run; its rank and layers hold, and it is what is
    trained, with `use_peft: false` too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lora_r", "lora_alpha"):
            self.require(1 <= getattr(self, name) <= _MOST, name, f"at least 1 and at most {_MOST}")


def add_adapters(pipe: Any, denoiser: Denoiser, config: AdapterConfig, peft_config: Any = None) -> str | None:
    """Put adapters into the networks of a denoiser, in float32 and ready to be trained.

    Args:
        pipe: the pipeline of the denoiser.
        denoiser: names the networks, and the layers that are adapted by default.
        config: which adapters.
        peft_config: a `peft.LoraConfig` instead of the one that `config` describes.

    Returns:
        The name of the adapters, or None when the configuration wants none.

    Raises:
        UserError: two sources of adapters, a file that does not fit, layers that do not exist, or a beginning that
            changes other weights.
    """
    if config.lora_path and peft_config is not None:
        raise UserError("peft_config with lora_path: that LoRA has its own rank and layers, leave one of them out")
    if CHANGES_MODEL.fullmatch(began := str(getattr(peft_config, "init_lora_weights", None))):
        raise UserError(
            f"peft_config has init_lora_weights {began}, which changes the model too, and that would not be written:"
            ' use True or "gaussian"'
        )
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
    """Load a LoRA of which nothing would be missing from what training writes."""
    if (scale := parse_lora(path).scale) != 1:
        raise UserError(f"lora_path {path}: training goes on from a LoRA as it is, leave the scale {scale:g} out")
    check_lora(path)
    load_loras(pipe, [path], adapters_only=True)
    adapted = {name for name, part in pipe.components.items() if "lora0" in getattr(part, "peft_config", {})}
    if missing := sorted(set(networks) - adapted):
        raise UserError(
            f"lora_path {path} has no LoRA for {', '.join(missing)}, which is trained too: give a folder with one for"
            f" each of {', '.join(networks)}"
        )
    if others := sorted(adapted - set(networks)):
        raise UserError(f"lora_path {path} changes {', '.join(others)}, which is not trained and would not be written")


def _peft_config(config: AdapterConfig, denoiser: Denoiser) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(config.lora_target_modules or denoiser.lora_targets),
    )


def _check_takes_adapters(module: nn.Module) -> None:
    if not hasattr(module, "add_adapter"):
        raise UserError(
            f"{type(module).__name__} takes no LoRA in diffusers, which could not load it either: train all weights,"
            " use_peft: false"
        )


def _check_targets(module: nn.Module, targets: Any) -> None:
    if not isinstance(targets, list | tuple | set):
        return  # a pattern: peft itself refuses one that matches nothing
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d)]
    for target in sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            endings = dict.fromkeys(".".join(p for p in name.split(".")[-2:] if not p.isdigit()) for name in names)
            raise UserError(
                f"lora_target_modules: {target!r} matches no layer of {type(module).__name__}. Its layers end in "
                f"{', '.join(list(endings)[:12])}"
            )
