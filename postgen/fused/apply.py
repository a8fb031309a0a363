"""Put fused operations on a pipeline or a transformer, change them, take them off."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from postgen.errors import UserError
from postgen.families.handle import PlugInHandle
from postgen.fused.config import FusedOpsConfig
from postgen.fused.state import NAME, Fusion


class FusedOpsHandle(PlugInHandle[FusedOpsConfig, Fusion]):
    """The fused operations as they stand on one or more transformers."""

    name = NAME
    config_class = FusedOpsConfig
    removed = "the fused operations were removed: apply them again"
    doubled = "fused operations are on {where} already: update or remove them"

    def stats(self) -> dict[str, dict[str, int]]:
        """Return in how many layers or blocks which operation is fused, by component of the pipeline."""
        return {part: fusion.counts() for part, (_, fusion) in self.still_on.items()}


def apply_fused_ops(target: Any, config: FusedOpsConfig | None = None) -> FusedOpsHandle:
    """Let the blocks of a stock transformer compute by fused kernels, with the same formulas and weights.

    On a GPU each fused operation is one kernel; elsewhere it is the same formula in plain torch. Numbers differ from
    the stock model's by rounding only: sums, norms and rotations are in float32 and rounded once.

    Args:
        target: a diffusers pipeline (all its transformers are taken) or a transformer.
        config: what to fuse; None is everything.

    Returns:
        The handle to switch, change and remove them.

    Raises:
        UserError: an unknown model, code of diffusers that changed since, or they are on already.

    Example:
        handle = apply_fused_ops(pipe, FusedOpsConfig(attention=None))
    """
    settings = FusedOpsHandle.settings(config)
    return FusedOpsHandle.attach(target, lambda model: Fusion(model, settings))


def remove_fused_ops(target: Any) -> None:
    """Take the fused operations off a pipeline or transformer: it is as before, bit by bit.

    Raises:
        UserError: they are not on.
    """
    handle = FusedOpsHandle.of(target)
    if handle is None:
        raise UserError(f"there are no fused operations on this {type(target).__name__}")
    handle.remove()


def fused_for_call(target: Any, setting: FusedOpsConfig | bool | None) -> AbstractContextManager[None]:
    """Set the fused operations for the calls in a block; afterwards they are as before.

    Args:
        target: a pipeline or transformer.
        setting: None leaves them as they are; False or 0 switches them off; True fuses everything; a config is taken
            as it is.

    Raises:
        UserError: an unknown model, or code of diffusers that changed since.
    """
    return FusedOpsHandle.for_call(target, setting, Fusion)
