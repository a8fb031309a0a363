"""`linear_attention` as a custom operation with gradients: Triton kernels on a GPU, plain torch elsewhere.

See `naive.py` for formulas and shapes. One more custom operation computes the gradients of the products, feature map,
rotary embedding and convolution. The gradient of the RMSNorms is plain torch, which torch.compile fuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import check_devices, uses_triton
from postgen.kernels.linear_attention import naive
from postgen.kernels.linear_attention.naive import Terms, rope_table

__all__ = ["linear_attention", "linear_attention_backward", "linear_attention_with_state", "rope_table"]

MAX_CHANNELS = 256
"""Largest number of channels per head that the kernels support."""
WHOLE_CHANNELS = 128
"""Largest number of channels per head for which one program holds S in registers. For wider heads each program
computes a part of S."""
SHARED_MEMORY = {64: 99 * 1024, MAX_CHANNELS: 163 * 1024}
"""Largest number of channels -> bytes of shared memory that a program of the largest kernel needs."""
_TENSORS = (
    "query_weight", "key_weight", "conv_space", "conv_time", "rope", "key_lengths", "state", "key_sum"
)  # fmt: skip
"""Tensor fields of `Terms`, in the order of the operations' arguments."""
NORMS = (None, "rms_norm", "rms_norm_across_heads")
FEATURE_MAPS = ("relu", "elu")


