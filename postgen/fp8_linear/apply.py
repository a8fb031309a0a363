"""Apply FP8 linear layers to a pipeline or a transformer, change their settings and remove them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from postgen.errors import UserError
from postgen.families.handle import PlugInHandle
from postgen.fp8_linear.config import FP8LinearConfig
from postgen.fp8_linear.state import NAME, FP8Linears


class FP8LinearsHandle(PlugInHandle[FP8LinearConfig, FP8Linears]):
    """The handle of the FP8 linear layers on one or more transformers."""

    name = NAME
    config_class = FP8LinearConfig
    removed = "the FP8 linear layers were removed: apply them again"
    doubled = "FP8 linear layers are on {where} already: update or remove them"

    def stats(self) -> dict[str, dict[str, int]]:
        """Return the number of layers that compute in FP8, by pipeline component and by part of the blocks.

        The key `left` counts the layers that the settings select but that stay exact, because 16 does not divide
        their numbers of channels.
        """
        return {part: linears.setting.prepared.counts() for part, (_, linears) in self.still_on.items()}


def apply_fp8_linears(target: Any, config: FP8LinearConfig | None = None) -> FP8LinearsHandle:
    """Make linear layers of a transformer compute in FP8: E4M3 with one scale per token and per output channel.

    The model keeps its own weights beside the FP8 codes. So memory grows by half the size of these weights,
    `save_pretrained` writes the same files as before, and LoRA adapters can be loaded before or after this call.

    Args:
        target: a diffusers pipeline (all its transformers are changed) or a transformer.
        config: which layers compute in FP8; None is the default config.

    Returns:
        The handle that enables, disables, updates and removes the FP8 layers.

    Raises:
        UserError: the model is unknown, a layer cannot be replaced (the message names the reason), the GPU has no
            FP8, or FP8 linear layers are already on this model.

    Example:
        handle = apply_fp8_linears(pipe, FP8LinearConfig(first_exact_blocks=1, last_exact_blocks=1))
    """
    settings = FP8LinearsHandle.settings(config)
    return FP8LinearsHandle.attach(target, lambda model: FP8Linears(model, settings))


def remove_fp8_linears(target: Any) -> None:
    """Remove FP8 linear layers from a pipeline or transformer, which restores the model bit by bit.

    Raises:
        UserError: the model has no FP8 linear layers.
    """
    handle = FP8LinearsHandle.of(target)
    if handle is None:
        raise UserError(f"there are no FP8 linear layers on this {type(target).__name__}")
    handle.remove()


def fp8_linears_for_call(target: Any, setting: FP8LinearConfig | bool | None) -> AbstractContextManager[None]:
    """Set the FP8 linear layers for the calls inside a `with` block; the earlier state returns after the block.

    Args:
        target: a pipeline or transformer.
        setting: None changes nothing, False or 0 disables FP8 linear layers, True uses the default config, and a
            config is used unchanged.

    Raises:
        UserError: the model is unknown, or a layer cannot be replaced.
    """
    return FP8LinearsHandle.for_call(target, setting, FP8Linears)
