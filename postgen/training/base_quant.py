"""Quantised networks on which adapters are trained (QLoRA): their formats, and how they are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import nn

from postgen.errors import UserError
from postgen.families.quantization_configs import registered_config

BaseQuant = Literal["none", "int8", "fp8", "int4", "nf4"]
"""Formats of frozen weights."""
_OWN = {"int8": "int8", "fp8": "fp8", "int4": "int4:g32"}
"""Format -> the weight format of postgen's quantised layers, which have no inputs in low precision here."""
BITS: dict[str, float] = {"int8": 8, "fp8": 8, "int4": 5, "nf4": 4.5}
"""Format -> bits of a weight, with its scales: one for 32 weights of int4, for 64 of nf4."""


def check_base_quant(kind: BaseQuant) -> None:
    """Refuse a format whose package is not installed.

    Raises:
        UserError: the package is missing.
    """
    if kind == "nf4" and find_spec("bitsandbytes") is None:
        raise UserError(
            "base_quant nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes, or set base_quant to"
            " int4, which needs no package"
        )


def quantization_of(kind: BaseQuant, networks: Iterable[str], device: torch.device) -> Any:
    """Return the argument `quantization_config` of `DiffusionPipeline.from_pretrained`; None if nothing is quantised.

    Args:
        kind: format of the frozen weights.
        networks: names of the components to quantise.
        device: device of the training.

    Raises:
        UserError: the package of the format is missing, or the format needs another device.
    """
    if kind == "none":
        return None
    check_base_quant(kind)
    if kind == "nf4" and device.type == "cpu":
        raise UserError("base_quant nf4 needs a GPU, but the device is cpu: use int4, int8 or fp8")
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    if kind == "nf4":
        settings: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        config = registered_config("bitsandbytes_4bit")(load_in_4bit=True, **settings)
    else:
        config = registered_config("postgen")(weight=_OWN[kind])
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(networks, config))


_CONSTANT: WeakSet[nn.Module] = WeakSet()


def mark_constant(network: nn.Module) -> None:
    """Note that the quantised layers of a network do not change, so that checkpoints leave them out."""
    layers = (part for part in network.modules() if isinstance(part, nn.Linear))
    _CONSTANT.update(layer for layer in layers if not layer.weight.is_floating_point())


def constant_in(module: nn.Module) -> tuple[str, ...]:
    """Return the prefixes, with a dot at the end, of the names of tensors that `mark_constant` noted in a module."""
    return tuple(f"{name}." for name, part in module.named_modules() if part in _CONSTANT)
