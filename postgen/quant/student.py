"""The student of a block: a float32 copy whose linear layers compute as their quantised forms do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from postgen.families.folds import Kind
from postgen.kernels.fp8 import SMALLEST_SCALE
from postgen.quant.fake import FakeQuantLinear, Let, fake_layers
from postgen.quant.rounding import Scales
from postgen.quant.spec import LayerSpec
from postgen.quant.stages import Stage
from postgen.quant.step_bins import StepBins
from postgen.quant.transforms.channel_fold import channel_fold
from postgen.quant.transforms.let import FoldPoint, initial_scale, initial_shift, let_points
from postgen.quant.transforms.low_rank import low_rank_branch

KINDS: tuple[Kind, ...] = ("norm", "value", "gated")
"""Tensors that recipes transform. Queries and keys matter only for quantised attention."""


@dataclass(kw_only=True)
class InputRange:
    """Range of the input channels of a layer, over all calls seen."""

    low: Tensor
    """Smallest value (K,)."""
    high: Tensor
    """Largest value (K,)."""

    def add(self, x: Tensor) -> None:
        """Widen the range by inputs (..., K)."""
        rows = x.detach().float().flatten(0, -2)
        self.low, self.high = torch.minimum(self.low, rows.amin(0)), torch.maximum(self.high, rows.amax(0))


Ranges = Mapping[str, InputRange]
"""Layer name inside the block -> range of its input."""


@dataclass(frozen=True, kw_only=True)
class StudentPlan:
    """What all students of a stage have in common.

    Layers are named by their full names.
    """

    layers: Mapping[str, LayerSpec]
    stage: Stage
    bins: StepBins | None = None
    """Bins of noise levels for learned clips of inputs; None for no clips."""
    dtype: torch.dtype = torch.float32
    """Dtype of the model, in which low-rank branches are stored."""

    def of(self, block: str) -> dict[str, LayerSpec]:
        """Return the layers of a block by their names inside it."""
        start = f"{block}."
        return {name.removeprefix(start): spec for name, spec in self.layers.items() if name.startswith(start)}


def make_student(
    name: str,
    block: nn.Module,
    plan: StudentPlan,
    *,
    before: Mapping[str, Tensor] | None = None,
    ranges: Callable[[Collection[str]], Ranges] | None = None,
) -> nn.Module:
    """Return a float32 copy of a block with `FakeQuantLinear` layers, of which the stage's parameters are trained.

    Args:
        name: name of the block in the model.
        block: the exact block.
        plan: the plan.
        before: state dict of the student of the former stage, whose weights are taken over.
        ranges: (layer names inside the block) -> ranges of their inputs; None where all values will be loaded from a
            finished student.
    """
    student = copy.deepcopy(block).float().requires_grad_(False)
    layers, stage = plan.of(name), plan.stage
    _take_over(student, layers, before or {})
    points = points_of(student, layers, stage)
    first = ranges({point.readers[0].name for point in points}) if ranges and points else None
    lets = [_let(student, point, stage, before, first) for point in points if stage.lets != "none"]
    for inside, spec in layers.items():
        linear: Any = student.get_submodule(inside)
        spec = LayerSpec(weight=None, act=spec.act, rotate=spec.rotate) if stage.exact_weights else spec
        own = [let for let in lets if inside in _touched(let.point)]
        fake = FakeQuantLinear(
            linear,
            spec,
            name=inside,
            ranges=stage.ranges if spec.weight is not None else "minmax",
            lets=own,
            bins=plan.bins if "act_clip" in stage.trains else None,
            branch=_branch(linear, spec, inside, own, plan.dtype),
        )
        parent, _, child = inside.rpartition(".")
        setattr(student.get_submodule(parent), child, fake.train(linear.training))
    if stage.by_channel:
        _by_channel(student, points, first)
    for _, fake in fake_layers(student):
        for parameter, value in fake.named_parameters():
            value.requires_grad_(parameter.rpartition(".")[2] in stage.trains)
    return student


def points_of(block: nn.Module, layers: Mapping[str, LayerSpec], stage: Stage) -> list[FoldPoint]:
    """Return the tensors of a block that a stage transforms: those that a layer with a quantised input reads."""
    if stage.lets == "none" and not stage.by_channel:
        return []
    kinds: tuple[Kind, ...] = ("norm",) if stage.by_channel or stage.lets == "channel" else KINDS
    return [point for point in let_points(block, kinds=kinds) if _quantises(point, layers)]


def observed(block: nn.Module, names: Collection[str], run: Callable[[nn.Module], None]) -> dict[str, InputRange]:
    """Return the ranges of the inputs of layers of a block.

    Args:
        block: the block.
        names: names of layers inside the block.
        run: runs the block on all calls.
    """
    found: dict[str, InputRange] = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().float()
        if name not in found:
            low = x.flatten(0, -2)
            found[name] = InputRange(low=low.amin(0), high=low.amax(0))
        found[name].add(x)

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            hook = block.get_submodule(name).register_forward_pre_hook(partial(see, name))
            stack.callback(hook.remove)
        run(block)
    return found


def _take_over(student: nn.Module, layers: Mapping[str, LayerSpec], before: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name in layers:
            if f"{name}.weight" in before:
                student.get_submodule(name).get_parameter("weight").copy_(before[f"{name}.weight"])


def _quantises(point: FoldPoint, layers: Mapping[str, LayerSpec]) -> bool:
    specs = [layers[part.name] for part in point.readers if part.name in layers]
    return any(spec.act is not None for spec in specs)


def _touched(point: FoldPoint) -> set[str]:
    return {part.name for part in (*point.readers, *point.writers)}


def _let(
    block: nn.Module, point: FoldPoint, stage: Stage, before: Mapping[str, Tensor] | None, ranges: Ranges | None
) -> Let:
    """Return the transformation of a tensor with its first values; ones and zeros where they will be loaded."""
    place = next(block.parameters()).device
    if stage.lets == "channel":
        return _channel_let(point, before or {}).to(place)
    if ranges is None:
        return Let(point, torch.ones(point.width, device=place), _zeros(point, place))
    reader = point.readers[0]
    low, high = (each[reader.start : reader.stop] for each in (ranges[reader.name].low, ranges[reader.name].high))
    shift = initial_shift(point, low, high)
    middle = 0 if shift is None else shift
    largest = torch.maximum((low - middle).abs(), (high - middle).abs())
    return Let(point, initial_scale(block, point, largest), shift)


def _branch(
    linear: nn.Linear, spec: LayerSpec, name: str, lets: Iterable[Let], dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Return the low-rank branch of a layer, which takes most where the transformations scale the weight up."""
    if not spec.rank or spec.weight is None:
        return None
    moment = torch.ones(linear.in_features, device=linear.weight.device)
    for let in lets:
        for part in let.point.readers:
            if part.name == name:
                moment[part.start : part.stop] *= let.values[0].detach().square()
    return low_rank_branch(linear.weight.detach(), spec.rank, moment=moment, dtype=dtype)


