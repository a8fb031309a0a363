"""Norm modules of diffusers and torch whose work is done elsewhere: whether that is allowed, and what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def plain(*modules: nn.Module | None) -> bool:
    """Whether modules can be left out and their weights read: nothing moves these, nothing watches the calls."""
    for module in modules:
        if module is None:
            continue
        # Hooks of accelerate and diffusers (offloading) stand in the instance, above the class.
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return True


def affine(norm: Any) -> dict[str, Any]:
    """Return weight, bias and eps of a norm, as the operations name them; LayerNorm and both RMSNorms have them."""
    return {"weight": norm.weight, "bias": getattr(norm, "bias", None), "eps": norm.eps}
