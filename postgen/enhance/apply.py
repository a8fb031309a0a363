"""Put Enhance-A-Video on a pipeline or a transformer, change it, take it off."""

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
    """Enhance-A-Video as it stands on one or more transformers."""

    name = NAME
    config_class = EnhanceAVideoConfig
    removed = "Enhance-A-Video was removed: apply it again"
    doubled = "Enhance-A-Video is on {where} already: update or remove it"

    @classmethod
    def spelled_out(cls, setting: Any) -> EnhanceAVideoConfig:
        """Return the settings that a weight, "auto" or True stands for."""
        if isinstance(setting, EnhanceAVideoConfig):
            return setting
        return EnhanceAVideoConfig(weight="auto" if setting is True else setting)

    def completed(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Let one of the two kinds of weight end the other."""
        if changes.get("relative_weight") is not None:
            return {"weight": "auto", **changes}
        return {"relative_weight": None, **changes} if "weight" in changes else changes

    def stats(self) -> dict[str, tuple[float, ...]]:
        """Return the gains of the last measured call, one per sample, by layer (`transformer.blocks.0.attn1`).

        Nothing is in it before the first call. Gains of exactly 1 everywhere mean that the weight is too small to act.
        """
        return {
            f"{part}.{layer}" if part else layer: gains
            for part, (_, enhancement) in self.still_on.items()
            for layer, gains in enhancement.gains().items()
        }


def apply_enhance_a_video(target: Any, config: EnhanceAVideoConfig | None = None) -> EnhanceAVideoHandle:
    """Amplify attention between frames (arXiv:2502.07508) in every video self-attention.

    Args:
        target: a diffusers video pipeline (all its transformers are taken) or a transformer.
        config: the settings; None is the model's recommended weight.

    Returns:
        The handle to switch, change, watch and remove it.

    Raises:
        UserError: an unknown model, settings that do not fit it, or it is on already.

    Example:
        handle = apply_enhance_a_video(pipe, EnhanceAVideoConfig(weight=2.0))
    """
    settings = EnhanceAVideoHandle.settings(config)
    progress = _progress_of(target)
    return EnhanceAVideoHandle.attach(target, lambda model: Enhancement(model, settings, progress))


def handle_of(target: Any) -> EnhanceAVideoHandle | None:
    """Return a handle to what is on a pipeline or transformer (a deep copy has its own); None where nothing is."""
    return EnhanceAVideoHandle.of(target)


def remove_enhance_a_video(target: Any) -> None:
    """Take Enhance-A-Video off a pipeline or transformer: it is as before, bit by bit.

    Raises:
        UserError: it is not on.
    """
    handle = handle_of(target)
    if handle is None:
        raise UserError(f"Enhance-A-Video is not on this {type(target).__name__}")
    handle.remove()


def enhance_for_call(target: Any, setting: EnhanceAVideoConfig | float | str | None) -> AbstractContextManager[None]:
    """Set Enhance-A-Video for the calls in a block; afterwards it is as it was before.

    Args:
        target: a pipeline or transformer.
        setting: None leaves it as it is; False or 0 switches it off; True or "auto" takes the recommended weight; a
            number is the weight; a config is taken as it is.

    Raises:
        UserError: an unknown model, or settings that are wrong.
    """
    progress = None if setting is None else _progress_of(target)

    def make(model: nn.Module, settings: EnhanceAVideoConfig) -> Enhancement:
        return Enhancement(model, settings, progress)

    return EnhanceAVideoHandle.for_call(target, setting, make)


def _progress_of(target: Any) -> PipelineProgress | None:
    """Return what reads the step off a pipeline; a bare transformer has none."""
    return None if "" in transformers_of(target) else PipelineProgress(target)
