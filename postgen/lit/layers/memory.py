"""The frame-wise memory of the window layers: what a frame writes, and what the frames after it read
(arXiv:2609.20744).

Of the tokens s of frame f, with keys k and values v of a head (D x D for A and B):

    A_f = c sum_s b_s k_s k_s^T,  B_f = sqrt(c) sum_s b_s v_s k_s^T,  c = min(1, D / S)
    S_f = (S_{f-1} diag(alpha_f) + B_f)(I + A_f)^-1

the minimiser of ||S - S_{f-1} diag(alpha_f)||^2 + sum_s b_s ||S sqrt(c) k_s - v_s||^2; so the order of the tokens in a
frame does not matter. Without A it is a decayed sum. Memories run forward from the first frame and backward from the
last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.lit.features import no_autocast


@dataclass(frozen=True, kw_only=True, slots=True)
class Writes:
    """What frames write, float32 or float64."""

    inverse: Tensor | None
    """(I + A)^-1, (B, F, H, D, D); None: a decayed sum."""
    content: Tensor
    """B, (B, F, H, D of values, D of keys)."""
    log_decay: Tensor
    """log(alpha), (B, F, H, D), not positive."""

    def frames(self, first: int, stop: int | None = None) -> Writes:
        """Return those of some frames."""
        part = slice(first, stop)
        inverse = None if self.inverse is None else self.inverse[:, part]
        return Writes(inverse=inverse, content=self.content[:, part], log_decay=self.log_decay[:, part])

    def without(self, frames: list[int]) -> Writes:
        """Return them as if some frames wrote nothing; time goes on."""
        if not frames:
            return self
        keep = torch.ones(self.content.shape[1], dtype=torch.bool, device=self.content.device)
        keep[frames] = False
        keep = keep[:, None, None, None]
        inverse = None if self.inverse is None else torch.where(keep, self.inverse, _identity(self.inverse))
        return Writes(inverse=inverse, content=torch.where(keep, self.content, 0), log_decay=self.log_decay)

    def followed_by(self, later: Writes) -> Writes:
        """Return these and those of the frames after them."""
        parts = self.inverse, later.inverse
        return Writes(
            inverse=None if parts[0] is None or parts[1] is None else torch.cat([parts[0], parts[1]], dim=1),
            content=torch.cat([self.content, later.content], dim=1),
            log_decay=torch.cat([self.log_decay, later.log_decay], dim=1),
        )


def written(key: Tensor, value: Tensor, strength: Tensor, log_decay: Tensor, *, delta: bool, scale: bool) -> Writes:
    """Return what frames write.

    Args:
        key: (B, F, S, H, D), of length 1.
        value: as `key`.
        strength: b, (B, F, S, H), in (0, 1).
        log_decay: (B, F, H, D).
        delta: whether there is an A.
        scale: whether c is min(1, D / S), else 1.
    """
    weighed = key * strength[..., None]
    gram = torch.einsum("bfshd,bfshe->bfhde", weighed, key) if delta else None
    content = torch.einsum("bfshd,bfshe->bfhde", value, weighed)
    return solved(gram, content, log_decay, places=key.shape[2], scale=scale)


def solved(gram: Tensor | None, content: Tensor, log_decay: Tensor, *, places: int, scale: bool) -> Writes:
    """Return what frames write.

    Args:
        gram: A without c, (B, F, H, D, D); None: there is none.
        content: B without its root of c, (B, F, H, D, D).
        log_decay: (B, F, H, D).
        places: S, tokens of a frame.
        scale: whether c is min(1, D / S), else 1.
    """
    c = min(1.0, content.shape[-1] / places) if scale else 1.0
    inverse = None if gram is None else inverse_of(c * gram)
    return Writes(inverse=inverse, content=c**0.5 * content, log_decay=log_decay)


def inverse_of(gram: Tensor) -> Tensor:
    """Return (I + A)^-1 of matrices A (..., D, D) that are symmetric and not negative: both scans need it.

    The eigenvalues of I + A are at least 1, so nothing is lost in float32; bfloat16 would lose a part in 400.
    """
    identity = _identity(gram)
    # Without the check of `cholesky`, for which the host would wait for the GPU in every layer; NaN stays NaN.
    factor = torch.linalg.cholesky_ex(gram + identity).L
    return torch.cholesky_solve(identity.expand_as(gram), factor)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def step(memory: Tensor, writes: Writes, frame: int) -> Tensor:
    """Return the memory (B, H, D, D) after a frame, S_f of S_{f-1}."""
    held = memory * writes.log_decay[:, frame].exp()[..., None, :] + writes.content[:, frame]
    with no_autocast(held):
        return held if writes.inverse is None else held @ writes.inverse[:, frame]


def scan(writes: Writes, *, backward: bool = False, start: Tensor | None = None) -> list[Tensor]:
    """Return the memory before each frame and after the last one, F + 1 of them; backward, after each frame in time.

    Args:
        writes: of the frames.
        backward: from the last frame to the first: entry f holds frames f, f + 1, ... and entry F nothing.
        start: what the first memory holds; None is nothing. Forward only.
    """
    count = writes.content.shape[1]
    memory = torch.zeros_like(writes.content[:, 0]) if start is None else start
    found = [memory]
    for frame in reversed(range(count)) if backward else range(count):
        memory = step(memory, writes, frame)
        found.append(memory)
    return found[::-1] if backward else found


def decayed(memory: Tensor, log_decay: Tensor) -> Tensor:
    """Return the memory (B, H, D, D) after frames that write nothing, with their log(alpha) (B, f, H, D)."""
    return memory * log_decay.sum(dim=1).exp()[..., None, :]
