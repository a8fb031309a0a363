"""Functions that apply Enhance-A-Video to a pipeline or a transformer, change its settings, and remove it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from postgen.enhance.config import EnhanceAVideoConfig
from postgen.enhance.state import NAME, Enhancement
from postgen.errors import UserError
from postgen.families.handle import PlugInHandle
from postgen.families.installed import transformers_of
from postgen.families.progress import PipelineProgress

if TYPE_CHECKING:
    from torch import nn


class EnhanceAVideoHandle(PlugInHandle[EnhanceAVideoConfig, Enhancement]):
    """Handle of Enhance-A-Video on one or more transformers."""

    name = NAME
    config_class = EnhanceAVideoConfig
    removed = "Enhance-A-Video was removed: apply it again"
    doubled = "Enhance-A-Video is on {where} already: update or remove it"

    @classmethod
    def spelled_out(cls, setting: Any) -> EnhanceAVideoConfig:
        """Return the config for a weight, "auto" or True; a config is returned unchanged."""
        if isinstance(setting, EnhanceAVideoConfig):
            return setting
        return EnhanceAVideoConfig(weight="auto" if setting is True else setting)

    def completed(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Complete the changes of `update`: a new `weight` resets `relative_weight`, and the other way round."""
        if changes.get("relative_weight") is not None:
            return {"weight": "auto", **changes}
        return {"relative_weight": None, **changes} if "weight" in changes else changes

    def stats(self) -> dict[str, tuple[float, ...]]:
        """Return the gains of the last measured forward pass, one per sample, by layer (`transformer.blocks.0.attn1`).

        The dictionary is empty before the first forward pass. If all gains are exactly 1, the weight is too small to
        have an effect.
        """
        return {
            f"{part}.{layer}" if part else layer: gains
            for part, (_, enhancement) in self.still_on.items()
            for layer, gains in enhancement.gains().items()
        }


def apply_enhance_a_video(target: Any, config: EnhanceAVideoConfig | None = None) -> EnhanceAVideoHandle:
    """Amplify the attention between frames (arXiv:2502.07508) in every video self-attention.

    Args:
        target: a diffusers video pipeline, whose transformers are all changed, or a transformer.
        config: the settings; None uses the recommended weight of the model.

    Returns:
        The handle: `enable`, `disable`, `update`, `remove` and `stats`.

    Raises:
        UserError: the model is unknown, the settings do not fit it, or Enhance-A-Video is already applied.

    Example:
        handle = apply_enhance_a_video(pipe, EnhanceAVideoConfig(weight=2.0))
    """
    settings = EnhanceAVideoHandle.settings(config)
    progress = _progress_of(target)
    return EnhanceAVideoHandle.attach(target, lambda model: Enhancement(model, settings, progress))


def handle_of(target: Any) -> EnhanceAVideoHandle | None:
    """Return a handle of the Enhance-A-Video on a pipeline or transformer; None if it is not applied.

    A deep copy of a model has an Enhance-A-Video of its own, and this function returns its handle.
    """
    return EnhanceAVideoHandle.of(target)


def remove_enhance_a_video(target: Any) -> None:
    """Remove Enhance-A-Video from a pipeline or transformer, which then computes the same bits as before.

    Raises:
        UserError: Enhance-A-Video is not applied.
    """
    handle = handle_of(target)
    if handle is None:
        raise UserError(f"Enhance-A-Video is not on this {type(target).__name__}")
    handle.remove()


def enhance_for_call(target: Any, setting: EnhanceAVideoConfig | float | str | None) -> AbstractContextManager[None]:
    """Set Enhance-A-Video for the calls inside a `with` block, and restore the previous state at its end.

    Args:
        target: a pipeline or transformer.
        setting: None changes nothing; False or 0 switches Enhance-A-Video off; True or "auto" uses the recommended
            weight; a number is the weight; an `EnhanceAVideoConfig` gives all settings.

    Raises:
        UserError: the model is unknown, or the setting is not valid.
    """
    progress = None if setting is None else _progress_of(target)

    def make(model: nn.Module, settings: EnhanceAVideoConfig) -> Enhancement:
        return Enhancement(model, settings, progress)

    return EnhanceAVideoHandle.for_call(target, setting, make)


def _progress_of(target: Any) -> PipelineProgress | None:
    """Return the object that reads the denoising step from a pipeline; None for a bare transformer."""
    return None if "" in transformers_of(target) else PipelineProgress(target)
