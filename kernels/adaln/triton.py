"""Gate, residual, norm and modulation in one kernel, one program per token: everything is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on


@triton.jit
def _norm_modulate(
    x, y, gate, scale, shift, weight, bias, total, out, x_b, x_n, y_b, y_n, gate_b, gate_n, scale_b, scale_n,
    shift_b, shift_n, eps,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    row = (sample * tl.num_programs(0) + token) * CHANNELS
    c = tl.arange(0, BLOCK)
    inside = c < CHANNELS

    # A token is read once and may leave the cache; data that all tokens of a sample share should stay in it.
    value = tl.load(x + sample * x_b + token * x_n + c, mask=inside, other=0.0, eviction_policy="evict_first")
    value = value.to(tl.float32)
    if y is not None:
        branch = tl.load(y + sample * y_b + token * y_n + c, mask=inside, other=0.0, eviction_policy="evict_first")
        branch = branch.to(tl.float32)
        if gate is not None:
            branch *= tl.load(gate + sample * gate_b + token * gate_n + c, mask=inside, other=0.0).to(tl.float32)
        rounded = (value + branch).to(total.dtype.element_ty)
        tl.store(total + row + c, rounded, mask=inside)
        # The norm takes the rounded sum, because later layers read the rounded sum too.
        value = rounded.to(tl.float32)

    if out is not None:
        if not RMS:
            value = tl.where(inside, value - tl.sum(value, axis=0) / CHANNELS, 0.0)
        value *= 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / CHANNELS + eps)
        if weight is not None:
            value *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            own = tl.load(scale + sample * scale_b + token * scale_n + c, mask=inside, other=0.0)
            value *= 1.0 + own.to(tl.float32)
        if shift is not None:
            own = tl.load(shift + sample * shift_b + token * shift_n + c, mask=inside, other=0.0)
            value += own.to(tl.float32)
        tl.store(out + row + c, value.to(out.dtype.element_ty), mask=inside)


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rms: bool = False,
) -> Tensor:
    """Compute `naive.norm_modulate`; `ops.py` has checked the shapes. Any strides."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, None, scale, shift, weight, bias, None, out, eps, rms)
    return out


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `naive.gate_residual_norm_modulate`; `ops.py` has checked the shapes. Any strides."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty_like(total)
    _launch(x, y, gate, scale, shift, weight, bias, total, out, eps, rms)
    return total, out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Compute `naive.gate_residual`; `ops.py` has checked the shapes. Any strides."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, y, gate, None, None, None, None, total, None, 0.0, False)
    return total


def block(channels: int) -> tuple[int, int]:
    """Return how many numbers a program holds (a power of 2) and how many warps it has."""
    size = max(128, triton.next_power_of_2(channels))
    return size, 4 if size <= 2048 else 8 if size <= 8192 else 16


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor | None,
    out: Tensor | None,
    eps: float,
    rms: bool,
) -> None:
    batch, tokens, channels = x.shape
    size, warps = block(channels)
    rows = [None if row is None else _rows(row, x) for row in (x, y, gate, scale, shift)]
    strides = [stride for row in rows for stride in ((0, 0) if row is None else row.stride()[:2])]
    weight, bias = (None if each is None else each.contiguous() for each in (weight, bias))
    with launching_on(x):
        _norm_modulate[(tokens, batch)](
            *rows, weight, bias, total, out, *strides, eps, CHANNELS=channels, BLOCK=size, RMS=rms, num_warps=warps
        )


def _rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a (B, N, C) view; the tensor is copied only if its channels are not adjacent in memory."""
    tensor = tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
    return tensor.expand(like.shape)
