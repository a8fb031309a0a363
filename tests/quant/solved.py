"""A weight and a Hessian for the tests of the solvers: correlated inputs, of which a few channels are large."""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.quant.hessian import Hessian, HessianSum


def inputs(channels: int = 256, tokens: int = 2048, seed: int = 0) -> Tensor:
    """Return inputs of an autoregressive process over the channels, with eight channels ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    noise, x = torch.randn(tokens, channels, generator=generator), torch.zeros(tokens, channels)
    x[:, 0] = noise[:, 0]
    for place in range(1, channels):
        x[:, place] = 0.9 * x[:, place - 1] + 0.19**0.5 * noise[:, place]
    x[:, torch.randperm(channels, generator=generator)[:8]] *= 10
    return x


def example(rows: int = 128, channels: int = 256) -> tuple[Tensor, Hessian]:
    sums = HessianSum(channels)
    sums.add(inputs(channels))
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(1)), sums.finish()
