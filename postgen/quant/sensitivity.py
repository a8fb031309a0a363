"""Mixed precision: quantise one layer at a time, measure the error of the output, and choose formats within a budget.

    calls = [partial(calibration.predict, points) for _, points in calibration.batches(held_out=True)]
    candidates = [LayerSpec(weight=format_of(text)) for text in ("int3:g64", "int4:g64", "int8")]
    choices = sensitivity(linears, candidates, OutputError(calls))
    found = allocate(choices, budget=400_000_000)
    quantize_weights(model, found.spec())

The sum of the errors of single layers is only an estimate of the error of all together, so measure the result.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from postgen.errors import UserError, is_number, shown
from postgen.families.budget import greedy, knapsack
from postgen.quant.linear import check_spec
from postgen.quant.model import Make, quantized_layer
from postgen.quant.spec import LayerSpec, QuantSpec
from postgen.training.logging import Progress

Cost = Callable[[str, nn.Linear, LayerSpec], int]
"""(name, layer, how it is quantised) -> cost as a whole number: bytes, nanoseconds, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to quantise one layer."""

    layer: str
    """Full name of the layer."""
    spec: LayerSpec
    error: float
    """Error of the model's output when only this layer is quantised."""
    cost: int
    """Cost of the layer, in the unit of the budget."""

    def __str__(self) -> str:
        return f"{self.layer}: {_words(self.spec)}, error {self.error:.3g}, cost {self.cost:,}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """One choice for each layer."""

    chosen: Mapping[str, Choice]

    @property
    def error(self) -> float:
        """Sum of the errors of the layers."""
        return sum(each.error for each in self.chosen.values())

    @property
    def cost(self) -> int:
        """Sum of the costs of the layers."""
        return sum(each.cost for each in self.chosen.values())

    def spec(self) -> QuantSpec:
        """Return the choices as a spec: exceptions by name. Layers that were not measured stay exact.

        Raises:
            UserError: all layers stay exact.
        """
        groups: dict[_Settings, list[str]] = {}
        for name, each in self.chosen.items():
            if not each.spec.exact:
                groups.setdefault(_settings(each.spec), []).append(re.escape(name))
        if not groups:
            raise UserError("all layers stay exact with this budget, so nothing is quantised: use a smaller budget")
        return QuantSpec(weight=None, overrides={"|".join(names): dict(key) for key, names in groups.items()})

    def __str__(self) -> str:
        counts = Counter(_words(each.spec) for each in self.chosen.values())
        said = ", ".join(f"{count} layers as {words}" for words, count in counts.most_common())
        return f"{said}; sum of the errors {self.error:.3g}, cost {self.cost:,}"


class OutputError:
    """The error of a model's outputs relative to what they were when this was made.

    Each call gives ||y - y0||^2 / ||y0||^2, and the error is the mean over the calls, so no noise level dominates.

    Args:
        calls: functions that run the model on fixed inputs and return its output. The outputs are kept on the CPU.

    Raises:
        UserError: there are no calls, or an output is 0 or not finite.
    """

    def __init__(self, calls: Sequence[Callable[[], Tensor]]) -> None:
        if not calls:
            raise UserError("an output error needs calls of the model: give at least one")
        self._calls = tuple(calls)
        self._exact = [self._output(call) for call in self._calls]
        for number, each in enumerate(self._exact):
            size = float(each.double().square().sum())
            if not (math.isfinite(size) and size > 0):
                raise UserError(f"the output of call {number} of the exact model is 0 or not finite: check its inputs")

    def __call__(self) -> float:
        """Run the calls again and return the error."""
        total = 0.0
        for call, exact in zip(self._calls, self._exact, strict=True):
            noise = (self._output(call).double() - exact.double()).square().sum()
            total += float(noise / exact.double().square().sum())
        return total / len(self._calls)

    @staticmethod
    @torch.no_grad()
    def _output(call: Callable[[], Tensor]) -> Tensor:
        return call().detach().float().cpu()


def sensitivity(
    layers: Mapping[str, nn.Linear],
    candidates: Sequence[LayerSpec],
    measure: Callable[[], float],
    *,
    make: Make = quantized_layer,
    cost: Cost | None = None,
    progress: bool = False,
) -> list[Choice]:
    """Quantise each layer alone in each way, and measure the error. Afterwards the layers are as before.

    Args:
        layers: full name -> linear layer of the model.
        candidates: ways to quantise a layer; `LayerSpec(weight=None)` keeps it exact, with the error 0. Those that do
            not fit a layer are left out for it.
        measure: returns the error of the model as it is now, such as an `OutputError`. It runs once for each choice.
        make: makes the quantised layer.
        cost: cost of a choice; None is `stored_bytes`.
        progress: whether to show a progress bar.

    Raises:
        UserError: no candidate fits a layer, or an error is not finite.
    """
    plan = [(name, linear, spec) for name, linear in layers.items() for spec in _fitting(name, linear, candidates)]
    bar = Progress(step=0, max_steps=len(plan), shown=progress, name="sensitivity")
    found = []
    for name, linear, spec in plan:
        error = 0.0
        if not spec.exact:
            with standing_in(linear, make(name, linear, spec)):
                error = measure()
        if not is_number(error):
            raise UserError(f"the error with {name} as {_settings(spec)} is {shown(error)}: it must be finite")
        found.append(Choice(layer=name, spec=spec, error=error, cost=(cost or stored_bytes)(name, linear, spec)))
        bar.step()
    bar.close()
    return found


def allocate(choices: Sequence[Choice], budget: float, *, method: Literal["exact", "greedy"] = "exact") -> Allocation:
    """Choose for each layer such that the sum of the errors is least and the sum of the costs is within the budget.

    Args:
        choices: at least one for each layer.
        budget: largest sum of the costs, in their unit.
        method: "exact" finds the best choice; "greedy" a good one, in less time.

    Raises:
        UserError: there are no choices, the method is unknown, or even the cheapest choices exceed the budget.
    """
    if method not in ("exact", "greedy"):
        raise UserError(f"method is {shown(method)}. Allowed: exact, greedy")
    if not choices:
        raise UserError("there are no choices: measure some layers with sensitivity first")
    if not is_number(budget):
        raise UserError(f"budget is {shown(budget)}, it must be a number in the unit of the costs")
    layers: dict[str, list[Choice]] = {}
    for each in choices:
        layers.setdefault(each.layer, []).append(each)
    least = sum(min(each.cost for each in own) for own in layers.values())
    if least > budget:
        raise UserError(f"the cheapest choices cost {least:,}, more than the budget {budget:,}: allow cheaper formats")
    options = [[(each.error, each.cost) for each in own] for own in layers.values()]
    places = (knapsack if method == "exact" else greedy)(options, math.floor(budget))
    return Allocation(chosen={name: own[place] for (name, own), place in zip(layers.items(), places, strict=True)})


def stored_bytes(name: str, linear: nn.Linear, spec: LayerSpec) -> int:
    """Return the bytes of the weight, with scales and the low-rank branch, and without the bias."""
    rows, channels, size = linear.out_features, linear.in_features, linear.weight.element_size()
    branch = spec.rank * (rows + channels) * size
    if spec.weight is None:
        return rows * channels * size + branch
    return math.ceil(spec.weight.bits(rows, channels) * rows * channels / 8) + branch


def nanoseconds(rows: int, *, make: Make = quantized_layer, min_seconds: float = 0.05) -> Cost:
    """Return a cost function that measures a layer: the median time of one call, on the layer's device.

    Layers of the same shape, dtype, device and spec are measured once.

    Args:
        rows: number of inputs of a call, such as the tokens of the video.
        make: makes the quantised layer.
        min_seconds: least duration of a measurement.
    """
    known: dict[Any, int] = {}

    def cost(name: str, linear: nn.Linear, spec: LayerSpec) -> int:
        weight = linear.weight
        key = (tuple(weight.shape), weight.dtype, weight.device, spec)
        if key not in known:
            layer = linear if spec.exact else make(name, linear, spec)
            x = torch.randn(rows, linear.in_features, dtype=weight.dtype, device=weight.device)
            timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
            with torch.no_grad():
                known[key] = round(timer.blocked_autorange(min_run_time=min_seconds).median * 1e9)
        return known[key]

    return cost


@contextmanager
def standing_in(linear: nn.Linear, other: nn.Module) -> Iterator[None]:
    """Let another module compute instead of a linear layer; the layer keeps its place, tensors and hooks."""
    before = linear.__dict__.get("forward")
    linear.forward = other.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del linear.forward
        else:
            linear.forward = before  # type: ignore[method-assign]


_Settings = tuple[tuple[str, Any], ...]


def _settings(spec: LayerSpec) -> _Settings:
    """Return a spec as the values of `QuantSpec`."""
    texts = {
        key: None if format is None else format.text for key, format in (("weight", spec.weight), ("act", spec.act))
    }
    return tuple({**texts, "rotate": spec.rotate, "rank": spec.rank}.items())


def _words(spec: LayerSpec) -> str:
    """Return a spec in words: `int4:g64`, `int4:g64 with inputs in fp8, rank 16`, or `exact`."""
    if spec.exact:
        return "exact"
    act = "" if spec.act is None else f" with inputs in {spec.act.text}"
    others = "".join(f", {name} {size}" for name in ("rotate", "rank") if (size := getattr(spec, name)))
    return f"{'exact weights' if spec.weight is None else spec.weight.text}{act}{others}"


def _fitting(name: str, linear: nn.Linear, candidates: Sequence[LayerSpec]) -> list[LayerSpec]:
    found, reasons = [], []
    for spec in candidates:
        try:
            if not spec.exact:
                check_spec(spec, linear.in_features)
            found.append(spec)
        except UserError as error:
            reasons.append(str(error))
    if not found:
        raise UserError(f"no candidate fits the layer {name}: {reasons[0] if reasons else 'there are none'}")
    return found
