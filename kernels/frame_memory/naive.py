"""Reference of the frame-wise linear memory: the writes of frames, the memories and the reads of tokens
(arXiv:2609.20744).

For the tokens s of frame f, with k~ = silu(k) / |silu(k)|, v~ = silu(v) and b = sigmoid(strength) of one head:

    A_f = sum_s b_s k~_s k~_s^T,   B_f = sum_s b_s v~_s k~_s^T

P_f is the memory that all frames up to f have written, and Q_f is the same with time reversed. c_f is the decay of a
frame, and I_f = (I + A_f)^-1, or the identity without A. Frame t reads the memory M_t: the frames before its window
(`low` to `high` - 1) from P and the frames after it from Q, both decayed over the window:

    P_f = (P_{f-1} diag(c_f) + B_f) I_f,   M_t = P_{low-1} diag(c_low .. c_t) + Q_high diag(c_t .. c_{high-1})

A token with the query q reads the memory of its frame. The result is normalised over the channels of a head and gated
per channel:

    y = sigmoid(gate) weight RMSNorm(M q~)

`gated_sum` adds the output of softmax in the window (near), gated per head, and the read (far):
2 sigmoid(g) near + far.

Shapes: B samples, F frames of S tokens, H heads of D channels. All computations are in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def frame_sums(key: Tensor, value: Tensor, strength: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Return A and B, each (B, F, H, D, D), in the dtype of `exact`. In B the value channels come first.

    Args:
        key: (B, F S, H, D).
        value: (B, F S, H, D).
        strength: (B, F S, H), before the sigmoid.
        frames: F.
    """
    k = F.normalize(F.silu(exact(key)), dim=-1).unflatten(1, (frames, -1))
    v = F.silu(value.to(k.dtype)).unflatten(1, (frames, -1))
    weighed = k * strength.to(k.dtype).sigmoid().unflatten(1, (frames, -1))[..., None]
    gram = torch.einsum("bfshd,bfshe->bfhde", weighed, k)
    return gram, torch.einsum("bfshd,bfshe->bfhde", v, weighed)


def frame_memories(inverse: Tensor | None, content: Tensor, log_decay: Tensor, chunk: int, radius: int) -> Tensor:
    """Return the memory that each frame reads, (B, F, H, D, D).

    Args:
        inverse: I_f, (B, F, H, D, D); None for the identity.
        content: B_f, (B, F, H, D, D).
        log_decay: log(c_f), (B, F, H, D), at most 0.
        chunk: frames per chunk; the frames of a chunk share one window.
        radius: chunks before and after a chunk that belong to its window.
    """
    frames, found = content.shape[1], []
    fade = log_decay.exp()[..., None, :]

    def left(order: Iterable[int]) -> Tensor:
        memory = torch.zeros_like(content[:, 0])
        for frame in order:
            memory = memory * fade[:, frame] + content[:, frame]
            memory = memory if inverse is None else memory @ inverse[:, frame]
        return memory

    for frame in range(frames):
        low = max(0, (frame // chunk - radius) * chunk)
        high = min(frames, (frame // chunk + radius + 1) * chunk)
        before = left(range(low)) * fade[:, low : frame + 1].prod(dim=1)
        found.append(before + left(range(frames - 1, high - 1, -1)) * fade[:, frame:high].prod(dim=1))
    return torch.stack(found, dim=1)


def frame_reads(query: Tensor, memory: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Return the normalised and gated reads of the tokens, (B, F S, H, D), in the dtype of the queries.

    Args:
        query: (B, F S, H, D).
        memory: M, (B, F, H, D of values, D of keys).
        weight: weight of the RMSNorm, (D,).
        gate: (B, F S, H, D), before the sigmoid.
        eps: added to the mean square.
    """
    q = F.normalize(F.silu(exact(query)), dim=-1).unflatten(1, (memory.shape[1], -1))
    read = torch.einsum("bfshd,bfhed->bfshe", q, memory.to(q.dtype)).flatten(1, 2)
    read = read * (read.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * exact(weight)
    return (read * exact(gate).sigmoid()).to(query.dtype)


def gated_sum(near: Tensor, far: Tensor, gate: Tensor) -> Tensor:
    """Return 2 sigmoid(gate) near + far in the dtype of `near`.

    Args:
        near: (B, N, H, D).
        far: (B, N, H, D).
        gate: (B, N, H), before the sigmoid.
    """
    return (2 * exact(gate).sigmoid()[..., None] * exact(near) + exact(far)).to(near.dtype)
