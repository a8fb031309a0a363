"""The share of its temporal attention that a frame gives to itself: the reference.

Enhance-A-Video (arXiv:2502.07508, eq. 6) reshapes the queries and keys of a video to temporal attention, with one
(T, T) map A per sample, location and head. It averages the elements off the diagonal: the cross-frame intensity is
CFI = sum_{i!=j} A_ij / (T (T-1)). The rows of A sum to 1, so the mean d of the diagonal determines the CFI:
CFI = (1 - d) / (T - 1). This operation returns d.

Shapes: B samples, T frames, S locations, H heads, D channels per head.
"""

import torch
from torch import Tensor


def temporal_self_share(query: Tensor, key: Tensor, *, scale: float | None = None, causal_block: int = 0) -> Tensor:
    """Return the mean diagonal of the temporal attention maps of each sample, (B,), between 0 and 1.

    Args:
        query: (B, T, S, H, D), after the norm and the rotary embedding.
        key: (B, T, S, Hk, D), after the norm and the rotary embedding; H is a multiple of Hk (grouped queries).
        scale: factor of the logits; None is D ** -0.5.
        causal_block: the number of frames in a block; a frame does not attend to later blocks. 0 is no mask.
    """
    frames, heads, channels = query.shape[1], query.shape[3], query.shape[4]
    key = key.repeat_interleave(heads // key.shape[3], dim=3)
    scale = channels**-0.5 if scale is None else scale
    logits = scale * torch.einsum("bishd,bjshd->bshij", query, key)
    if causal_block:
        block = torch.arange(frames, device=query.device) // causal_block
        logits = logits.masked_fill(block[None, :] > block[:, None], float("-inf"))
    attention = logits.softmax(dim=-1)
    return attention.diagonal(dim1=-2, dim2=-1).mean(dim=(1, 2, 3))
