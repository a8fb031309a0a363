"""Softmax attention (arXiv:1706.03762, eq. 1) in plain torch: the reference.

Shapes: query is (B, N, H, D), key and value are (B, M, Hk, D), where H is a multiple of Hk and query head h uses key
head h * Hk // H. `key_lengths` is (B,): sample b attends to its first `key_lengths[b]` keys only. The functions
compute in float32 (float64 for float64 inputs) and round once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(scaled queries (B, Hk, G, n, D), keys and values (B, Hk, 1, M, D), mask of the keys to ignore) -> output, LSE."""
_BUDGET = 2**26
"""The largest number of logits of one chunk of queries."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * query @ key^T) @ value, (B, N, H, D), and the LSE, (B, H, N).

    The LSE is the logarithm of the softmax divisor. The function processes the queries in chunks, so that memory grows
    with N and not with N * M. A sample with key length 0 has output 0 and LSE -inf.
    """
    return in_chunks(_attend, query, key, value, scale=scale, key_lengths=key_lengths)


def in_chunks(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `attend` computes for all queries, chunk by chunk: the output (B, N, H, D) and the LSE (B, H, N)."""
    batch, _, heads, channels = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = channels**-0.5 if scale is None else scale
    # (B, Hk, 1, M, D): broadcast over the query heads of a group.
    k, v = (x.to(dtype).transpose(1, 2).unsqueeze(2) for x in (key, value))
    q = query.to(dtype).mul(scale).transpose(1, 2).unflatten(1, (key.shape[2], -1))
    hidden = None if key_lengths is None else _beyond(key_lengths.to(query.device), key.shape[1])
    chunk = max(1, _BUDGET // (batch * heads * key.shape[1]))
    parts = [attend(part, k, v, hidden) for part in q.split(chunk, dim=3)]
    out, lse = (torch.cat(each, dim=3).flatten(1, 2) for each in zip(*parts, strict=True))
    return out.transpose(1, 2).to(query.dtype), lse.squeeze(-1)


def key_mask(key_lengths: Tensor, keys: int) -> Tensor:
    """Return the bool mask (B, 1, 1, M) of the keys to attend to, for `scaled_dot_product_attention`."""
    return ~_beyond(key_lengths, keys).squeeze(1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine the results (out, LSE) of the same queries over disjoint sets of keys into those over all keys."""
    lse = torch.logsumexp(torch.stack([each for _, each in parts]), dim=0)
    shares = [(each - lse).exp().transpose(1, 2).unsqueeze(-1) for _, each in parts]
    out = sum(share * out.to(share.dtype) for share, (out, _) in zip(shares, parts, strict=True))
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), lse


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = q @ k.transpose(-1, -2)
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    lse = logits.logsumexp(dim=-1, keepdim=True)
    # Without any key all logits are -inf: the difference must stay -inf and not become NaN.
    share = (logits - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    return share @ v, lse


def _beyond(key_lengths: Tensor, keys: int) -> Tensor:
    return torch.arange(keys, device=key_lengths.device) >= key_lengths.view(-1, 1, 1, 1, 1)
