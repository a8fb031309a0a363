"""Norm, rotation and layout of queries and keys as torch custom operations: one GPU kernel for queries and keys.

`naive.py` has the shapes. The backward pass computes the formulas of `naive.py` in plain torch, which torch.compile
can fuse. The tables and the shift are constants of a call and get no gradient.
"""

from typing import Any

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import check_devices, uses_triton
from postgen.kernels.qk_norm_rope import naive

MAX_CHANNELS = 1024
"""The largest number of channels per head that a tile of the kernel can hold."""


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    k_shift: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "rms_norm",
    half: bool = False,
    first_token: int = 0,
    heads_first: bool = False,
) -> tuple[Tensor, ...]:
    """Return the normalised and rotated q and k in their dtypes, and a copy of v if v is given.

    Args:
        q: (B, N, H, D), any strides; D must be even with `cos` and `sin`.
        k: (B, N, Hk, D), any strides.
        v: (B, N, Hk, D), any strides.
        cos: (1 or B, R, 1 or H, D / 2), any dtype and strides. The R tokens from `first_token` on are rotated; other
            tokens are not. A table per head needs Hk = H.
        sin: same shape as `cos`, any dtype and strides.
        q_weight: (D,), or (H * D,) for the norm across heads, any dtype.
        k_weight: (D,), or (Hk * D,) for the norm across heads, any dtype.
        q_bias: same shape as `q_weight`, any dtype.
        k_bias: same shape as `k_weight`, any dtype.
        k_shift: (1 or B, Hk, D), subtracted from the rotated keys. The result of softmax attention does not depend
            on it.
        eps: added to the mean square (RMSNorm) or to the variance (LayerNorm).
        norm: none, rms_norm, rms_norm_across_heads or layer_norm.
        half: whether the pairs are (i, i + D / 2) instead of (2i, 2i + 1).
        first_token: the first token that is rotated.
        heads_first: whether the results are (B, H, N, D) instead of (B, N, H, D). Both are contiguous.

    Raises:
        ValueError: `norm` is unknown, the shapes, dtypes or devices do not match, or a table requires a gradient.
    """
    if torch.is_grad_enabled() and any(table is not None and table.requires_grad for table in (cos, sin)):
        raise ValueError("cos and sin require a gradient, but qk_norm_rope computes none for them: detach() them")
    found: tuple[Tensor, Tensor, Tensor] = _qk_norm_rope(
        q, k, v, cos, sin, q_weight, k_weight, q_bias, k_bias, k_shift, eps, norm, half, first_token, heads_first
    )
    return found[:2] if v is None else found


