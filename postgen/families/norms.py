"""Checks and parameters of norm modules (diffusers, torch) whose computation another operation takes over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def plain(*modules: nn.Module | None) -> bool:
    """Whether the modules can be bypassed and their weights read directly.

    True if no module has a hook or a replaced `forward`. A hook would miss the call, and offloading may have moved the
    weights. None entries are skipped.
    """
    for module in modules:
        if module is None:
            continue
        # Hooks of accelerate and diffusers (offloading) replace `forward` on the instance, not on the class.
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return True


def affine(norm: Any) -> dict[str, Any]:
    """Return weight, bias and eps of a LayerNorm or RMSNorm (torch, diffusers), by the argument names of our ops."""
    return {"weight": norm.weight, "bias": getattr(norm, "bias", None), "eps": norm.eps}
