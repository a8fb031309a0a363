"""The memory of the window layers: each frame writes to it once, and other frames read from it (arXiv:2609.20744).

For the tokens s of frame f, with the keys k, values v and write strengths b of one head (A, B and S are D x D):

    A_f = c sum_s b_s k_s k_s^T,  B_f = sqrt(c) sum_s b_s v_s k_s^T,  c = min(1, D / S)
    S_f = (S_{f-1} diag(alpha_f) + B_f)(I + A_f)^-1

Here c uses S, the number of tokens per frame, and S_f is the memory after frame f. S_f minimises
||S - S_{f-1} diag(alpha_f)||^2 + sum_s b_s ||S sqrt(c) k_s - v_s||^2, so the order of the tokens within a frame does
not matter. Without A the memory is a decayed sum. One memory runs forward from the first frame, another one backward
from the last frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.lit.features import no_autocast


@dataclass(frozen=True, kw_only=True, slots=True)
class Writes:
    """The terms that F frames write to the memory, in float32 or float64."""

    inverse: Tensor | None
    """(I + A)^-1, (B, F, H, D, D); None for a decayed sum."""
    content: Tensor
    """B, (B, F, H, D of values, D of keys)."""
    log_decay: Tensor
    """log(alpha), (B, F, H, D), at most 0."""

    def frames(self, first: int, stop: int | None = None) -> Writes:
        """Return the writes of the frames from `first` to `stop` - 1."""
        part = slice(first, stop)
        inverse = None if self.inverse is None else self.inverse[:, part]
        return Writes(inverse=inverse, content=self.content[:, part], log_decay=self.log_decay[:, part])

    def without(self, frames: list[int]) -> Writes:
        """Return the writes with the given frames written as empty; the decay of these frames stays."""
        if not frames:
            return self
        keep = torch.ones(self.content.shape[1], dtype=torch.bool, device=self.content.device)
        keep[frames] = False
        keep = keep[:, None, None, None]
        inverse = None if self.inverse is None else torch.where(keep, self.inverse, _identity(self.inverse))
        return Writes(inverse=inverse, content=torch.where(keep, self.content, 0), log_decay=self.log_decay)

    def followed_by(self, later: Writes) -> Writes:
        """Return these writes and the writes of the frames after them, joined along the frames."""
        parts = self.inverse, later.inverse
        return Writes(
            inverse=None if parts[0] is None or parts[1] is None else torch.cat([parts[0], parts[1]], dim=1),
            content=torch.cat([self.content, later.content], dim=1),
            log_decay=torch.cat([self.log_decay, later.log_decay], dim=1),
        )


def written(key: Tensor, value: Tensor, strength: Tensor, log_decay: Tensor, *, delta: bool, scale: bool) -> Writes:
    """Compute the writes of frames from their tokens.

    Args:
        key: (B, F, S, H, D), of unit length.
        value: (B, F, S, H, D).
        strength: b, (B, F, S, H), in (0, 1).
        log_decay: log(alpha), (B, F, H, D).
        delta: True for the ridge problem above; False leaves out A and makes the memory a decayed sum.
        scale: True for c = min(1, D / S), False for c = 1.
    """
    weighed = key * strength[..., None]
    gram = torch.einsum("bfshd,bfshe->bfhde", weighed, key) if delta else None
    content = torch.einsum("bfshd,bfshe->bfhde", value, weighed)
    return solved(gram, content, log_decay, places=key.shape[2], scale=scale)


def solved(gram: Tensor | None, content: Tensor, log_decay: Tensor, *, places: int, scale: bool) -> Writes:
    """Compute the writes of frames from sums over their tokens.

    Args:
        gram: A without the factor c, (B, F, H, D, D); None for a decayed sum.
        content: B without the factor sqrt(c), (B, F, H, D, D).
        log_decay: log(alpha), (B, F, H, D).
        places: S, tokens per frame.
        scale: True for c = min(1, D / S), False for c = 1.
    """
    c = min(1.0, content.shape[-1] / places) if scale else 1.0
    inverse = None if gram is None else inverse_of(c * gram)
    return Writes(inverse=inverse, content=c**0.5 * content, log_decay=log_decay)


def inverse_of(gram: Tensor) -> Tensor:
    """Return (I + A)^-1 for symmetric positive semi-definite matrices A, (..., D, D).

    The forward and the backward scan both use this inverse. The eigenvalues of I + A are at least 1, so float32 is
    precise enough; bfloat16 would have a relative error of 1/400.
    """
    identity = _identity(gram)
    # `cholesky_ex` does not check its input. The check of `cholesky` would make the host wait for the GPU in every
    # layer. NaN stays NaN.
    factor = torch.linalg.cholesky_ex(gram + identity).L
    return torch.cholesky_solve(identity.expand_as(gram), factor)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def step(memory: Tensor, writes: Writes, frame: int) -> Tensor:
    """Return the memory S_f, (B, H, D, D), after frame f, computed from the memory S_{f-1} before the frame."""
    held = memory * writes.log_decay[:, frame].exp()[..., None, :] + writes.content[:, frame]
    with no_autocast(held):
        return held if writes.inverse is None else held @ writes.inverse[:, frame]


def scan(writes: Writes, *, backward: bool = False, start: Tensor | None = None) -> list[Tensor]:
    """Return the F + 1 memories between the frames, each (B, H, D, D).

    Forward, entry f holds the frames before f, so entry 0 is the start and entry F holds all frames. Backward, entry f
    holds the frames f, f + 1, ..., so entry F is the start.

    Args:
        writes: the writes of F frames.
        backward: whether to go from the last frame to the first.
        start: the memory before the first frame; None for zeros. Give it only with backward=False.
    """
    count = writes.content.shape[1]
    memory = torch.zeros_like(writes.content[:, 0]) if start is None else start
    found = [memory]
    for frame in reversed(range(count)) if backward else range(count):
        memory = step(memory, writes, frame)
        found.append(memory)
    return found[::-1] if backward else found


def decayed(memory: Tensor, log_decay: Tensor) -> Tensor:
    """Return the memory after some frames that only decay it and write nothing.

    Args:
        memory: (B, H, D, D).
        log_decay: log(alpha) of these f frames, (B, f, H, D).
    """
    return memory * log_decay.sum(dim=1).exp()[..., None, :]
