"""Test inputs for grid convolutions: tokens in a grid and the weights of the convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CASES = {
    "space": {"space": 5, "added": True},
    "time": {"time": 5, "added": True},
    "both": {"space": 3, "time": 3, "added": True},
    "nothing added": {"space": 5, "time": 3},
}
"""Name -> side lengths of the weights and whether the tokens are added to the result."""


def case(
    name: str, grid: tuple[int, int, int], heads: int, channels: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """Return the tokens (a strided view), the two weights of a case, and whether the tokens are added."""
    generator = torch.Generator(device).manual_seed(len(name))
    given: dict[str, Any] = {"generator": generator, "device": device}
    frames, rows, columns = grid
    x = torch.randn(2, frames * rows * columns, 3 * heads, channels, **given).to(dtype)[:, :, heads : 2 * heads]
    sides = CASES[name]
    space, time = sides.get("space"), sides.get("time")
    return (
        x,
        None if space is None else torch.randn(heads * channels, space, space, **given),
        None if time is None else torch.randn(heads * channels, time, **given),
        bool(sides.get("added", False)),
    )
