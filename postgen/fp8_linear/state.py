"""Linear layers in FP8 on one transformer: put in place, brought up to date, put back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from postgen.errors import UserError
from postgen.families.attached import CHANGING, AttachedPlugIn, Setting
from postgen.families.installed import computes_on
from postgen.families.linear import replace_linears, replaced_linears
from postgen.fp8_linear.config import FP8LinearConfig
from postgen.fp8_linear.layer import FP8Linear, may_be_inline
from postgen.fp8_linear.policy import OWNER, Plan, plan_for, shares_input
from postgen.fp8_linear.samples import samples_of
from postgen.kernels.dispatch import warn_once
from postgen.kernels.fp8_rows.ops import why_not_fp8

if TYPE_CHECKING:
    from torch import nn

NAME = OWNER
"""Name among the plug-ins of a transformer."""


class FP8Linears(AttachedPlugIn[FP8LinearConfig]):
    """Everything on one transformer. What is in place computes as the stock layer in calls that do not want it."""

    name = NAME

    def __init__(self, model: nn.Module, config: FP8LinearConfig) -> None:
        """Check settings on a transformer, as `prepare` does; nothing is put there."""
        self._mixed = False
        super().__init__(model, config)

    def prepare(self, model: nn.Module, config: FP8LinearConfig) -> Plan:
        """Find the layers on the transformer as it is now.

        Raises:
            UserError: an unknown transformer, a layer that another owner replaced, nothing to take, or a GPU without
                FP8.
        """
        device = computes_on(model)
        if device.type == "cuda":
            _check_device(device, config)
        return plan_for(model, config, _least(device, config))

    def arrange(self, model: nn.Module, live: Sequence[Setting[FP8LinearConfig]]) -> None:
        """Put layers in place that any of the settings wants, and the others back.

        Those that stand stay as they are: another thread may be computing with them.

        Raises:
            UserError: a layer that cannot be replaced, or put back; nothing is changed then.
        """
        plans = [each.prepared.layers for each in live if each.enabled]
        wanted = {name: part for layers in plans for name, part in layers.items()}
        mixed = any(layers.keys() != wanted.keys() for layers in plans)
        self._mixed = self._mixed or mixed
        self._bring(model, wanted)
        self._mixed = mixed

    def _bring(self, model: nn.Module, wanted: dict[str, str]) -> None:
        standing = set(self._layers(model))
        new, gone = wanted.keys() - standing, standing - wanted.keys()
        if new:
            self._put(model, {name: wanted[name] for name in wanted if name in new})
        if gone:
            try:
                replaced_linears(model)[OWNER].remove_some(gone)
            except BaseException:
                if new:
                    replaced_linears(model)[OWNER].remove_some(new)
                raise

    def _put(self, model: nn.Module, parts: dict[str, str]) -> None:
        def make(name: str, linear: nn.Linear) -> nn.Module:
            return FP8Linear(linear, place=name, wanted=self.wants, shared=shares_input(name, parts[name]))

        pattern = _any_of(parts)
        standing = replaced_linears(model).get(OWNER)
        if standing is None:
            replace_linears(model, make, owner=OWNER, pattern=pattern, shown=False)
        else:
            standing.replace_more(make, pattern=pattern)

    def wants(self, layer: FP8Linear) -> bool:
        """Whether the call under way computes a layer in FP8."""
        now = self.now
        # Names are asked only where settings differ: compiled code would be made anew for each block otherwise.
        return now.enabled and (not self._mixed or layer.place in now.prepared.layers)

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the settings of who calls, and the weights as they are now."""
        super().before_forward(model, args, kwargs)
        if torch.compiler.is_compiling() or not self.now.enabled:
            return
        device = computes_on(model, (*args, *kwargs.values()))
        _check_device(device, self.now.config)
        if self.now.prepared.least < _least(device, self.now.config):
            self._leave_narrow(model, device)
        layers = self._layers(model)
        inline = may_be_inline(device)
        samples = samples_of({name: layer.weight for name, layer in layers.items()})
        for name, layer in layers.items():
            if layer.inline != inline:
                layer.inline = inline
            there = model.get_submodule(name)
            layer.refresh(() if there is layer else tuple(getattr(there, "merged_adapters", ())), samples.get(name))

    def _leave_narrow(self, model: nn.Module, device: torch.device) -> None:
        """Plan anew for a model that was elsewhere when its settings were made, and came to a GPU since."""
        now = self.now
        with CHANGING:
            now.prepared = plan_for(model, now.config, _least(device, now.config))
            try:
                self._changed(model)
            except UserError:
                # Offloading holds the layers: they stay, and compute what the stock ones do.
                self._mixed = True

    def _layers(self, model: nn.Module) -> dict[str, FP8Linear]:
        standing = replaced_linears(model).get(OWNER)
        return {} if standing is None else cast(dict[str, FP8Linear], standing.modules)

    def describe(self) -> str:
        """Say in one line what is on and how it is set."""
        plan: Plan = self.setting.prepared
        counts = plan.counts()
        left = counts.pop("left", 0)
        parts = [f"{name} in {count} layers" for name, count in counts.items()]
        if left:
            name, shape = next(iter(plan.left.items()))
            parts.append(f"{left} left, whose channels 16 does not divide ({name}: {shape})")
        return f"{'on' if self.enabled else 'off'}, {', '.join(parts)}"


def _least(device: torch.device, config: FP8LinearConfig) -> int:
    """Return how many channels a layer must have on a device: the rounding must not take longer than it saves."""
    return config.min_features if device.type == "cuda" and not config.emulate else 0


def _check_device(device: torch.device, config: FP8LinearConfig) -> None:
    """Refuse a GPU on which it would only be slower; on a processor say so once."""
    reason = None if config.emulate else why_not_fp8(device)
    if reason is None:
        return
    if device.type == "cuda":
        raise UserError(
            f"linear layers in FP8 would be slower than without: {reason}. Leave them out, or set emulate=True in"
            " FP8LinearConfig to see what the rounding does"
        )
    warn_once(f"linear layers in FP8 are emulated, slower than without: {reason}")


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))
