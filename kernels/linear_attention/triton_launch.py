"""Launch parameters of the kernels of linear attention: division into programs, and shared compile-time constants."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.linear_attention.naive import Terms, text_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Launch parameters of one pass over the tokens."""

    tokens: int = 64
    """Tokens per tile; a power of 2, at least 16."""
    warps: int = 8
    """Warps per program."""
    stages: int = 2
    """Pipeline stages: tiles that are in flight at the same time."""
    programs: int = 0
    """Approximate number of programs per sample. 0 fills the processors of an H100 two to four times, as evenly as the
    number of heads allows.

    For convolutions: number of programs that run at the same time; 0 for one on each processor of an H100.
    """
    described: bool = False
    """Whether to copy whole tiles with tensor descriptors where possible, see `triton_descriptors.py`."""
    loaded: tuple[int, int] | None = None
    """Warps and stages if descriptors are not possible; None for the same values. Tiles and programs stay the same, so
    the results are bitwise equal."""
    strip: int = 4
    """For convolutions: columns per strip, of which a thread holds one row; a power of 2, at most 16 and `tokens`."""
    channels: int = 128
    """For convolutions: largest number of channels of a head per program; a power of 2, at least 16."""
    stacked: bool = False
    """For convolutions: whether both 16-bit terms of the state are stacked into one matrix of twice as many rows."""
    reserved: int = 0
    """For convolutions: percent of the on-chip memory that is shared memory, the rest is L1 cache; 0 keeps the setting
    of Triton (`triton_cache.py`)."""

    @property
    def by_threads(self) -> Launch:
        """The launch parameters of the same programs without tensor descriptors: threads load the tiles."""
        warps, stages = self.loaded or (self.warps, self.stages)
        return replace(self, warps=warps, stages=stages, described=False)

    @property
    def rows_for_all_warps(self) -> bool:
        """Whether a tile has 16 rows for each warp, the number that a matrix product assigns to a warp."""
        return self.tokens >= 16 * self.warps


LAUNCHES: dict[tuple[str, int], Launch] = {
    ("keys", 64): Launch(warps=4, stages=4, programs=132),
    ("turned_keys", 64): Launch(warps=4, stages=3, programs=264),
    ("keys", 128): Launch(tokens=32, warps=4, stages=4, programs=264, described=True, loaded=(8, 4)),
    ("turned_keys", 128): Launch(tokens=32, warps=4, stages=3, programs=264, described=True, loaded=(8, 3)),
    ("queries", 64): Launch(warps=4, stages=3, programs=528, described=True, loaded=(4, 4)),
    ("turned_queries", 64): Launch(warps=4, stages=1, programs=1056),
    ("queries", 128): Launch(warps=4, stages=4, programs=528, described=True, loaded=(8, 3)),
    ("turned_queries", 128): Launch(programs=528, described=True),
    ("grad_queries", 64): Launch(warps=4, stages=4, programs=264, described=True, loaded=(4, 2)),
    ("turned_grad_queries", 64): Launch(warps=4, stages=2),
    ("grad_queries", 128): Launch(warps=4, stages=4, programs=528, described=True, loaded=(8, 3)),
    ("turned_grad_queries", 128): Launch(),
    ("grad_sums", 64): Launch(warps=4, stages=4, programs=264, described=True, loaded=(4, 3)),
    ("turned_grad_sums", 64): Launch(warps=4, stages=3, programs=264),
    ("grad_sums", 128): Launch(warps=4, stages=3, programs=528, described=True, loaded=(8, 3)),
    ("turned_grad_sums", 128): Launch(tokens=32, stages=3),
    ("grad_keys", 64): Launch(stages=3, programs=264, described=True, loaded=(4, 3)),
    ("grad_keys", 128): Launch(warps=4, stages=3, programs=528, described=True, loaded=(8, 3)),
    ("turned_grad_keys", 64): Launch(stages=1),
    ("turned_grad_keys", 128): Launch(),
    ("convolution", 64): Launch(tokens=32, strip=8, warps=4, stages=3, programs=264, stacked=True, reserved=30),
    ("convolution", 128): Launch(tokens=32, strip=8, stages=3, stacked=True, reserved=30),
    ("grad_filters", 64): Launch(tokens=32, strip=8, warps=4, stages=1, programs=396),
    ("grad_filters", 128): Launch(tokens=16, strip=8, warps=4, stages=1, programs=396),
    ("keys", 256): Launch(tokens=32),
    ("turned_keys", 256): Launch(tokens=32),
    ("queries", 256): Launch(tokens=32),
    ("turned_queries", 256): Launch(tokens=32),
    ("grad_queries", 256): Launch(tokens=32),
    ("turned_grad_queries", 256): Launch(tokens=32),
    ("grad_sums", 256): Launch(tokens=32),
    ("turned_grad_sums", 256): Launch(tokens=32),
    ("grad_keys", 256): Launch(tokens=32),
    ("turned_grad_keys", 256): Launch(tokens=32),
    ("convolution", 256): Launch(tokens=32, stages=2, reserved=75),
    ("grad_filters", 256): Launch(tokens=32, strip=8, warps=4, stages=1, programs=396),
}
"""(pass, channels rounded up to a power of 2) -> launch for bfloat16. Benchmarks may replace the launches."""
PART = 64
"""Number of result channels per program, for heads of more than 128 channels. Each program reads all channels."""
_WIDE = Launch(tokens=32, stages=1)
"""The launch for other dtypes than bfloat16, and for passes without an entry in the table."""
MAX_SPLITS = 64
"""Largest number of programs that share a head, because one program adds up their sums."""
_AHEAD = 2
"""Rows that a program with a 5 x 5 filter reads before it writes the first row."""
_SEEN_TWICE = 4
"""Rows outside its band that a program reads, for a 5 x 5 filter."""
_PROCESSORS = 132
"""Number of processors of an H100. It is fixed, so that results do not depend on the device."""


