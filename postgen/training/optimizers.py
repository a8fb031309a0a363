"""The optimisers of `optim`, which differ in the memory of their states."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError

from .updates import Optim, UpdatesConfig

PACKAGES: Mapping[str, str] = MappingProxyType({"adamw_8bit": "torchao", "adamw_8bit_bnb": "bitsandbytes"})
"""Optimiser -> the optional package that has it."""
QUANTISED_FROM = 4096
"""Number of values from which both packages store the moments of a parameter in 8 bits; smaller ones keep float32."""


def check_optim(args: UpdatesConfig, *, sharded: bool = False) -> None:
    """Refuse an optimiser that this machine or this run cannot use.

    Args:
        args: the settings.
        sharded: whether the weights are sharded over processes.

    Raises:
        UserError: the package of the optimiser is not installed, or the weights are sharded.
    """
    package = PACKAGES.get(args.optim)
    if package is not None and find_spec(package) is None:
        raise UserError(
            f"optim {args.optim} needs {package}, which is not installed: pip install {package}, or set optim to adamw"
            " or adafactor"
        )
    if sharded and args.optim != "adamw":
        raise UserError(
            f"optim {args.optim} cannot be combined with sharded weights (fully_shard, FSDP), whose moments are"
            " sharded already: set optim to adamw"
        )


def optimizer_of(
    groups: list[dict[str, Any]], args: UpdatesConfig, device: torch.device, *, sharded: bool = False
) -> torch.optim.Optimizer:
    """Return the configured optimiser for some parameter groups.

    Args:
        groups: parameter groups, whose settings come before those of `args`.
        args: the settings.
        device: device of the parameters.
        sharded: whether the weights are sharded over processes.

    Raises:
        UserError: see `check_optim`.
    """
    check_optim(args, sharded=sharded)
    if args.optim == "adafactor":
        from transformers.optimization import Adafactor

        # The schedule of the run sets the learning rate. A rate relative to the size of a weight would never move the
        # second factor of a LoRA, which starts at 0.
        return Adafactor(
            groups,
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    settings: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    if args.optim == "adamw":
        # The fused implementation is used on GPUs, the foreach implementation elsewhere.
        settings |= {"fused": True} if device.type == "cuda" else {"foreach": True}
        return torch.optim.AdamW(groups, **settings)
    found: torch.optim.Optimizer = import_module(f"{PACKAGES[args.optim]}.optim").AdamW8bit(groups, **settings)
    return found


def state_bytes(optim: Optim, parameters: list[Tensor]) -> int:
    """Return the number of bytes of an optimiser's moments for some parameters.

    Args:
        optim: name of the optimiser.
        parameters: the trained parameters; only their shapes are read.
    """
    return sum(_bytes(optim, tuple(each.shape), each.numel()) for each in parameters)


def _bytes(optim: Optim, shape: tuple[int, ...], count: int) -> int:
    if optim == "adafactor":
        # A row and a column of second moments for each matrix.
        return 4 * (count // shape[-1] + count // shape[-2] if len(shape) >= 2 else count)
    if optim == "adamw" or count < QUANTISED_FROM:
        return 8 * count
    # Codes of one byte, a float32 scale for each block of 256 values, and a table of 256 float32 numbers.
    return 2 * (count + 4 * -(-count // 256) + 1024)
