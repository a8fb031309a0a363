"""The state of FP8 linear layers on one transformer: replace layers, requantise changed weights, restore layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from postgen.errors import UserError
from postgen.families.attached import CHANGING, AttachedPlugIn, Setting
from postgen.families.installed import computes_on
from postgen.families.linear import replace_linears, replaced_linears
from postgen.families.linear_parts import shares_input
from postgen.fp8_linear.config import FP8LinearConfig
from postgen.fp8_linear.layer import FP8Linear, may_be_inline
from postgen.fp8_linear.policy import OWNER, Plan, plan_for
from postgen.fp8_linear.samples import samples_of
from postgen.kernels.dispatch import warn_once
from postgen.kernels.fp8_rows.ops import why_not_fp8

if TYPE_CHECKING:
    from torch import nn

NAME = OWNER
"""The name among the plug-ins of a transformer."""


class FP8Linears(AttachedPlugIn[FP8LinearConfig]):
    """The FP8 linear layers of one transformer.

    A replaced layer computes exactly like the stock layer in calls whose settings do not select it.
    """

    name = NAME

    def __init__(self, model: nn.Module, config: FP8LinearConfig) -> None:
        """Check the settings against a transformer (see `prepare`) without changing it."""
        self._mixed = False
        super().__init__(model, config)

    def prepare(self, model: nn.Module, config: FP8LinearConfig) -> Plan:
        """Find the layers that compute in FP8, in the current state of the transformer.

        Raises:
            UserError: the transformer is unknown, another owner has replaced a selected layer, no layer is left, or
                the GPU has no FP8.
        """
        device = computes_on(model)
        if device.type == "cuda":
            _check_device(device, config)
        return plan_for(model, config, _least(device, config))

    def arrange(self, model: nn.Module, live: Sequence[Setting[FP8LinearConfig]]) -> None:
        """Replace every layer that a setting in use selects, and restore the other layers.

        Layers that are already replaced are not touched, because another thread may be computing with them.

        Raises:
            UserError: a layer cannot be replaced or restored; nothing is changed then.
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
        """Return whether the current call computes this layer in FP8."""
        now = self.now
        # Read the name only where the settings in use differ: torch.compile would recompile for each block otherwise.
        return now.enabled and (not self._mixed or layer.place in now.prepared.layers)

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Activate the settings of the current call, and requantise the weights that have changed.

        Raises:
            UserError: the call runs on a GPU without FP8.
        """
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
            layer.refresh(_merged_into(model, name, layer), samples.get(name))

    def _leave_narrow(self, model: nn.Module, device: torch.device) -> None:
        """Apply `min_features` to a model that moved to a GPU after its layers were chosen."""
        now = self.now
        with CHANGING:
            now.prepared = plan_for(model, now.config, _least(device, now.config))
            try:
                self._changed(model)
            except UserError:
                # Hooks of offloading prevent the restoring. The narrow layers stay, and compute like stock layers.
                self._mixed = True

    def _layers(self, model: nn.Module) -> dict[str, FP8Linear]:
        standing = replaced_linears(model).get(OWNER)
        return {} if standing is None else cast(dict[str, FP8Linear], standing.modules)

    def describe(self) -> str:
        """Return one line that describes the state and the settings."""
        plan: Plan = self.setting.prepared
        counts = plan.counts()
        left = counts.pop("left", 0)
        parts = [f"{name} in {count} layers" for name, count in counts.items()]
        if left:
            name, shape = next(iter(plan.left.items()))
            parts.append(f"{left} layers exact because 16 does not divide their channels ({name}: {shape})")
        return f"{'on' if self.enabled else 'off'}, {', '.join(parts)}"


def _merged_into(model: nn.Module, name: str, layer: FP8Linear) -> tuple[str, ...]:
    """Return the names of the adapters that are fused into the weight of a layer."""
    try:
        there = model.get_submodule(name)
    except AttributeError:  # somebody has taken the block out of the model
        return ()
    return () if there is layer else tuple(getattr(there, "merged_adapters", ()))


def _least(device: torch.device, config: FP8LinearConfig) -> int:
    """Return the smallest number of channels for which FP8 saves more time on a device than the rounding takes."""
    return config.min_features if device.type == "cuda" and not config.simulate else 0


def _check_device(device: torch.device, config: FP8LinearConfig) -> None:
    """Refuse a GPU without FP8, where the layers would be slower; on a CPU, warn once that they are simulated."""
    reason = None if config.simulate else why_not_fp8(device)
    if reason is None:
        return
    if device.type == "cuda":
        raise UserError(
            f"FP8 linear layers would be slower than exact layers: {reason}. Leave them out, or set simulate=True in"
            " FP8LinearConfig to see the effect of the rounding"
        )
    warn_once(f"FP8 linear layers are simulated, which is slower than exact layers: {reason}")


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))
