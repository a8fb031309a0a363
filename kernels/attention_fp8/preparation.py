"""What is done to queries, keys and values before they are rounded to E4M3, and undone afterwards: nothing is lost.

Every change leaves softmax(scale * q @ k^T) @ v as it is, up to the rounding of float32:

- key_mean: softmax does not see a vector that is added to all keys, so each head's mean key is taken off
  (arXiv:2410.02367, eq. 6); the LSE gets scale * (q @ mean) back.
- balance: each channel of the queries is multiplied by a number and that of the keys divided by it, so that both have
  the same root mean square. A product of rounded rows errs by their lengths, |q| |k|, which is smallest then.
- rotation: queries and keys are multiplied by one orthogonal matrix, a Hadamard matrix with signs, which spreads
  channels of outliers over all (arXiv:2407.08608, section 3.3).
- value_mean: rows of softmax sum to 1, so each channel's mean value can be taken off and added to the output. What
  rounding changed the mean of the rest by is taken off the output too: of keys that weigh alike nothing is left of it.
- value_scale: each channel of the values is divided by its largest number, and the output multiplied by it.

All of it is one product and one difference a channel, then perhaps the matrix: (x - minus) * times @ matrix.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from postgen.kernels.fp8 import fp8_scale

_SMALLEST_SCALE = 2.0**-60
"""Of queries and of keys. cuDNN multiplies both and the scale of the logits in float32: if that underflows, as with
the scales of zeros, its outputs are NaN."""
_FURTHEST = 1e4
"""The most that a channel is multiplied by to balance it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Which of the exact changes are made; see the head of this file."""

    key_mean: bool = True
    balance: bool = True
    rotation: bool = True
    value_mean: bool = True
    value_scale: bool = False

    def __str__(self) -> str:
        """Return what `parsed` reads."""
        return "+".join(each.name for each in fields(self) if getattr(self, each.name)) or "plain"

    @classmethod
    def parsed(cls, text: str) -> Preparation:
        """Return the preparation of this text.

        Raises:
            ValueError: it names something else; what there is is listed.

        >>> str(Preparation.parsed("rotation+key_mean"))
        'key_mean+rotation'
        """
        known = [each.name for each in fields(cls)]
        names = set() if text == "plain" else set(text.split("+"))
        if strange := sorted(names - set(known)):
            raise ValueError(
                f"unknown preparation {strange[0]!r}. Known: plain, or some of {', '.join(known)} with + between"
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
"""From the one of the fewest operations to that of the most: what calibration chooses from."""


class Channels(NamedTuple):
    """What is known of the channels of queries, keys or values over all tokens; each is (B, 1, H, D)."""

    mean: Tensor
    square: Tensor
    """Mean of the squares."""
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Channels:
        """Look at a tensor (B, N, H, D), in float32 (float64 for float64)."""
        x = x.to(wide(x))
        low, high = x.aminmax(dim=1, keepdim=True)
        return cls(x.mean(1, keepdim=True), x.square().mean(1, keepdim=True), low, high)

    def reach(self, centre: Tensor | None) -> Tensor:
        """Return how far the numbers of each channel lie from a centre, or from 0."""
        if centre is None:
            return torch.maximum(self.high, -self.low)
        return torch.maximum(self.high - centre, centre - self.low)

    def spread(self, centre: Tensor | None) -> Tensor:
        """Return the mean of the squared distances from the mean, or from 0."""
        return self.square if centre is None else (self.square - centre.square()).clamp_min(0)


class Change(NamedTuple):
    """What is done to one tensor before the matrix: (x - minus) * times; both are (B, 1, H, D)."""

    minus: Tensor | None
    times: Tensor

    def __call__(self, x: Tensor, matrix: Tensor | None) -> Tensor:
        """Return the changed tensor."""
        x = x.to(self.times.dtype)
        x = (x if self.minus is None else x - self.minus) * self.times
        return x if matrix is None else x @ matrix


class Undo(NamedTuple):
    """How the output and LSE of what was changed become those of the inputs; tensors are (B, 1, H, D)."""

    factor: Tensor | None
    """What the output is multiplied by."""
    value_mean: Tensor | None
    """What is added to it then."""
    key_mean: Tensor | None
    """What was taken off the keys."""

    def output(self, out: Tensor) -> Tensor:
        """Return the output (B, N, H, D) of the inputs."""
        out = out if self.factor is None else out * self.factor
        return out if self.value_mean is None else out + self.value_mean

    def lse(self, lse: Tensor, query: Tensor, scale: float) -> Tensor:
        """Return the LSE (B, H, N) of the inputs.

        Args:
            lse: of what was changed.
            query: as it was given, (B, N, H, D).
            scale: factor of the logits.
        """
        if self.key_mean is None:
            return lse
        return lse + scale * torch.einsum("bnhd,bhd->bhn", query.to(self.key_mean.dtype), self.key_mean.squeeze(1))


class Plan(NamedTuple):
    """What becomes of the inputs: the changed tensors lie within +-448, and stand for `..._scale` times as much."""

    query: Change
    key: Change
    value: Change
    rotates: bool
    query_scale: Tensor
    """One number, as the others; float32."""
    key_scale: Tensor
    value_scale: Tensor
    undo: Undo

    def corrected(self, rounded_mean: Tensor) -> Undo:
        """Return the undoing that knows what rounding did to the mean of the values.

        Args:
            rounded_mean: (B, 1, H, D), of the changed values after rounding; before it was 0.
        """
        if self.undo.value_mean is None:
            return self.undo
        left = rounded_mean * self.value_scale
        left = left if self.undo.factor is None else left * self.undo.factor
        return self.undo._replace(value_mean=self.undo.value_mean - left)


def planned(query: Channels, key: Channels, value: Channels, preparation: Preparation) -> Plan:
    """Return what is done to tensors of these channels. Nothing waits for a GPU."""
    centre = key.mean if preparation.key_mean else None
    ratio = torch.ones_like(query.square)
    if preparation.balance:
        ratio = _ratio(query.spread(None), key.spread(centre))
    query_reach, key_reach = query.reach(None) * ratio, key.reach(centre) / ratio
    if preparation.rotation:
        # A rotated number is no longer than its row; how long the longest row may be follows from the channels.
        query_reach, key_reach = (x.square().sum(-1, keepdim=True).sqrt() for x in (query_reach, key_reach))
    query_scale, key_scale = (fp8_scale(x).view(()).clamp_min(_SMALLEST_SCALE) for x in (query_reach, key_reach))
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
    """Return what queries are multiplied by to be as wide as the keys; 1 where either has no width."""
    # The fourth root of a quotient, root by root: the quotient may be infinite in float32.
    ratio = (key.sqrt().sqrt() / query.sqrt().sqrt()).clamp(1 / _FURTHEST, _FURTHEST)
    return torch.where((query == 0) | (key == 0), torch.ones_like(ratio), ratio)


def wide(x: Tensor) -> torch.dtype:
    """Return the format in which statistics and changes are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.cache
def signs(channels: int) -> Tensor:
    """Return a Hadamard matrix with signs that are always the same, (D, D) of -1, 0 and 1, on the CPU.

    Where D is no power of two it rotates blocks of the largest one that divides D: 16 channels of 112 or 80, 32 of 96.
    Signs keep a vector of equal channels from becoming one channel.
    """
    size = channels & -channels
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    flips = torch.randint(0, 2, (channels, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    matrix: Tensor = torch.block_diag(*[block] * (channels // size))
    return matrix * flips


def row_length(channels: int) -> float:
    """Return the length of the rows of `signs`."""
    return float((channels & -channels) ** 0.5)


def rotation(channels: int, like: Tensor) -> Tensor:
    """Return the orthogonal matrix, (D, D), in the format and on the device of a tensor."""
    matrix: Tensor = (signs(channels).double() / row_length(channels)).to(like)
    return matrix
