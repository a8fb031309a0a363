"""Read placed memory: find the cells of coming frames in stored frames, in rollouts and in training.

A sight is a tensor (B, T, 3, h, w) float32 for T coming frames. For each cell of a coming frame it holds the number of
the stored frame that shows the cell (-1: no stored frame shows it), and the row and the column in that stored frame,
in cells and fractions of cells.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gathered(latents: Tensor, sight: Tensor) -> Tensor:
    """Gather the latents at the positions of a sight, (B, C + 1, T, h, w) float32; the last channel is the mask.

    Latents are interpolated bilinearly between cells. Positions beyond the edge of a frame have the value at the edge.
    Cells that no stored frame shows are 0.

    Args:
        latents: (B, C, n, h, w) of the stored frames.
        sight: (B, T, 3, h, w) whose frame numbers are positions in `latents`.
    """
    channels, height, width = latents.shape[1], *latents.shape[-2:]
    source, rows, columns = sight.flatten(3).transpose(1, 2).flatten(2).unbind(1)  # (B, T * h * w)
    known, flat = source >= 0, latents.flatten(2)
    first = source.clamp_min(0).long() * height * width
    top, left = rows.floor(), columns.floor()
    down, right = rows - top, columns - left
    found = torch.zeros(len(flat), channels, first.shape[1], device=flat.device)
    for y, x, weight in (
        (top, left, (1 - down) * (1 - right)),
        (top, left + 1, (1 - down) * right),
        (top + 1, left, down * (1 - right)),
        (top + 1, left + 1, down * right),
    ):
        place = first + y.long().clamp(0, height - 1) * width + x.long().clamp(0, width - 1)
        corner = flat.gather(2, place[:, None].expand(-1, channels, -1)).float()
        found = found + weight[:, None] * corner
    seen = torch.cat([torch.where(known[:, None], found, 0), known[:, None].float()], 1)
    return seen.view(*seen.shape[:2], sight.shape[1], height, width)


def with_noise(seen: Tensor, level: Tensor | float, noise: Tensor) -> Tensor:
    """Add noise to the RGB channels of known cells: (1 - level) z + level e.

    Args:
        seen: (B, M * C + 1, T, h, w) from `gathered`; the mask is the last channel.
        level: noise level, or (B, 1, 1, 1, 1) with one level per row.
        noise: (B, C, T, h, w).
    """
    channels = noise.shape[1]
    rgb, mask = seen[:, :channels], seen[:, -1:]
    return torch.cat([mask * ((1 - level) * rgb + level * noise), seen[:, channels:]], 1)


def snapped(positions: Tensor) -> Tensor:
    """Round positions that are within 1e-6 of a whole number, so that an equal view returns equal bits."""
    whole = positions.round()
    return torch.where((positions - whole).abs() < 1e-6, whole, positions)


def rounded(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the index of the nearest cell in a grid, and whether the position lies in the grid."""
    y, x = rows.round().long(), columns.round().long()
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return y.clamp(0, height - 1) * width + x.clamp(0, width - 1), inside
