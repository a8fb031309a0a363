"""Learnable equivalent transformations (LET, OmniQuant, arXiv:2308.13137): scales and shifts of channels, folded into
the weights.

A linear layer computes Y = X W^T + b = ((X - d) / s) (W s)^T + (b + W d). What writes X produces (X - d) / s instead:
a norm, the modulation of the block, or the projection of the values. Nothing is left to compute, except the gain of
models whose blocks share the embedding of the timestep (`postgen.quant.transforms.gains`). All folds are exact;
`postgen.families.folds` names the tensors of each class of blocks.

    for point in let_points(model, block):
        fold_(model, point, initial_scale(model, point, largest[point.name]))
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.folds import Modulation, Norm, Table
from postgen.quant.transforms.gains import gain_
from postgen.quant.transforms.points import FoldPoint, Part, block_of, found_in, let_points
from postgen.quant.transforms.records import is_rotated, note_

__all__ = [
    "FoldPoint",
    "Part",
    "fold_",
    "fold_all_",
    "folded_input",
    "folded_linear",
    "initial_scale",
    "initial_shift",
    "let_points",
]

LEAST_SCALE = 1e-2
"""Smallest scale of a channel (OmniQuant)."""


def fold_(model: nn.Module, point: FoldPoint, scale: Tensor, shift: Tensor | None = None) -> None:
    """Fold a scale and a shift into a model: the tensor becomes (x - shift) / scale, and the output stays.

    Args:
        model: the model or the block that `let_points` received, or a copy.
        point: one of its points.
        scale: (C,), positive. Queries and keys under rotary embeddings need one scale for the channels 2i and 2i + 1.
        shift: (C,); None is 0.

    Raises:
        UserError: a value is invalid for this point. Nothing changes.
    """
    fold_all_(model, [(point, scale, shift)])


@torch.no_grad()
def fold_all_(model: nn.Module, folds: Iterable[tuple[FoldPoint, Tensor, Tensor | None]]) -> None:
    """Fold several scales and shifts, as `fold_` does. Weights are computed in float32 and rounded once.

    Raises:
        UserError: a value is invalid for its point. Nothing changes.
    """
    blocks: dict[str, list[_Asked]] = {}
    for point, scale, shift in folds:
        blocks.setdefault(point.block, []).append((point, *_checked(point, scale, shift)))
    places = {name: block_of(model, name) for name in blocks}
    for name, asked in blocks.items():
        if rotated := next((point for point, *_ in asked if is_rotated(places[name], point)), None):
            raise UserError(f"{rotated.name} of {name or 'the block'} is rotated already: fold it before rotation")
    # Copies of one block at a time are in memory. Only float16 can overflow, so its numbers are computed twice.
    for name, asked in blocks.items():
        if any(each.dtype == torch.float16 for each in places[name].parameters()):
            _filled(places[name], asked).rounded()
    for name, asked in blocks.items():
        _filled(places[name], asked).write()
        for point, scale, shift in asked:
            note_(places[name], point, scale, shift)


def folded_linear(
    point: FoldPoint, name: str, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias that a linear layer has after a fold, differentiable in scale and shift.

    Args:
        point: the fold.
        name: name of the layer inside the block: a reader or a writer of the point. Other layers return unchanged.
        weight: (N, K).
        bias: (N,), or None.
        scale: (C,).
        shift: (C,); None is 0.
    """
    for parts, change in ((point.readers, _read), (point.writers, _written)):
        for part in parts:
            if part.name == name:
                weight, bias = change(part, weight, bias, scale, shift)
    return weight, bias


