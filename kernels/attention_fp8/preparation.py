"""The preparation of queries, keys and values before they are rounded to E4M3, which lowers the error of rounding.

Every transformation is exact: softmax(scale * q @ k^T) @ v stays the same, up to the rounding of float32, once the
transformation is undone in the output and the LSE.

- key_mean: softmax does not change when the same vector is added to all keys. So the mean key of each head is
  subtracted (arXiv:2410.02367, eq. 6), and scale * (q @ mean) is added to the LSE.
- balance: each channel of the queries is multiplied by a factor, and the same channel of the keys is divided by it, so
  that both have the same root mean square. The error of a logit grows with |q| |k|, which this choice minimises.
- rotation: queries and keys are multiplied by the same orthogonal matrix, a Hadamard matrix with random signs, which
  spreads outlier channels over all channels (arXiv:2407.08608, section 3.3).
- value_mean: the weights of softmax sum to 1. So the mean of each channel of the values is subtracted, and added to
  the output again. Rounding shifts the mean of the remaining values. This shift is subtracted from the output too,
  which removes its effect completely where all keys have equal weights.
- value_scale: each channel of the values is divided by its largest absolute value, and the output is multiplied by it.

Together they are one subtraction and one factor per channel, then optionally the matrix:
((x - minus) * times) @ matrix.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from postgen.kernels.fp8 import fp8_scale

_SMALLEST_SCALE = 2.0**-60
"""The smallest scale of queries and of keys. cuDNN multiplies both scales and the factor of the logits in float32. If
this product underflows, as it would for tensors of zeros, the outputs of cuDNN are NaN."""
_FURTHEST = 1e8
"""The largest factor of a channel in `balance`, relative to that of the whole tensor; the smallest is its inverse."""
_FURTHEST_WHOLE = 1e10
"""The largest factor of the whole tensor in `balance`; the smallest is its inverse. Both limits together, divided by
the smallest scale, are finite in float32."""
_SMALLEST_ROOT = torch.finfo(torch.float32).tiny ** 0.25
"""The root that `balance` uses for tensors of zeros."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Which of the exact transformations are used; the docstring of this module explains each."""

    key_mean: bool = True
    balance: bool = True
    rotation: bool = True
    value_mean: bool = True
    value_scale: bool = False

    def __str__(self) -> str:
        """Return the text that `parsed` reads: the names joined by "+", or "plain" for none."""
        return "+".join(each.name for each in fields(self) if getattr(self, each.name)) or "plain"

    @classmethod
    def parsed(cls, text: str) -> Preparation:
        """Parse the text of a preparation: names joined by "+", or "plain".

        Raises:
            ValueError: a name is unknown; the message lists the known names.

        >>> str(Preparation.parsed("rotation+key_mean"))
        'key_mean+rotation'
        """
        known = [each.name for each in fields(cls)]
        names = set() if text == "plain" else set(text.split("+"))
        if strange := sorted(names - set(known)):
            raise ValueError(
                f"unknown preparation {strange[0]!r}. Known: plain, or some of {', '.join(known)} joined by +"
            )
        return cls(**{name: name in names for name in known})


CANDIDATES = tuple(
    map(
        Preparation.parsed,
        (
            "plain",
            "key_mean",
            "key_mean+value_mean",
            "key_mean+rotation+value_mean",
            "key_mean+balance+rotation+value_mean",
            "key_mean+balance+rotation+value_mean+value_scale",
        ),
    )
)
"""The preparations that calibration compares, from the fewest operations to the most."""


class Channels(NamedTuple):
    """Statistics of the channels of queries, keys or values over all tokens; each is (B, 1, H, D)."""

    mean: Tensor
    square: Tensor
    """The mean of the squares."""
    low: Tensor
    """The smallest value."""
    high: Tensor
    """The largest value."""

    @classmethod
    def of(cls, x: Tensor) -> Channels:
        """Compute the statistics of a tensor (B, N, H, D), in float32 (float64 for float64)."""
        x = x.to(wide(x))
        low, high = x.aminmax(dim=1, keepdim=True)
        return cls(x.mean(1, keepdim=True), x.square().mean(1, keepdim=True), low, high)

    def reach(self, centre: Tensor | None) -> Tensor:
        """Return the largest distance of the values of each channel from a centre, or from 0 for None."""
        if centre is None:
            return torch.maximum(self.high, -self.low)
        return torch.maximum(self.high - centre, centre - self.low)

    def spread(self, centre: Tensor | None) -> Tensor:
        """Return the mean squared distance from the mean of the channel (`centre`), or from 0 for None."""
        if centre is None:
            return self.square
        # The difference loses its digits where the mean is large, so the largest distance bounds it or replaces it.
        most, found = self.reach(centre).square(), (self.square - centre.square()).clamp_min(0)
        return torch.where(found == 0, most, torch.minimum(found, most))


class Change(NamedTuple):
    """The transformation of one tensor before the rotation, (x - minus) * times; both are (B, 1, H, D)."""

    minus: Tensor | None
    times: Tensor

    def __call__(self, x: Tensor, matrix: Tensor | None) -> Tensor:
        """Return the transformed tensor (B, N, H, D); with a matrix (D, D) it is also rotated."""
        x = x.to(self.times.dtype)
        x = (x if self.minus is None else x - self.minus) * self.times
        return x if matrix is None else x @ matrix


