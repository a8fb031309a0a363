"""Softmax attention (arXiv:1706.03762, eq. 1) in plain torch: the reference.

Shapes: query is (B, N, H, D), key and value are (B, M, Hk, D) with H a multiple of Hk: query head h reads key head
h * Hk // H. `key_lengths` is (B,): of sample b only the first `key_lengths[b]` keys count. The maths is done in
float32 (float64 for float64) and rounded once.
"""

import torch
from torch import Tensor

_BUDGET = 2**26
"""Logits that one chunk of queries may take."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * query @ key^T) @ value, (B, N, H, D), and the logarithm of its divisor, (B, H, N).

    A few queries at a time, so that memory grows with N and not with N * M. A sample of no keys gives 0 and -inf.
    """
    batch, _, heads, channels = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = channels**-0.5 if scale is None else scale
    # (B, Hk, 1, M, D): broadcast over the query heads of a group.
    k, v = (x.to(dtype).transpose(1, 2).unsqueeze(2) for x in (key, value))
    q = query.to(dtype).mul(scale).transpose(1, 2).unflatten(1, (key.shape[2], -1))
    hidden = None if key_lengths is None else _beyond(key_lengths.to(query.device), key.shape[1])
    chunk = max(1, _BUDGET // (batch * heads * key.shape[1]))
    parts = [_attend(part, k, v, hidden) for part in q.split(chunk, dim=3)]
    out, lse = (torch.cat(each, dim=3).flatten(1, 2) for each in zip(*parts, strict=True))
    return out.transpose(1, 2).to(query.dtype), lse.squeeze(-1)


def key_mask(key_lengths: Tensor, keys: int) -> Tensor:
    """Return which keys count, (B, 1, 1, M), as `scaled_dot_product_attention` takes it."""
    return ~_beyond(key_lengths, keys).squeeze(1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join what the same queries got from disjoint sets of keys: (out, lse) of each -> (out, lse) of their union."""
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
    # Where no key counts everything is -inf: the difference must stay so, not become nan.
    share = (logits - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    return share @ v, lse


def _beyond(key_lengths: Tensor, keys: int) -> Tensor:
    return torch.arange(keys, device=key_lengths.device) >= key_lengths.view(-1, 1, 1, 1, 1)
