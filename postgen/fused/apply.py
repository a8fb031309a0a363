"""Put fused operations on a pipeline or a transformer, change them, take them off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError
from postgen.families.installed import installed, transformers_of
from postgen.fused.config import FusedOpsConfig
from postgen.fused.state import NAME, Fusion

if TYPE_CHECKING:
    from torch import nn


class FusedOpsHandle:
    """The fused operations as they stand on one or more transformers."""

    def __init__(self, parts: Mapping[str, tuple[nn.Module, Fusion]]) -> None:
        self._parts = dict(parts)

    @property
    def config(self) -> FusedOpsConfig:
        """The settings."""
        return self._living[0][1].config

    @property
    def enabled(self) -> bool:
        """Whether they act."""
        return self._living[0][1].enabled

    @property
    def _living(self) -> list[tuple[nn.Module, Fusion]]:
        """The transformers that these operations are on; `remove_fused_ops` may have taken them off one."""
        found = list(_still_on(self._parts).values())
        if not found:
            raise UserError("the fused operations were removed: apply them again")
        return found

    def enable(self) -> None:
        """Act again after `disable`.

        Raises:
            UserError: they were removed, or a block was changed meanwhile so that they cannot act; nothing changes.
        """
        off = [(model, fusion) for model, fusion in self._living if not fusion.enabled]
        # Everything that can be wrong shows here; layers may have come or gone since.
        for model, fusion in off:
            fusion.configure(model, fusion.config)
        for model, fusion in off:
            fusion.install(model)

    def disable(self) -> None:
        """Give the stock model back, bit by bit, until `enable`."""
        for model, fusion in self._living:
            fusion.disable(model)

    def update(self, config: FusedOpsConfig | None = None, **changes: Any) -> None:
        """Change the settings.

        Args:
            config: all of them; None keeps the present ones.
            changes: fields of `FusedOpsConfig` to change.

        Raises:
            UserError: settings that are wrong, or an unknown field.
        """
        known = FusedOpsConfig.__dataclass_fields__
        if unknown := sorted(changes.keys() - known.keys()):
            raise UserError(f"unknown settings {', '.join(unknown)}. Known: {', '.join(known)}")
        new = dataclasses.replace(config or self.config, **changes)
        # Everything that can be wrong shows here, before anything changes.
        living = self._living
        for model, _ in living:
            Fusion(model, new)
        for model, fusion in living:
            fusion.configure(model, new)

    def remove(self) -> None:
        """Take them off: the model is as before, bit by bit."""
        for model, fusion in self._living:
            fusion.remove(model)
        self._parts = {}

    def stats(self) -> dict[str, dict[str, int]]:
        """Return in how many layers or blocks which operation is fused, by component of the pipeline."""
        return {part: fusion.counts() for part, (_, fusion) in _still_on(self._parts).items()}


def _still_on(parts: Mapping[str, tuple[nn.Module, Fusion]]) -> dict[str, tuple[nn.Module, Fusion]]:
    return {part: each for part, each in parts.items() if installed(each[0]).plug_ins.get(NAME) is each[1]}


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
    config = config or FusedOpsConfig()
    models = transformers_of(target)
    for name, model in models.items():
        if NAME in installed(model).plug_ins:
            raise UserError(f"fused operations are on {name or 'this transformer'} already: update or remove them")
    # Everything that can be wrong shows here, before anything is installed.
    parts = {name: (model, Fusion(model, config)) for name, model in models.items()}
    for model, fusion in parts.values():
        fusion.install(model)
    return FusedOpsHandle(parts)


def remove_fused_ops(target: Any) -> None:
    """Take the fused operations off a pipeline or transformer: it is as before, bit by bit.

    Raises:
        UserError: they are not on.
    """
    parts = {
        name: (model, installed(model).plug_ins[NAME])
        for name, model in transformers_of(target).items()
        if NAME in installed(model).plug_ins
    }
    if not parts:
        raise UserError(f"there are no fused operations on this {type(target).__name__}")
    FusedOpsHandle(parts).remove()


@contextmanager
def fused_for_call(target: Any, setting: FusedOpsConfig | bool | None) -> Iterator[None]:
    """Set the fused operations for the calls in a block; afterwards they are as before.

    Args:
        target: a pipeline or transformer.
        setting: None leaves them as they are; False switches them off; True fuses everything; a config is taken as it
            is.

    Raises:
        UserError: an unknown model, or code of diffusers that changed since.
    """
    if setting is None:
        yield
        return
    config = FusedOpsConfig() if setting is True else setting or None
    with ExitStack() as stack:
        for model in transformers_of(target).values():
            stack.enter_context(_one_for_call(model, config))
        yield


@contextmanager
def _one_for_call(model: nn.Module, config: FusedOpsConfig | None) -> Iterator[None]:
    found: Fusion | None = installed(model).plug_ins.get(NAME)
    fusion = found or (None if config is None else Fusion(model, config))
    if fusion is None:
        yield
        return
    before, enabled = fusion.config, fusion.enabled
    if config is None:
        fusion.disable(model)
    else:
        fusion.configure(model, config)
        if not fusion.enabled:
            fusion.install(model)
    try:
        yield
    finally:
        fusion.disable(model)
        if found is None:
            del installed(model).plug_ins[NAME]
        else:
            fusion.configure(model, before)
            if enabled:
                fusion.install(model)
