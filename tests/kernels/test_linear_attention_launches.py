"""The distribution of the passes of linear attention among programs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from postgen.kernels.linear_attention.triton_launch import LAUNCHES, Launch, strips

SHAPES = [((21, 30, 52), 12), ((21, 45, 80), 40), ((33, 45, 80), 24), ((1, 1, 1), 1), ((2, 7, 9), 3)]
"""The token grid and the number of heads."""
HOW = LAUNCHES["convolution", 128]


@pytest.mark.parametrize("programs", [1, 7, 132, 10**6])
@pytest.mark.parametrize(("grid", "heads"), SHAPES)
def test_every_row_of_every_block_is_taken_once(grid: tuple[int, int, int], heads: int, programs: int) -> None:
    share = strips(grid, heads, Launch(tokens=32, strip=8, programs=programs))
    taken = torch.zeros(heads * share.blocks, grid[1])
    for program in range(share.programs):
        # The same computation as in the kernel.
        others = max(program - share.whole, 0)
        block = min(program, share.whole + others // share.bands)
        top = others % share.bands * share.band
        taken[block, top : grid[1] if program < share.whole else top + share.band] += 1
    assert bool((taken == 1).all())


@pytest.mark.parametrize(("grid", "heads"), SHAPES[:3])
def test_all_processors_are_busy_to_the_end(grid: tuple[int, int, int], heads: int) -> None:
    """The busiest multiprocessor of an H100 reads at most 15 % more rows than the mean, including rows read twice."""
    share = strips(grid, heads, HOW)
    bands = (heads * share.blocks - share.whole) * share.bands
    busiest = share.whole // 132 * (grid[1] + 2) + -(-bands // 132) * (share.band + 4)
    assert busiest <= 1.15 * heads * share.blocks * grid[1] / 132
