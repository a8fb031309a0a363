"""Rotation of rows by Hadamard blocks, alone and with row-wise quantisation, as torch custom operations.

On a GPU one Triton kernel rotates and quantises, so the rotated rows never reach memory. Elsewhere plain torch
computes the same numbers. `fp8_rows.rows_matmul` and `int8_rows.rows_matmul` take these codes and scales. Shapes as in
`naive.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import check_devices, uses_triton, why_not_triton
from postgen.kernels.eight_bit import check_rows
from postgen.kernels.fp8 import E4M3
from postgen.kernels.fp8_rows.ops import why_not_fp8
from postgen.kernels.hadamard_rows import naive

LARGEST_BLOCK = 4096
"""The most channels of a Hadamard block."""


def rotate(x: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """Rotate the channels of x by Hadamard blocks, with gradients; for weights and for training.

    Args:
        x: (..., K), any floating-point dtype.
        block: channels of a block, a power of two up to 4096 that divides K.
        signs: (K,), numbers -1 and 1, which multiply the channels first; None is all 1.

    Returns:
        (..., K) in the dtype of x, computed in float32 and rounded once.

    Raises:
        ValueError: the block does not fit, or `signs` has another shape or device.
    """
    _check(x, block, signs)
    return naive.rotate(x, block, signs)


@library.custom_op("postgen::hadamard_rows", mutates_args=())
def rotate_quantize(x: Tensor, block: int, signs: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotate the rows of x by Hadamard blocks and quantise them; the operation has no gradient.

    Args:
        x: (..., K), any floating-point dtype.
        block: channels of a block, a power of two up to 4096 that divides K.
        signs: (K,), numbers -1 and 1, which multiply the channels first; None is all 1.
        dtype: the dtype of the codes, `torch.float8_e4m3fn` or `torch.int8`.

    Returns:
        Codes (..., K) and scales (..., 1) in float32. A row with NaN or infinity has a scale that is not finite.

    Raises:
        ValueError: the block does not fit, `signs` has another shape or device, or `dtype` is another one.
    """
    _check(x, block, signs, dtype)
    # Triton refuses to compile E4M3 for GPUs that do not have it.
    possible = x.numel() > 0 and (dtype == torch.int8 or why_not_fp8(x.device) is None)
    if possible and uses_triton("hadamard_rows", x, obstacle=_obstacle(x, block)):
        from postgen.kernels.hadamard_rows import triton

        return triton.rotate_quantize(x, block, signs, dtype)
    return naive.rotate_quantize(x, block, signs, dtype)


@rotate_quantize.register_fake
def _(x: Tensor, block: int, signs: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check(x, block, signs, dtype)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _obstacle(x: Tensor, block: int) -> str | None:
    if not x.is_cuda or why_not_triton(x) is not None:
        return None
    from postgen.kernels.hadamard_rows import triton

    return triton.why_not(x, block)


def _check(x: Tensor, block: int, signs: Tensor | None, dtype: torch.dtype = E4M3) -> None:
    check_rows(x)
    check_devices("hadamard_rows", x, signs)
    channels = x.shape[-1]
    if not 1 <= block <= LARGEST_BLOCK or block & (block - 1) or channels % block:
        raise ValueError(
            f"block must be a power of two up to {LARGEST_BLOCK} that divides the {channels} channels, got {block}"
        )
    if signs is not None and signs.shape != (channels,):
        raise ValueError(f"signs must be ({channels},), got {tuple(signs.shape)}")
    if dtype not in (E4M3, torch.int8):
        raise ValueError(f"dtype must be {E4M3} or {torch.int8}, got {dtype}")
