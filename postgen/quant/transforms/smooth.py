"""Choice of the scale of a fold by the error of the quantised layers that read the tensor (SmoothQuant,
arXiv:2211.10438; the search over a grid is that of SVDQuant, arXiv:2411.05007).

A fold divides the channels of the input by a scale and multiplies those of the weights. Between no change (strength 0)
and equal channels of the input (strength 1) lies the strength with the least error of the output:

    sum over readers of || X W^T - Q_act((X - d) / s) Q_weight(W s)^T ||^2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.quant.rotation import rotated
from postgen.quant.rounding import quantize_tensor
from postgen.quant.spec import LayerSpec
from postgen.quant.transforms.let import initial_scale
from postgen.quant.transforms.low_rank import low_rank_branch, residual_of
from postgen.quant.transforms.points import FoldPoint, block_of

GRID = tuple(step / 20 for step in range(1, 21))
"""Strengths that are tried besides no change."""


@torch.no_grad()
def searched_scale(
    model: nn.Module,
    point: FoldPoint,
    inputs: Tensor,
    specs: Mapping[str, LayerSpec],
    *,
    shift: Tensor | None = None,
    grid: Sequence[float] = GRID,
) -> tuple[Tensor, float]:
    """Return the scale (C,) with the least error of the quantised readers, and its strength (0: all scales are 1).

    Args:
        model: the model or block of the point.
        point: a point with readers.
        inputs: the tensor for a sample of tokens, (tokens, C).
        specs: how the readers are quantised, by their name inside the block; the others do not count.
        shift: shift of the fold (C,); None is 0.
        grid: strengths to try, 0 ... 1.

    Raises:
        UserError: no reader is quantised, or the inputs have another number of channels.
    """
    where = f"{point.name} of {point.block or 'the block'}"
    if inputs.dim() != 2 or inputs.shape[1] != point.width:
        raise UserError(f"inputs of {where} have shape {tuple(inputs.shape)}: they must be (tokens, {point.width})")
    block = block_of(model, point.block)
    readers: list[tuple[Tensor, LayerSpec]] = []
    for part in point.readers:
        spec, layer = specs.get(part.name), block.get_submodule(part.name)
        if spec is not None and not spec.exact:
            weight: Any = layer.weight
            readers.append((weight.detach()[:, part.start : part.stop].float(), spec))
    if not readers:
        names = ", ".join(part.name for part in point.readers)
        raise UserError(f"no layer that reads {where} is quantised: give the specs of some of {names or 'no layer'}")
    x = inputs.to(readers[0][0].device).float()
    x = x if shift is None else x - shift.to(x)
    best, strength = torch.ones(point.width, device=x.device), 0.0
    least = sum(_error(x, weight, spec, best) for weight, spec in readers)
    for alpha in grid:
        scale = initial_scale(model, point, x.abs().amax(0), alpha)
        error = sum(_error(x, weight, spec, scale) for weight, spec in readers)
        if error < least:
            best, strength, least = scale, alpha, error
    return best, strength


def _error(x: Tensor, weight: Tensor, spec: LayerSpec, scale: Tensor) -> float:
    """Return the squared error of the output of one quantised layer under a scale."""
    scaled, target = weight * scale, x / scale
    branch = low_rank_branch(scaled, min(spec.rank, *scaled.shape)) if spec.rank else None
    left = scaled if branch is None else residual_of(scaled, branch)
    inputs, weights = (rotated(each, spec.rotate) for each in (target, left))
    weights = weights if spec.weight is None else quantize_tensor(weights, spec.weight).numbers()
    inputs = inputs if spec.act is None else quantize_tensor(inputs, spec.act).numbers()
    return float((inputs @ weights.T - target @ left.T).square().sum())