def launch(name: str, query: Tensor) -> Launch:
    """Return the launch of a pass for these queries, keys or gradients."""
    listed = LAUNCHES.get((name, block_d(query.shape[-1])), _WIDE)
    return listed if query.dtype == torch.bfloat16 else _WIDE


def splits(tokens: int, heads: int, how: Launch) -> tuple[int, int]:
    """Return the number of programs that share the tokens of a head, and the largest number of tiles per program.

    Both are independent of the device and of the batch size, so the results of a sample are bitwise independent too.
    """
    tiles = triton.cdiv(tokens, how.tokens)
    wanted = max(1, min((how.programs or _even(heads)) // heads, MAX_SPLITS))
    each = triton.cdiv(tiles, wanted)
    return int(triton.cdiv(tiles, each)), int(each)


class Share(NamedTuple):
    """The division of blocks of strips among programs: most programs process a whole block, the last ones a band."""

    blocks: int
    """Blocks per head and part of its channels."""
    whole: int
    """Programs that process one whole block each."""
    bands: int
    """Programs that share each of the other blocks."""
    band: int
    """Rows per band; the last band may have fewer."""
    programs: int
    """Total number of programs; not an argument of the kernels."""


@functools.cache
def strips(grid: tuple[int, int, int], copies: int, how: Launch, *, alike: bool = False) -> Share:
    """Return the division of the strips among programs.

    Programs with a whole block fill all processors in full rounds. The remaining blocks are divided into bands, so
    that they keep all processors busy too. The division does not change results bitwise, because each row of results
    is summed from top to bottom in any case.

    Args:
        grid: frames, rows and columns.
        copies: samples x heads x parts of the channels of a head.
        how: launch parameters.
        alike: whether to divide every block into bands.
    """
    frames, rows, columns = grid
    blocks = int(triton.cdiv(frames * triton.cdiv(columns, how.strip), how.tokens // how.strip))
    at_once = how.programs or _PROCESSORS
    full = copies * blocks // at_once

    def duration(rounds: int, bands: int) -> int:
        rest = triton.cdiv((copies * blocks - rounds * at_once) * bands, at_once)
        return int(
            rounds * (rows + _AHEAD) + rest * (triton.cdiv(rows, bands) + (_SEEN_TWICE if bands > 1 else _AHEAD))
        )

    choices = itertools.product((0,) if alike else range(max(full - 1, 0), full + 1), range(1, rows + 1))
    rounds, bands = min(choices, key=lambda choice: duration(*choice))
    band = int(triton.cdiv(rows, bands))
    bands, whole = int(triton.cdiv(rows, band)), rounds * at_once
    return Share(blocks, whole, bands, band, whole + (copies * blocks - whole) * bands)


def _even(heads: int) -> int:
    """Return a number of programs that leaves few processors idle at the end.

    The candidates are two, three and four programs per processor: the first one that uses 97 % of the processors, or
    else the best one.
    """

    def used(rounds: int) -> float:
        return rounds * _PROCESSORS // heads * heads / (rounds * _PROCESSORS)

    return max((2, 3, 4), key=lambda rounds: min(used(rounds), 0.97)) * _PROCESSORS


def block_d(channels: int) -> int:
    """Return the width of a tile with all channels of a head: the next power of 2, at least 16 for matrix products."""
    return max(16, int(triton.next_power_of_2(channels)))


def block_e(channels: int) -> int:
    """Return the number of result channels per program: all channels of a head, or `PART` for wide heads."""
    return block_d(channels) if channels <= 128 else PART


def parts_of(channels: int) -> int:
    """Return the number of programs that share a tile of a head."""
    return block_d(channels) // block_e(channels)


def dot_type(x: Tensor) -> tl.dtype:
    """Return the operand dtype of matrix products for such tensors.

    float16 inputs use float32 operands (computed as products of bfloat16 terms), because sums over all tokens exceed
    the range of float16.
    """
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32


def constants(x: Tensor, how: Launch, terms: Terms) -> dict[str, Any]:
    """Return the compile-time constants that all passes share."""
    frames, rows, columns = terms.grid or (1, 1, 1)
    return {
        "RELU": terms.feature_map == "relu",
        "NORM": terms.qk_norm is not None,
        "FRAMES": frames,
        "ROWS": rows,
        "COLUMNS": columns,
        "TEXT": text_tokens(terms) > 0,
        "CHANNELS": x.shape[-1],
        "BLOCK_N": how.tokens,
        "BLOCK_D": block_d(x.shape[-1]),
        "BLOCK_E": block_e(x.shape[-1]),
        "DOT": dot_type(x),
        # Triton's interpreter has no bf16x3 products; its float32 products are exact.
        "PRECISION": "ieee" if triton.knobs.runtime.interpret else "bf16x3",
        "num_warps": how.warps,
        "num_stages": how.stages,
    }
