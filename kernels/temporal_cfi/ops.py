"""`temporal_self_share` as a torch custom operation: the kernel of `triton.py` on a GPU, plain torch elsewhere.

The plain torch path processes a few locations at a time, so that its memory does not grow with the video. The kernel
needs no extra memory. `naive.py` has the shapes. The operation has no gradient: its caller uses the result as a
constant.
"""

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import check_devices, uses_triton

MAX_TILE_BYTES = 32768
"""The largest tile that the kernel can hold: T rows of D numbers, T and D each rounded up to a power of 2. 32,768
bytes are T = 64 with D = 128 in float32."""
_BUDGET = 64 * 2**20
"""How many bytes the buffers of one chunk of locations may take if `chunk_size` is None."""


@library.custom_op("postgen::temporal_self_share", mutates_args=())
def temporal_self_share(
    query: Tensor, key: Tensor, scale: float | None = None, causal_block: int = 0, chunk_size: int | None = None
) -> Tensor:
    """Return the mean diagonal of the temporal attention maps of each sample, (B,), between 0 and 1.

    The operation computes and returns float32 (float64 for float64 inputs).

    Args:
        query: (B, T, S, H, D), any strides.
        key: (B, T, S, Hk, D), any strides; H is a multiple of Hk.
        scale: factor of the logits; None is D ** -0.5.
        causal_block: the number of frames in a block; a frame does not attend to later blocks. 0 is no mask.
        chunk_size: how many locations the plain torch path processes at a time; None takes as many as fit 64 MiB.

    Raises:
        ValueError: the shapes or devices do not match, an input is empty, `causal_block` is negative, or `chunk_size`
            is less than 1.
    """
    check_devices("temporal_self_share", query, key)
    _check(query, key, causal_block, chunk_size)
    if uses_triton("temporal_self_share", query, key, obstacle=_obstacle(query, key)):
        from postgen.kernels.temporal_cfi import triton

        return triton.temporal_self_share(query, key, scale=scale, causal_block=causal_block)
    # Autocast would compute the products in half precision.
    with torch.autocast(query.device.type, enabled=False):
        return _share(query, key, scale, causal_block, chunk_size)


@temporal_self_share.register_fake
def _(
    query: Tensor, key: Tensor, scale: float | None = None, causal_block: int = 0, chunk_size: int | None = None
) -> Tensor:
    check_devices("temporal_self_share", query, key)
    return query.new_empty(query.shape[0], dtype=_compute_dtype(query))


def _share(query: Tensor, key: Tensor, scale: float | None, causal_block: int, chunk_size: int | None) -> Tensor:
    batch, frames, places, heads, channels = query.shape
    scale = channels**-0.5 if scale is None else scale
    dtype = _compute_dtype(query)
    chunk = min(places, chunk_size or _locations_within(_BUDGET, query, dtype))
    # Every chunk is copied into these buffers; that one copy casts, transposes and repeats the key heads.
    q_BSHTD = query.new_empty(batch, chunk, heads, frames, channels, dtype=dtype)
    k_BSHTD = torch.empty_like(q_BSHTD)
    mask = _later_blocks(frames, causal_block, query.device)
    total = query.new_zeros(batch, dtype=dtype)
    for low in range(0, places, chunk):
        count = min(chunk, places - low)
        q, k = q_BSHTD[:, :count], k_BSHTD[:, :count]
        q.copy_(query[:, :, low : low + count].permute(0, 2, 3, 1, 4))
        k_grouped = k.unflatten(2, (key.shape[3], -1))
        k_grouped.copy_(key[:, :, low : low + count].permute(0, 2, 3, 1, 4).unsqueeze(3))
        logits = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
        if mask is not None:
            logits.masked_fill_(mask, float("-inf"))
        own = logits.diagonal(dim1=-2, dim2=-1) - logits.logsumexp(dim=-1)
        total += own.exp_().sum(dim=(1, 2, 3))
    return total / (places * heads * frames)


def _compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _locations_within(budget: int, query: Tensor, dtype: torch.dtype) -> int:
    """Return how many locations fit the budget: each needs two (T, D) buffers and about four (T, T) maps per head."""
    batch, frames, _, heads, channels = query.shape
    each = batch * heads * (2 * frames * channels + 4 * frames * frames) * dtype.itemsize
    return max(1, budget // each)


def _later_blocks(frames: int, causal_block: int, device: torch.device) -> Tensor | None:
    if not causal_block:
        return None
    block = torch.arange(frames, device=device) // causal_block
    return block[None, :] > block[:, None]


def _obstacle(query: Tensor, key: Tensor) -> str | None:
    """Return why the kernel cannot process these tensors, apart from the reasons that `dispatch` checks, or None."""
    frames, channels = query.shape[1], query.shape[4]
    if query.dtype != key.dtype:
        return f"query is {query.dtype}, key is {key.dtype}"
    tile = _power_of_2(frames) * _power_of_2(channels) * query.element_size()
    if tile > MAX_TILE_BYTES:
        return f"{frames} frames of {channels} channels need a tile of {tile} bytes, at most {MAX_TILE_BYTES} fit"
    return None


def _power_of_2(length: int) -> int:
    return max(16, 1 << (length - 1).bit_length())


def _check(query: Tensor, key: Tensor, causal_block: int, chunk_size: int | None) -> None:
    if query.dim() != 5 or key.dim() != 5:
        raise ValueError(f"query and key must be (B, T, S, heads, D), got {tuple(query.shape)} and {tuple(key.shape)}")
    (*places, heads, channels), (*key_places, key_heads, key_channels) = query.shape, key.shape
    if places != key_places or channels != key_channels:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} may differ only in the number of heads"
        )
    if query.numel() == 0 or key.numel() == 0:
        raise ValueError(f"query and key must not be empty, got {tuple(query.shape)} and {tuple(key.shape)}")
    if heads % key_heads:
        raise ValueError(f"the {heads} query heads must be a multiple of the {key_heads} key heads")
    if causal_block < 0:
        raise ValueError(f"causal_block must be at least 0 frames, 0 is no mask, got {causal_block}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
