"""Put linear layers in FP8 on a pipeline or a transformer, change them, take them off."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from postgen.errors import UserError
from postgen.families.handle import PlugInHandle
from postgen.fp8_linear.config import FP8LinearConfig
from postgen.fp8_linear.state import NAME, FP8Linears


class FP8LinearsHandle(PlugInHandle[FP8LinearConfig, FP8Linears]):
    """The linear layers in FP8 as they stand on one or more transformers."""

    name = NAME
    config_class = FP8LinearConfig
    removed = "the linear layers in FP8 were removed: apply them again"
    doubled = "linear layers in FP8 are on {where} already: update or remove them"

    def stats(self) -> dict[str, dict[str, int]]:
        """Return how many layers of which part compute in FP8, by component of the pipeline.

        `left` counts those that the settings ask for and whose channels the product does not take.
        """
        return {part: linears.setting.prepared.counts() for part, (_, linears) in self.still_on.items()}


def apply_fp8_linears(target: Any, config: FP8LinearConfig | None = None) -> FP8LinearsHandle:
    """Let linear layers of a transformer compute in FP8: E4M3 with a scale for each token and each output channel.

    The weights stay beside their codes, so memory grows by half of theirs, `save_pretrained` writes what it wrote
    before, and LoRA goes on top, before and after.

    Args:
        target: a diffusers pipeline (all its transformers are taken) or a transformer.
        config: which layers; None is the default policy.

    Returns:
        The handle to switch, change and remove them.

    Raises:
        UserError: an unknown model, layers that cannot be replaced (with the reason), a GPU without FP8, or they are
            on already.

    Example:
        handle = apply_fp8_linears(pipe, FP8LinearConfig(exact_first=1, exact_last=1))
    """
    settings = FP8LinearsHandle.settings(config)
    return FP8LinearsHandle.attach(target, lambda model: FP8Linears(model, settings))


def remove_fp8_linears(target: Any) -> None:
    """Take linear layers in FP8 off a pipeline or transformer: it is as before, bit by bit.

    Raises:
        UserError: they are not on.
    """
    handle = FP8LinearsHandle.of(target)
    if handle is None:
        raise UserError(f"there are no linear layers in FP8 on this {type(target).__name__}")
    handle.remove()


def fp8_linears_for_call(target: Any, setting: FP8LinearConfig | bool | None) -> AbstractContextManager[None]:
    """Set linear layers in FP8 for the calls in a block; afterwards they are as before.

    Args:
        target: a pipeline or transformer.
        setting: None leaves them as they are; False or 0 switches them off; True is the default policy; a config is
            taken as it is.

    Raises:
        UserError: an unknown model, or layers that cannot be replaced.
    """
    return FP8LinearsHandle.for_call(target, setting, FP8Linears)