@library.custom_op("postgen::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    k_shift: Tensor | None,
    eps: float,
    norm: str,
    half: bool,
    first_token: int,
    heads_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("qk_norm_rope", q, k, v, cos, sin, q_weight, k_weight, q_bias, k_bias, k_shift)
    _check(q, k, v, cos, sin, (q_weight, k_weight, q_bias, k_bias), k_shift, norm, first_token)
    options: dict[str, Any] = {"eps": eps, "norm": norm, "half": half, "first_token": first_token}
    out = _empty_results(q, k, v, heads_first)
    q_out, k_out, v_out = (x.transpose(1, 2) if heads_first and x.dim() == 4 else x for x in out)
    if _on_kernel(q, k, v, cos, sin, q_weight, k_weight, q_bias, k_bias, k_shift):
        from postgen.kernels.qk_norm_rope import triton

        affine, places = (q_weight, k_weight, q_bias, k_bias), (q_out, k_out, None if v is None else v_out)
        triton.qk_norm_rope(q, k, v, cos, sin, affine, k_shift, places, (None, None), **options)
        return out
    q_out.copy_(naive.norm_rope(q, cos, sin, q_weight, q_bias, **options))
    k_out.copy_(naive.norm_rope(k, cos, sin, k_weight, k_bias, k_shift, **options))
    if v is not None:
        v_out.copy_(v)
    return out


@library.custom_op("postgen::qk_norm_rope_int8", mutates_args=())
def qk_norm_rope_int8(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    k_shift: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms_norm",
    half: bool = False,
    first_token: int = 0,
    heads_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the q and k of `qk_norm_rope` in int8 with a float32 scale for each token and head.

    The operation has no gradient.

    Args:
        q: (B, N, H, D), any strides; D must be even with `cos` and `sin`.
        k: (B, N, Hk, D), any strides.
        cos: (1 or B, R, 1 or H, D / 2), any dtype and strides.
        sin: same shape as `cos`, any dtype and strides.
        q_weight: (D,), or (H * D,) for the norm across heads, any dtype.
        k_weight: (D,), or (Hk * D,) for the norm across heads, any dtype.
        q_bias: same shape as `q_weight`, any dtype.
        k_bias: same shape as `k_weight`, any dtype.
        k_shift: (1 or B, Hk, D), subtracted from the rotated keys.
        eps: added to the mean square (RMSNorm) or to the variance (LayerNorm).
        norm: none, rms_norm, rms_norm_across_heads or layer_norm.
        half: whether the pairs are (i, i + D / 2) instead of (2i, 2i + 1).
        first_token: the first token that is rotated.
        heads_first: whether the int8 results are (B, H, N, D) instead of (B, N, H, D).

    Returns:
        q in int8, its scales (B, N, H), k in int8, its scales (B, N, Hk). A number is its int8 value times its scale.

    Raises:
        ValueError: `norm` is unknown, or the shapes, dtypes or devices do not match.
    """
    check_devices("qk_norm_rope_int8", q, k, cos, sin, q_weight, k_weight, q_bias, k_bias, k_shift)
    _check(q, k, None, cos, sin, (q_weight, k_weight, q_bias, k_bias), k_shift, norm, first_token)
    options: dict[str, Any] = {"eps": eps, "norm": norm, "half": half, "first_token": first_token}
    q_out, q_scale, k_out, k_scale = out = _empty_int8(q, k, heads_first)
    places = [x.transpose(1, 2) if heads_first else x for x in (q_out, k_out)]
    if _on_kernel(q, k, cos, sin, q_weight, k_weight, q_bias, k_bias, k_shift):
        from postgen.kernels.qk_norm_rope import triton

        affine = (q_weight, k_weight, q_bias, k_bias)
        out_places = (places[0], places[1], None)
        triton.qk_norm_rope(q, k, None, cos, sin, affine, k_shift, out_places, (q_scale, k_scale), **options)
        return out
    of_q = naive.norm_rope_int8(q, cos, sin, q_weight, q_bias, **options)
    of_k = naive.norm_rope_int8(k, cos, sin, k_weight, k_bias, k_shift, **options)
    for target, found in zip((places[0], q_scale, places[1], k_scale), (*of_q, *of_k), strict=True):
        target.copy_(found)
    return out


@_qk_norm_rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    k_shift: Tensor | None,
    eps: float,
    norm: str,
    half: bool,
    first_token: int,
    heads_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("qk_norm_rope", q, k, v, cos, sin, q_weight, k_weight, q_bias, k_bias, k_shift)
    return _empty_results(q, k, v, heads_first)


@qk_norm_rope_int8.register_fake
def _(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    k_shift: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms_norm",
    half: bool = False,
    first_token: int = 0,
    heads_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_devices("qk_norm_rope_int8", q, k, cos, sin, q_weight, k_weight, q_bias, k_bias, k_shift)
    return _empty_int8(q, k, heads_first)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cos, sin, q_weight, k_weight, q_bias, k_bias, _, eps, norm, half, first_token, ctx.heads_first = inputs
    ctx.has_v = v is not None
    ctx.options = {"eps": eps, "norm": norm, "half": half, "first_token": first_token}
    ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight, q_bias, k_bias)


def _backward(ctx: Any, of_q: Tensor, of_k: Tensor, of_v: Tensor) -> tuple[Tensor | None, ...]:
    q, k, cos, sin, q_weight, k_weight, q_bias, k_bias = ctx.saved_tensors
    if ctx.heads_first:
        of_q, of_k = of_q.transpose(1, 2), of_k.transpose(1, 2)
        of_v = of_v.transpose(1, 2) if ctx.has_v else of_v
    of_q, of_q_weight, of_q_bias = naive.norm_rope_backward(of_q, q, cos, sin, q_weight, q_bias, **ctx.options)
    of_k, of_k_weight, of_k_bias = naive.norm_rope_backward(of_k, k, cos, sin, k_weight, k_bias, **ctx.options)
    of_affine = (of_q_weight, of_k_weight, of_q_bias, of_k_bias)
    return of_q, of_k, of_v if ctx.has_v else None, None, None, *of_affine, None, *[None] * 5


_qk_norm_rope.register_autograd(_backward, setup_context=_keep)


def _empty_results(q: Tensor, k: Tensor, v: Tensor | None, heads_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    places = [x.new_empty(_shape(x, heads_first)) for x in (q, k)]
    return places[0], places[1], q.new_empty(0) if v is None else v.new_empty(_shape(v, heads_first))


def _empty_int8(q: Tensor, k: Tensor, heads_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    places = [x.new_empty(_shape(x, heads_first), dtype=torch.int8) for x in (q, k)]
    scales = [x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q, k)]
    return places[0], scales[0], places[1], scales[1]


def _shape(x: Tensor, heads_first: bool) -> tuple[int, ...]:
    batch, tokens, heads, channels = x.shape
    return (batch, heads, tokens, channels) if heads_first else (batch, tokens, heads, channels)


def _on_kernel(q: Tensor, *others: Tensor | None) -> bool:
    channels = q.shape[-1]
    obstacle = f"heads have {channels} channels, at most {MAX_CHANNELS} fit" if channels > MAX_CHANNELS else None
    return uses_triton("qk_norm_rope", q, *(each for each in others if each is not None), obstacle=obstacle)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    affine: tuple[Tensor | None, ...],
    k_shift: Tensor | None,
    norm: str,
    first_token: int,
) -> None:
    if norm not in naive.NORMS:
        raise ValueError(f"norm must be one of {', '.join(naive.NORMS)}, got {norm!r}")
    if q.dim() != 4 or q.numel() == 0:
        raise ValueError(f"q must be (B, N, H, D) and not empty, got {tuple(q.shape)}")
    batch, tokens, heads, channels = q.shape
    if k.dim() != 4 or k.numel() == 0 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, tokens, channels):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} may differ only in the number of heads")
    if not (q.is_floating_point() and k.is_floating_point()):
        raise ValueError(f"q and k must have a floating-point dtype, got {q.dtype} and {k.dtype}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v and k must have the same shape, got {tuple(v.shape)} and {tuple(k.shape)}")
    if k_shift is not None and tuple(k_shift.shape) not in ((1, *k.shape[2:]), (batch, *k.shape[2:])):
        raise ValueError(
            f"k_shift must be (1 or B, Hk, D) for k of shape {tuple(k.shape)}, got {tuple(k_shift.shape)}"
        )
    _check_affine(norm, affine, (heads, k.shape[2]), channels)
    _check_tables(q, k, cos, sin, first_token)


def _check_affine(norm: str, affine: tuple[Tensor | None, ...], heads: tuple[int, int], channels: int) -> None:
    for index, name in enumerate(("q_weight", "k_weight", "q_bias", "k_bias")):
        tensor = affine[index]
        if tensor is None:
            continue
        if norm == "none":
            raise ValueError(f"{name} needs a norm, but norm is 'none': omit {name} or choose a norm")
        length = channels * (heads[index % 2] if norm == "rms_norm_across_heads" else 1)
        if tuple(tensor.shape) != (length,):
            raise ValueError(f"{name} must be ({length},) with {norm}, got {tuple(tensor.shape)}")


def _check_tables(q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, first_token: int) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None or cos.shape != sin.shape:
        raise ValueError("cos and sin must be given together and have the same shape")
    batch, tokens, heads, channels = q.shape
    shape = tuple(cos.shape)
    # With fewer key heads than query heads, a table per query head would not match the key heads.
    per_head = len(shape) == 4 and shape[2] == heads == k.shape[2]
    if len(shape) != 4 or shape[0] not in (1, batch) or not (shape[2] == 1 or per_head) or 2 * shape[3] != channels:
        raise ValueError(
            f"cos and sin must be (1 or B, R, 1 or H, D / 2) for q of shape {tuple(q.shape)}, got {shape}"
        )
    if first_token < 0 or first_token + shape[1] > tokens:
        raise ValueError(
            f"the {shape[1]} rotated tokens from first_token {first_token} on must lie within the {tokens} tokens"
        )
