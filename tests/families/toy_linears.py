"""Replacements of linear layers for tests, and functions that make them."""

from __future__ import annotations

from torch import Tensor, nn


class Inside(nn.Module):
    """A replacement that calls the old layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


class Double(nn.Module):
    """A replacement that computes in float64, with its own weights under other names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix = nn.Parameter(linear.weight.detach().double())
        self.offset = None if linear.bias is None else nn.Parameter(linear.bias.detach().double())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.double(), self.matrix, self.offset).to(x.dtype)


class Copied(nn.Linear):
    """A subclass of `nn.Linear` that peft can adapt, like the layers of most quantisation libraries."""


class Sharing(nn.Linear):
    """A replacement that returns half of the old layer's output and shares the old layer's parameter objects."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def sharing(name: str, linear: nn.Linear) -> nn.Module:
    return Sharing(linear)


def inside(name: str, linear: nn.Linear) -> nn.Module:
    return Inside(linear)


def double(name: str, linear: nn.Linear) -> nn.Module:
    return Double(linear)


def copied(name: str, linear: nn.Linear) -> nn.Module:
    made = Copied(linear.in_features, linear.out_features, linear.bias is not None)
    made.load_state_dict(linear.state_dict())
    return made