def linear_attention(query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> Tensor:
    """Return linear attention of all queries over all keys, (B, N, H, D) in the dtype of the queries, contiguous.

    Sums are in float32 for every dtype of the inputs, except that float64 inputs use float64.

    Args:
        query: (B, N, H, D), any strides; views of a fused projection are not copied.
        key: (B, M, H, D), any strides.
        value: (B, M, H, D), any strides.
        **terms: the fields of `naive.Terms`: feature map, rotary embedding, norms, convolutions, lengths, state.

    Raises:
        ValueError: shapes, names, dtypes or devices do not fit together, or `rope` requires a gradient.
        TypeError: an unknown option.
    """
    return linear_attention_with_state(query, key, value, **terms)[0]


def linear_attention_with_state(
    query: Tensor, key: Tensor, value: Tensor, **terms: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `linear_attention`, and the sums S (B, H, D, D) and k' (B, H, D) for the next chunk of a stream.

    Pass the sums as `state` and `key_sum` with the next chunk. The queries of a chunk then attend to the keys of this
    chunk and of all earlier chunks. Positions must continue from chunk to chunk: give `rope` the table of the chunk's
    positions. The convolution along time reads the tokens of its chunk only.
    """
    chosen = Terms(**terms)
    _check_triples(chosen)
    if torch.is_grad_enabled() and chosen.rope is not None and chosen.rope.requires_grad:
        raise ValueError("rope requires a gradient, but linear attention has no gradient for rope: pass rope.detach()")
    out, state, key_sum = _forward(*_arguments(query, key, value, chosen))
    return out, state, key_sum


@library.custom_op("postgen::linear_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    conv_space: Tensor | None,
    conv_time: Tensor | None,
    rope: Tensor | None,
    key_lengths: Tensor | None,
    state: Tensor | None,
    key_sum: Tensor | None,
    feature_map: str,
    qk_norm: str,
    epsilons: list[float],
    grid: list[int],
    rope_pairs: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (query_weight, key_weight, conv_space, conv_time, rope, key_lengths, state, key_sum)
    check_devices("linear_attention", query, key, value, *tensors)
    terms = _terms(tensors, feature_map, qk_norm, epsilons, grid, rope_pairs)
    _check(query, key, value, terms)
    if _on_kernel("linear_attention", query, key, value):
        from postgen.kernels.linear_attention import triton

        return triton.linear_attention(query, key, value, terms)
    # Autocast would compute the products in half precision.
    with torch.autocast(query.device.type, enabled=False):
        out, total, total_key = naive.linear_attention(query, key, value, terms)
    return out.contiguous(), total.contiguous(), total_key.contiguous()


@library.custom_op("postgen::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    gradient: Tensor,
    of_state: Tensor | None,
    of_key_sum: Tensor | None,
    total: Tensor,
    total_key: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    conv_space: Tensor | None,
    conv_time: Tensor | None,
    rope: Tensor | None,
    key_lengths: Tensor | None,
    feature_map: str,
    qk_norm: str,
    epsilons: list[float],
    grid: list[int],
    rope_pairs: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, conv_space, conv_time, state and key_sum, for autograd.

    `total` and `total_key` are the sums that the forward pass returned. The gradient of a weight that is None is an
    empty tensor. The gradients of query and key are those after their norm.
    """
    tensors = (query_weight, key_weight, conv_space, conv_time, rope, key_lengths, None, None)
    terms = _terms(tensors, feature_map, qk_norm, epsilons, grid, rope_pairs)
    given = (gradient, of_state, of_key_sum, query, key, value, total, total_key)
    if _on_kernel("linear_attention_backward", query, key, value, gradient):
        from postgen.kernels.linear_attention import triton

        found = triton.linear_attention_backward(*given, terms)
    else:
        with torch.autocast(query.device.type, enabled=False):
            found = naive.linear_attention_backward(*given, terms)
    nothing = query.new_empty(0)
    return (
        found.query.contiguous(),
        found.key.contiguous(),
        found.value.contiguous(),
        nothing.clone() if found.conv_space is None else found.conv_space.contiguous(),
        nothing.clone() if found.conv_time is None else found.conv_time.contiguous(),
        found.state.contiguous(),
        found.key_sum.contiguous(),
    )


@_forward.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("linear_attention", query, *(each for each in others if isinstance(each, Tensor)))
    return query.new_empty(query.shape), *_new_sums(query)


@linear_attention_backward.register_fake
def _(
    gradient: Tensor,
    of_state: Tensor | None,
    of_key_sum: Tensor | None,
    total: Tensor,
    total_key: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    conv_space: Tensor | None,
    conv_time: Tensor | None,
    rope: Tensor | None,
    key_lengths: Tensor | None,
    feature_map: str,
    qk_norm: str,
    *_others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_space, of_time = (query.new_empty(0) if x is None else x.new_empty(x.shape) for x in (conv_space, conv_time))
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    of_query = query.new_empty(query.shape, dtype=exact if qk_norm else query.dtype)
    of_key = key.new_empty(key.shape, dtype=exact if qk_norm else key.dtype)
    return of_query, of_key, value.new_empty(value.shape), of_space, of_time, *_new_sums(query)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, query_weight, key_weight, space, time, rope, lengths, state, key_sum, *ctx.settings = inputs
    ctx.starts = [None if each is None else each.dtype for each in (state, key_sum)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], query, key, value, query_weight, key_weight, space, time, rope, lengths)


def _gradients(
    ctx: Any, gradient: Tensor | None, of_state: Tensor | None, of_key_sum: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read only once, because gradient checkpointing allows a single read
    _, _, query, key, _, query_weight, key_weight, space, time, rope, lengths = saved
    gradient = torch.zeros_like(query) if gradient is None else gradient
    of_query, of_key, of_value, of_space, of_time, of_total, of_total_key = linear_attention_backward(
        gradient, of_state, of_key_sum, *saved, *ctx.settings
    )
    terms = _terms((query_weight, key_weight, space, time, rope, lengths, None, None), *ctx.settings)
    of_query, of_query_weight = naive.rms_norm_backward(of_query, query, query_weight, terms)
    of_key, of_key_weight = naive.rms_norm_backward(of_key, key, key_weight, terms)
    starts = [
        None if dtype is None else each.to(dtype)
        for each, dtype in zip((of_total, of_total_key), ctx.starts, strict=True)
    ]
    filters = [None if space is None else of_space, None if time is None else of_time]
    return of_query, of_key, of_value, of_query_weight, of_key_weight, *filters, None, None, *starts, *[None] * 5


_forward.register_autograd(_gradients, setup_context=_keep)


def _terms(
    tensors: Sequence[Tensor | None],
    feature_map: str,
    qk_norm: str,
    epsilons: Sequence[float],
    grid: Sequence[int],
    rope_pairs: Sequence[int],
) -> Terms:
    """Rebuild `Terms` from the arguments of a custom operation, which are tensors, numbers, texts and lists."""
    return Terms(
        **dict(zip(_TENSORS, tensors, strict=True)),
        feature_map=feature_map,
        qk_norm=qk_norm or None,
        eps=epsilons[0],
        norm_eps=epsilons[1],
        grid=_triple(grid),
        text_first=grid[3] if grid else 0,
        text_last=grid[4] if grid else 0,
        rope_pairs=_triple(rope_pairs),
    )


def _arguments(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> tuple[Any, ...]:
    """Return the positional arguments of `_forward`: `terms` as tensors, texts and lists. `_terms` is the inverse."""
    return (
        query,
        key,
        value,
        *(getattr(terms, name) for name in _TENSORS),
        terms.feature_map,
        terms.qk_norm or "",
        [terms.eps, terms.norm_eps],
        # In one list with the grid, so that the operations keep their signature.
        [*terms.grid, terms.text_first, terms.text_last] if terms.grid else [],
        list(terms.rope_pairs or ()),
    )


def _triple(numbers: Sequence[int]) -> tuple[int, int, int] | None:
    return (numbers[0], numbers[1], numbers[2]) if numbers else None


def _new_sums(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, channels = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    state = query.new_empty(batch, heads, channels, channels, dtype=dtype)
    return state, query.new_empty(batch, heads, channels, dtype=dtype)


def _on_kernel(operation: str, query: Tensor, *others: Tensor) -> bool:
    obstacle = _obstacle(query, *others) if query.is_cuda else None
    return uses_triton(operation, query, *others, obstacle=obstacle)


def _obstacle(query: Tensor, *others: Tensor) -> str | None:
    """Return why the kernels cannot compute this call, beyond the checks of `dispatch`; None if they can."""
    channels = query.shape[-1]
    if channels > MAX_CHANNELS or channels % 2:
        return f"heads have {channels} channels, even numbers up to {MAX_CHANNELS} are supported"
    if channels > WHOLE_CHANNELS and query.dtype != torch.bfloat16:
        return (
            f"heads have {channels} channels in {query.dtype}, more than {WHOLE_CHANNELS} are supported in bfloat16"
            " only"
        )
    if any(each.dtype != query.dtype for each in others):
        return "queries, keys, values and gradients differ in dtype"
    needed = min(size for most, size in SHARED_MEMORY.items() if channels <= most)
    # ROCm has no such property; its GPUs have 64 KiB.
    there = getattr(torch.cuda.get_device_properties(query.device), "shared_memory_per_block_optin", 64 * 1024)
    if there < needed:
        return f"heads of {channels} channels need {needed} bytes of shared memory per program, this GPU has {there}"
    return None


def _check(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> None:
    shapes = ", ".join(f"{tuple(x.shape)}" for x in (query, key, value))
    if any(x.dim() != 4 or x.numel() == 0 for x in (query, key, value)):
        raise ValueError(f"query, key and value must be (B, tokens, H, D) and not empty, got {shapes}")
    batch, _, heads, channels = query.shape
    if key.shape != value.shape or key.shape != (batch, key.shape[1], heads, channels):
        raise ValueError(
            f"query, key and value must have one shape, except that the number of queries may differ, got {shapes}"
        )
    dtypes = [x.dtype for x in (query, key, value)]
    if not all(dtype.is_floating_point for dtype in dtypes) or (torch.float64 in dtypes and len(set(dtypes)) > 1):
        raise ValueError(f"query, key and value must be floating-point, and all or none float64, got {dtypes}")
    if terms.feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {terms.feature_map!r}")
    if terms.qk_norm not in NORMS:
        raise ValueError(f"qk_norm must be one of {', '.join(map(str, NORMS))}, got {terms.qk_norm!r}")
    _check_grid(query, key, terms)
    across = terms.qk_norm == "rms_norm_across_heads"
    expected: dict[str, tuple[int, ...]] = {
        "query_weight": (heads * channels if across else channels,),
        "key_weight": (heads * channels if across else channels,),
        "key_lengths": (batch,),
        "state": (batch, heads, channels, channels),
        "key_sum": (batch, heads, channels),
    }
    for name, shape in expected.items():
        tensor = getattr(terms, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must have the shape {shape} for query, key and value {shapes}, got {tuple(tensor.shape)}"
            )
    if terms.key_lengths is not None and terms.key_lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"key_lengths must be int32 or int64, got {terms.key_lengths.dtype}")
    if (terms.state is None) != (terms.key_sum is None):
        raise ValueError("state and key_sum belong together: pass both or neither")
    if terms.qk_norm is None and (terms.query_weight is not None or terms.key_weight is not None):
        raise ValueError(f"query_weight and key_weight need qk_norm, one of {', '.join(map(str, NORMS[1:]))}")


def _check_triples(terms: Terms) -> None:
    """Check `grid`, `rope_pairs` and the text lengths before they become lists of a custom operation."""
    for name, least in (("grid", 1), ("rope_pairs", 0)):
        numbers = getattr(terms, name)
        if numbers is not None and (len(numbers) != 3 or min(numbers) < least):
            raise ValueError(f"{name} must be three numbers of at least {least}: frames, rows, columns; got {numbers}")
    if min(terms.text_first, terms.text_last) < 0:
        raise ValueError(f"text_first and text_last must be at least 0, got {terms.text_first} and {terms.text_last}")
    if terms.grid is None and naive.text_tokens(terms):
        raise ValueError("text_first and text_last need the grid of the video tokens: pass grid")


def _check_grid(query: Tensor, key: Tensor, terms: Terms) -> None:
    """Refuse rotary tables and convolution weights that do not fit the grid."""
    asks = [name for name in ("rope", "conv_space", "conv_time") if getattr(terms, name) is not None]
    if not asks:
        return
    if terms.grid is None:
        raise ValueError(f"{asks[0]} needs the grid of the tokens: pass grid=(frames, rows, columns)")
    frames, rows, columns = terms.grid
    channels, text = query.shape[-1], naive.text_tokens(terms)
    tokens = frames * rows * columns + text
    if query.shape[1] != tokens or key.shape[1] != tokens:
        raise ValueError(
            f"query and key must have {tokens} tokens, {tokens - text} of the grid {terms.grid} and {text} of text "
            f"(text_first, text_last), got {query.shape[1]} and {key.shape[1]}"
        )
    if terms.rope is not None:
        size = (frames + rows + columns, channels // 2, 2)
        if terms.rope.shape != size or sum(terms.rope_pairs or ()) != channels // 2 or channels % 2:
            raise ValueError(
                f"rope must have the shape {size} and rope_pairs must be three numbers that sum to {channels // 2}, "
                f"got {tuple(terms.rope.shape)} and {terms.rope_pairs}"
            )
    filters = [(each, sides) for each, sides in ((terms.conv_space, 2), (terms.conv_time, 1)) if each is not None]
    square = all(
        each.dim() == sides + 1 and len(set(each.shape[1:])) == 1 and each.shape[1] % 2 for each, sides in filters
    )
    if filters and not (square and {len(each) for each, _ in filters} in ({channels}, {channels * query.shape[2]})):
        raise ValueError(
            f"conv_space and conv_time must be (C, s, s) and (C, s), with s odd and the same C, {channels} or "
            f"{channels * query.shape[2]}, got {', '.join(str(tuple(each.shape)) for each, _ in filters)}"
        )
