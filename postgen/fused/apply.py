"""Apply fused operations to a pipeline or a transformer, change their settings and remove them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from postgen.errors import UserError
from postgen.families.handle import PlugInHandle
from postgen.fused.config import FusedOpsConfig
from postgen.fused.state import NAME, Fusion


class FusedOpsHandle(PlugInHandle[FusedOpsConfig, Fusion]):
    """The handle of the fused operations on one or more transformers."""

    name = NAME
    config_class = FusedOpsConfig
    removed = "the fused operations were removed: apply them again"
    doubled = "fused operations are on {where} already: update or remove them"

    def stats(self) -> dict[str, dict[str, int]]:
        """Return the number of layers or blocks in which each operation is fused, by pipeline component."""
        return {part: fusion.counts() for part, (_, fusion) in self.still_on.items()}


def apply_fused_ops(target: Any, config: FusedOpsConfig | None = None) -> FusedOpsHandle:
    """Make the blocks of a stock transformer compute with fused kernels, with the same formulas and weights.

    On a GPU each fused operation is one kernel; elsewhere it is the same formula in plain torch. The predictions
    differ from those of the stock model by rounding only: sums, norms and rotations are computed in float32 and
    rounded once.

    Args:
        target: a diffusers pipeline (all its transformers are changed) or a transformer.
        config: which operations are fused; None fuses all.

    Returns:
        The handle that enables, disables, updates and removes the fused operations.

    Raises:
        UserError: the model is unknown, the installed diffusers has other code than the fused forms were written for,
            or fused operations are already on this model.

    Example:
        handle = apply_fused_ops(pipe, FusedOpsConfig(attention=None))
    """
    settings = FusedOpsHandle.settings(config)
    return FusedOpsHandle.attach(target, lambda model: Fusion(model, settings))


def remove_fused_ops(target: Any) -> None:
    """Remove the fused operations from a pipeline or transformer, which restores the model bit by bit.

    Raises:
        UserError: the model has no fused operations.
    """
    handle = FusedOpsHandle.of(target)
    if handle is None:
        raise UserError(f"there are no fused operations on this {type(target).__name__}")
    handle.remove()


def fused_for_call(target: Any, setting: FusedOpsConfig | bool | None) -> AbstractContextManager[None]:
    """Set the fused operations for the calls inside a `with` block; the earlier state returns after the block.

    Args:
        target: a pipeline or transformer.
        setting: None changes nothing, False or 0 disables fused operations, True fuses all operations, and a config
            is used unchanged.

    Raises:
        UserError: the model is unknown, or the installed diffusers has other code than the fused forms were written
            for.
    """
    return FusedOpsHandle.for_call(target, setting, Fusion)