def _zeros(point: FoldPoint, place: torch.device) -> Tensor | None:
    return torch.zeros(point.width, device=place) if point.shiftable else None


def _channel_let(point: FoldPoint, before: Mapping[str, Tensor]) -> Let:
    """Return the transformation after which all channels have the mean scale and zero point of the first stage."""
    name = point.readers[0].name
    fold = channel_fold(before[f"{name}.channel_scale"], before[f"{name}.channel_zero"])
    return Let(point, fold.scale, fold.shift if point.shiftable else None)


def _by_channel(student: nn.Module, points: Iterable[FoldPoint], ranges: Ranges | None) -> None:
    """Quantise what norms write with a scale and a zero point for each channel."""
    fakes = dict(fake_layers(student))
    for point in points:
        for part in point.readers:
            fake = fakes.get(part.name)
            if fake is None or fake.spec.act is None or part.stop - part.start < fake.in_features:
                continue
            if ranges is None:
                like = torch.ones(fake.in_features, device=fake.weight.device)
                fake.by_channel_(Scales(scale=like, zero=like.clone()))
                continue
            seen = ranges[point.readers[0].name]
            codes = 2.0**fake.spec.act.grid.bits - 1
            scale = ((seen.high - seen.low) / codes).clamp_min(SMALLEST_SCALE)
            fake.by_channel_(Scales(scale=scale, zero=(-seen.low / scale).round()))
