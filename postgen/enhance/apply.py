"""Put Enhance-A-Video on a pipeline or a transformer, change it, take it off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from postgen.enhance.config import EnhanceAVideoConfig
from postgen.enhance.progress import PipelineProgress
from postgen.enhance.state import NAME, Enhancement
from postgen.errors import UserError
from postgen.families.installed import installed, transformers_of

if TYPE_CHECKING:
    from torch import nn


class EnhanceAVideoHandle:
    """Enhance-A-Video as it stands on one or more transformers."""

    def __init__(self, parts: Mapping[str, tuple[nn.Module, Enhancement]]) -> None:
        self._parts = dict(parts)

    @property
    def config(self) -> EnhanceAVideoConfig:
        """The settings."""
        return self._first.config

    @property
    def enabled(self) -> bool:
        """Whether it acts."""
        return self._first.enabled

    @property
    def _first(self) -> Enhancement:
        if not self._parts:
            raise UserError("Enhance-A-Video was removed: apply it again")
        return next(iter(self._parts.values()))[1]

    def enable(self) -> None:
        """Act again after `disable`."""
        self._switch(True)

    def disable(self) -> None:
        """Stop acting, to the bit, until `enable`; what is installed stays."""
        self._switch(False)

    def _switch(self, enabled: bool) -> None:
        self._first  # noqa: B018 - raises where nothing is installed
        for _, enhancement in self._parts.values():
            enhancement.enabled = enabled

    def update(self, config: EnhanceAVideoConfig | None = None, **changes: Any) -> None:
        """Change the settings.

        Args:
            config: all of them; None keeps the present ones.
            changes: fields of `EnhanceAVideoConfig` to change.

        Raises:
            UserError: settings that are wrong, or an unknown field.
        """
        known = EnhanceAVideoConfig.__dataclass_fields__
        if unknown := sorted(changes.keys() - known.keys()):
            raise UserError(f"unknown settings {', '.join(unknown)}. Known: {', '.join(known)}")
        before = self.config
        if changes.get("relative_weight") is not None:
            changes = {"weight": "auto", **changes}
        elif "weight" in changes:
            changes = {"relative_weight": None, **changes}
        new = dataclasses.replace(config or before, **changes)
        try:
            for _, enhancement in self._parts.values():
                enhancement.configure(new)
        except UserError:
            for _, enhancement in self._parts.values():
                enhancement.configure(before)
            raise

    def remove(self) -> None:
        """Take it off: the model is as before, bit by bit."""
        self._first  # noqa: B018 - raises where nothing is installed
        for model, enhancement in self._parts.values():
            if installed(model).plug_ins.get(NAME) is enhancement:
                enhancement.remove(model)
        self._parts = {}

    def stats(self) -> dict[str, tuple[float, ...]]:
        """Return the gains of the last measured call, one per sample, by layer (`transformer.blocks.0.attn1`).

        Nothing is in it before the first call. Gains of exactly 1 everywhere mean that the weight is too small to act.
        """
        return {
            f"{part}.{layer}" if part else layer: gains
            for part, (_, enhancement) in self._parts.items()
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
    config = config or EnhanceAVideoConfig()
    models = transformers_of(target)
    for name, model in models.items():
        if NAME in installed(model).plug_ins:
            raise UserError(f"Enhance-A-Video is on {name or 'this transformer'} already: update or remove it")
    progress = PipelineProgress(target) if "" not in models else None
    # Everything that can be wrong shows here, before anything is installed.
    parts = {name: (model, Enhancement(model, config, progress)) for name, model in models.items()}
    for model, enhancement in parts.values():
        enhancement.install(model)
    return EnhanceAVideoHandle(parts)


def handle_of(target: Any) -> EnhanceAVideoHandle | None:
    """Return a handle to what is on a pipeline or transformer (a deep copy has its own); None where nothing is."""
    parts = {
        name: (model, installed(model).plug_ins[NAME])
        for name, model in transformers_of(target).items()
        if NAME in installed(model).plug_ins
    }
    return EnhanceAVideoHandle(parts) if parts else None


def remove_enhance_a_video(target: Any) -> None:
    """Take Enhance-A-Video off a pipeline or transformer: it is as before, bit by bit.

    Raises:
        UserError: it is not on.
    """
    handle = handle_of(target)
    if handle is None:
        raise UserError(f"Enhance-A-Video is not on this {type(target).__name__}")
    handle.remove()


@contextmanager
def enhance_for_call(target: Any, setting: EnhanceAVideoConfig | float | str | None) -> Iterator[None]:
    """Set Enhance-A-Video for the calls in a block; afterwards it is as it was before.

    Args:
        target: a pipeline or transformer.
        setting: None leaves it as it is; False or 0 switches it off; True or "auto" takes the recommended weight; a
            number is the weight; a config is taken as it is.

    Raises:
        UserError: an unknown model, or settings that are wrong.
    """
    if setting is None:
        yield
        return
    config = _config_of(setting)
    models = transformers_of(target)
    progress = PipelineProgress(target) if "" not in models else None
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(_one_for_call(model, config, progress))
        yield


@contextmanager
def _one_for_call(
    model: nn.Module, config: EnhanceAVideoConfig | None, progress: PipelineProgress | None
) -> Iterator[None]:
    found: Enhancement | None = installed(model).plug_ins.get(NAME)
    if found is None:
        added = None if config is None else Enhancement(model, config, progress)
        if added is not None:
            added.install(model)
        try:
            yield
        finally:
            if added is not None:
                added.remove(model)
        return
    before, enabled = found.config, found.enabled
    if config is not None:
        found.configure(config)
    found.enabled = config is not None
    try:
        yield
    finally:
        if config is not None:
            found.configure(before)
        found.enabled = enabled


def _config_of(setting: EnhanceAVideoConfig | float | str) -> EnhanceAVideoConfig | None:
    """Return the settings that a short form stands for; None is off."""
    if isinstance(setting, EnhanceAVideoConfig):
        return setting
    if setting is True or setting == "auto":
        return EnhanceAVideoConfig()
    if setting is False or setting == 0:
        return None
    return EnhanceAVideoConfig(weight=setting)  # type: ignore[arg-type]