def folded_input(point: FoldPoint, name: str, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return the input (..., K) of a linear layer after a fold: (x - shift) / scale in the channels of the point.

    Layers that do not read the tensor get x. Differentiable.
    """
    for part in point.readers:
        if part.name == name:
            inside = x[..., part.start : part.stop]
            inside = (inside if shift is None else inside - shift) / scale
            x = torch.cat([x[..., : part.start], inside, x[..., part.stop :]], -1)
    return x


def initial_scale(model: nn.Module, point: FoldPoint, largest: Tensor, alpha: float = 0.5) -> Tensor:
    """Return SmoothQuant's scale, largest^alpha / max|W|^(1 - alpha), at least `LEAST_SCALE`; float32 (C,).

    Args:
        model: the model or block of the point.
        point: a point with readers.
        largest: largest absolute value of the tensor per channel (C,), after its shift is subtracted.
        alpha: 0 ... 1; 1 moves all differences between channels into the weights.
    """
    block = block_of(model, point.block)
    found: list[tuple[Part, Any]] = [(part, block.get_submodule(part.name)) for part in point.readers]
    weights = [layer.weight.detach()[:, part.start : part.stop].float() for part, layer in found]
    columns = torch.cat(weights).abs().amax(0).clamp_min(1e-5)
    largest = largest.to(columns.device).float().clamp_min(1e-5)
    return (largest**alpha / columns ** (1 - alpha)).clamp_min(LEAST_SCALE)


def initial_shift(point: FoldPoint, low: Tensor, high: Tensor) -> Tensor | None:
    """Return the middle of the range of each channel (C,), or None if the point cannot be shifted.

    Args:
        point: the point.
        low: smallest value per channel (C,).
        high: largest value per channel (C,).
    """
    return (high + low) / 2 if point.shiftable else None


class _Sheet:
    """Copies of the parameters that folds change, in float32 at least, so that each is rounded once."""

    def __init__(self) -> None:
        self._work: dict[int, tuple[Tensor, Tensor]] = {}
        self._gains: list[tuple[nn.Module, Table, Tensor, tuple[int, int]]] = []

    def __getitem__(self, parameter: Tensor) -> Tensor:
        if id(parameter) not in self._work:
            self._work[id(parameter)] = parameter, _exact(parameter).clone()
        return self._work[id(parameter)][1]

    def get(self, parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else self[parameter]

    def __setitem__(self, parameter: Tensor, value: Tensor) -> None:
        self._work[id(parameter)] = parameter, value

    def gain(self, block: nn.Module, table: Table, scale: Tensor) -> None:
        """Note that the embedding's slots of a table are divided by a scale in one block."""
        self._gains.append((block, table, scale, (table.shift, table.scale)))

    def rounded(self) -> list[tuple[Tensor, Tensor]]:
        """Return the parameters and their new values.

        Raises:
            UserError: a number is too large for the dtype of its parameter (float16).
        """
        found = [(parameter, value.to(parameter.dtype)) for parameter, value in self._work.values()]
        if dtypes := {str(each.dtype)[6:] for _, each in found if not bool(each.isfinite().all())}:
            raise UserError(
                f"weights are too large for {' and '.join(dtypes)} after this fold: use a smaller scale, or convert"
                " the model to bfloat16 first"
            )
        return found

    def write(self) -> None:
        """Change the parameters and the gains."""
        for parameter, value in self.rounded():
            parameter.data.copy_(value)
        for block, table, scale, slots in self._gains:
            gain = gain_(block, table)
            for slot in slots:
                gain[slot] /= scale.to(gain.device)


_Asked = tuple[FoldPoint, Tensor, Tensor]
"""A point, its scale and its shift."""


def _filled(block: nn.Module, asked: Iterable[_Asked]) -> _Sheet:
    """Return the folded parameters of a block."""
    sheet = _Sheet()
    for point, scale, shift in asked:
        for parts, change in ((point.readers, _read), (point.writers, _written)):
            for part in parts:
                layer: Any = block.get_submodule(part.name)
                work = sheet[layer.weight]
                weight, bias = change(part, work, sheet.get(layer.bias), scale.to(work), shift.to(work))
                sheet[layer.weight] = weight
                if bias is not None:
                    sheet[layer.bias] = bias
        for writer in point.fold.writers:
            _write(block, writer, scale, shift, sheet)
    return sheet


def _read(
    part: Part, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a reader: columns times the scale, and what the shift contributed in the bias."""
    inside = weight[:, part.start : part.stop]
    if shift is not None and bias is not None:
        bias = bias + inside @ shift
    return torch.cat([weight[:, : part.start], inside * scale, weight[:, part.stop :]], 1), bias


def _written(
    part: Part, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a writer: its rows produce (x - shift) / scale."""
    scale = 1 / scale if part.inverse else scale
    inside = weight[part.start : part.stop] / scale[:, None]
    weight = torch.cat([weight[: part.start], inside, weight[part.stop :]])
    if bias is not None:
        moved = bias[part.start : part.stop]
        moved = (moved if shift is None or not part.shifts else moved - shift) / scale
        bias = torch.cat([bias[: part.start], moved, bias[part.stop :]])
    return weight, bias


def _write(block: nn.Module, writer: object, scale: Tensor, shift: Tensor, sheet: _Sheet) -> None:
    """Fold into a norm or a modulation. Linear layers that write the tensor itself are the point's `writers`."""
    match writer:
        case Table() if hasattr(block, writer.name):
            table = sheet[getattr(block, writer.name)]
            slots = table.view(-1, table.shape[-1])
            s, d = scale.to(table), shift.to(table)
            slots[writer.scale] = (1 + slots[writer.scale]) / s - 1
            slots[writer.shift] = (slots[writer.shift] - d) / s
            sheet.gain(block, writer, s)
        case Modulation():
            layer: Any = found_in(block, writer.linear)
            if layer is not None:
                _modulate(layer, writer, scale, shift, sheet)
        case Norm():
            norm: Any = found_in(block, writer.name)
            if norm is not None:
                _affine(norm, 1 / scale if writer.inverse else scale, shift, sheet)


def _modulate(layer: Any, writer: Modulation, scale: Tensor, shift: Tensor, sheet: _Sheet) -> None:
    weight, bias = sheet[layer.weight], sheet[layer.bias]
    s, d = scale.to(weight), shift.to(weight)
    for chunk, is_scale in ((writer.scale, True), (writer.shift, False)):
        if chunk is not None:
            rows = slice(chunk * len(s), (chunk + 1) * len(s))
            weight[rows] /= s[:, None]
            bias[rows] = (1 + bias[rows]) / s - 1 if is_scale else (bias[rows] - d) / s


def _affine(norm: Any, scale: Tensor, shift: Tensor, sheet: _Sheet) -> None:
    weight = sheet[norm.weight]
    s, d = scale.to(weight), shift.to(weight)
    weight /= s.view_as(weight)
    if getattr(norm, "bias", None) is not None:
        bias = sheet[norm.bias]
        bias.copy_((bias - d.view_as(bias)) / s.view_as(bias))


def _exact(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _checked(point: FoldPoint, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    where = f"{point.name} of {point.block or 'the block'}"
    scale = _exact(scale)
    shift = torch.zeros_like(scale) if shift is None else _exact(shift)
    for name, values in (("scale", scale), ("shift", shift)):
        if values.shape != (point.width,):
            raise UserError(f"the {name} of {where} has shape {tuple(values.shape)}: it needs ({point.width},)")
        if not bool(values.isfinite().all()):
            raise UserError(f"the {name} of {where} has numbers that are not finite: calibrate again")
    if not bool((scale > 0).all()):
        raise UserError(f"the scale of {where} is {float(scale.min()):.3g} at its least: it must be positive")
    if bool(shift.any()) and not point.shiftable:
        raise UserError(
            f"{where} cannot be shifted, because a layer that would absorb the shift has no bias: scale it"
        )
    if point.fold.paired and not torch.equal(scale[0::2], scale[1::2]):
        raise UserError(
            f"the scale of {where} differs between channels 2i and 2i + 1, which rotary embeddings mix: use one scale"
            " for both"
        )
    return scale, shift