class Undo(NamedTuple):
    """Converts output and LSE of the prepared tensors to those of the original inputs; tensors are (B, 1, H, D)."""

    factor: Tensor | None
    """The factor of the output (`value_scale`)."""
    value_mean: Tensor | None
    """Added to the output after the factor (`value_mean`)."""
    key_mean: Tensor | None
    """The mean that was subtracted from the keys (`key_mean`)."""

    def output(self, out: Tensor) -> Tensor:
        """Return the output (B, N, H, D) for the original inputs."""
        out = out if self.factor is None else out * self.factor
        return out if self.value_mean is None else out + self.value_mean

    def lse(self, lse: Tensor, query: Tensor, scale: float) -> Tensor:
        """Return the LSE (B, H, N) for the original inputs.

        Args:
            lse: the LSE for the prepared tensors, (B, H, N).
            query: the original queries, (B, N, H, D).
            scale: factor of the logits.
        """
        if self.key_mean is None:
            return lse
        return lse + scale * torch.einsum("bnhd,bhd->bhn", query.to(self.key_mean.dtype), self.key_mean.squeeze(1))


class Plan(NamedTuple):
    """The transformations of all inputs; a prepared tensor lies within +-448 and represents itself times its scale."""

    query: Change
    key: Change
    value: Change
    rotates: bool
    query_scale: Tensor
    """One float32 number per tensor, like the other two scales."""
    key_scale: Tensor
    value_scale: Tensor
    undo: Undo

    def corrected(self, rounded_mean: Tensor) -> Undo:
        """Return an `Undo` that also removes the shift of the values' mean by rounding.

        Args:
            rounded_mean: (B, 1, H, D), the mean of the prepared values after rounding; before rounding it is 0.
        """
        if self.undo.value_mean is None:
            return self.undo
        left = rounded_mean * self.value_scale
        left = left if self.undo.factor is None else left * self.undo.factor
        return self.undo._replace(value_mean=self.undo.value_mean - left)


def planned(query: Channels, key: Channels, value: Channels, preparation: Preparation) -> Plan:
    """Compute the transformations from the statistics of the channels, without waiting for a GPU."""
    # Queries and keys: mean, balance, and the bounds from which their scales follow.
    centre = key.mean if preparation.key_mean else None
    ratio = torch.ones_like(query.square)
    if preparation.balance:
        ratio = _ratio(query.spread(None), key.spread(centre))
    query_reach, key_reach = query.reach(None) * ratio, key.reach(centre) / ratio
    if preparation.rotation:
        # A rotated number is at most as large as the norm of its row, and the channels bound the norm of all rows.
        query_reach, key_reach = (x.square().sum(-1, keepdim=True).sqrt() for x in (query_reach, key_reach))
    query_scale, key_scale = (fp8_scale(x).view(()).clamp_min(_SMALLEST_SCALE) for x in (query_reach, key_reach))
    # Values: mean, factors of the channels, and scale.
    value_mean = value.mean if preparation.value_mean else None
    factor, value_reach = None, value.reach(value_mean)
    if preparation.value_scale:
        factor = torch.where(value_reach == 0, torch.ones_like(value_reach), value_reach)
        value_reach = value_reach / factor
    value_scale = fp8_scale(value_reach).view(())
    times = torch.ones_like(value_reach) if factor is None else 1 / factor
    return Plan(
        query=Change(None, ratio / query_scale),
        key=Change(centre, 1 / (ratio * key_scale)),
        value=Change(value_mean, times / value_scale),
        rotates=preparation.rotation,
        query_scale=query_scale,
        key_scale=key_scale,
        value_scale=value_scale,
        undo=Undo(factor, value_mean, centre),
    )


def _ratio(query: Tensor, key: Tensor) -> Tensor:
    """Return the factor of the queries in `balance`: the fourth root of key / query.

    Where one of them is 0, the channel adds nothing to any logit. The factor is then the largest or smallest one, so
    that the other tensor's numbers in this channel become small and do not cost the other channels precision.

    Both are mean squares of the channels, (B, 1, H, D).
    """
    # Take the roots before the quotient, which could overflow in float32.
    of_query, of_key = (x.sqrt().sqrt() for x in (query, key))
    # The limits are relative to the largest channels, so that they do not depend on the units of the tensors.
    tops = [x.amax().clamp_min(_SMALLEST_ROOT) for x in (of_query, of_key)]
    whole = (tops[1] / tops[0]).clamp(1 / _FURTHEST_WHOLE, _FURTHEST_WHOLE)
    ratio = (of_key / of_query).clamp(whole / _FURTHEST, whole * _FURTHEST)
    return torch.where((query == 0) & (key == 0), whole, ratio)


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype in which statistics and transformations are computed: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.cache
def signs(channels: int) -> Tensor:
    """Return a Hadamard matrix with fixed random signs, (D, D) of -1, 0 and 1, on the CPU.

    If D is not a power of two, the matrix is block-diagonal. A block has the largest power of two that divides D: 16
    channels for D = 112 or 80, and 32 for D = 96. Without signs a vector of equal channels would become one large
    channel.
    """
    size = channels & -channels
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    flips = torch.randint(0, 2, (channels, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    matrix: Tensor = torch.block_diag(*[block] * (channels // size))
    return matrix * flips


def row_length(channels: int) -> float:
    """Return the Euclidean norm of the rows of `signs`."""
    return float((channels & -channels) ** 0.5)


def rotation(channels: int, like: Tensor) -> Tensor:
    """Return the orthogonal matrix (D, D) of `rotation`, in the dtype and on the device of a tensor."""
    matrix: Tensor = (signs(channels).double() / row_length(channels)).to(like)
    return matrix
