"""How the passes of linear attention are cut into programs, and the constants that their kernels share."""

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
    """How one pass over the tokens is cut and run."""

    tokens: int = 64
    """A tile; a multiple of 16, a power of 2."""
    warps: int = 8
    stages: int = 2
    """Tiles under way at once."""
    programs: int = 0
    """Programs a sample, about; 0 fills the processors of an H100 two to four times, as evenly as heads allow.

    Of the convolution: programs that run at once; 0 is one on each processor of an H100.
    """
    described: bool = False
    """Whether tiles are copied whole where they can be, see `triton_descriptors.py`."""
    loaded: tuple[int, int] | None = None
    """Warps and stages where they cannot be; none is the same. Tiles and programs stay, so bits do."""
    strip: int = 4
    """Of the convolution: columns that a thread has of one row; a power of 2, at most 16 and `tokens`."""
    channels: int = 128
    """Of the convolution: channels of a head that a program takes, at most; a power of 2, at least 16."""
    stacked: bool = False
    """Of the convolution: whether both 16-bit terms of the state are one matrix of twice as many rows."""
    reserved: int = 0
    """Of the convolution: percent of the on-chip memory for tiles, the first cache has the rest; 0 is no wish."""

    @property
    def by_threads(self) -> Launch:
        """The launch of the same programs whose tiles are loaded by their threads."""
        warps, stages = self.loaded or (self.warps, self.stages)
        return replace(self, warps=warps, stages=stages, described=False)

    @property
    def rows_for_all_warps(self) -> bool:
        """Whether a tile has the 16 rows that a product gives a warp, for each of them."""
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
"""(pass, channels rounded up to a power of 2) -> launch for bfloat16. A benchmark may put other launches here."""
PART = 64
"""Channels of results that a program computes of a head of more than 128; each of them reads all channels."""
_WIDE = Launch(tokens=32, stages=1)
"""The launch of every pass over other inputs, and where the table has no row."""
MAX_SPLITS = 64
"""Programs that may share a head: one program adds up what they found."""
_AHEAD = 2
"""Rows that a program of 5 x 5 taps reads before it writes one."""
_SEEN_TWICE = 4
"""Rows that a band reads beside its own."""
_PROCESSORS = 132
"""Of an H100. Fixed, so that results depend on no device."""


def launch(name: str, query: Tensor) -> Launch:
    """Return how a pass runs over these queries, keys or gradients."""
    listed = LAUNCHES.get((name, block_d(query.shape[-1])), _WIDE)
    return listed if query.dtype == torch.bfloat16 else _WIDE


def splits(tokens: int, heads: int, how: Launch) -> tuple[int, int]:
    """Return how many programs share the tokens of a head, and how many tiles each takes at most.

    It depends on no device and no batch size, so a sample's bits do not either.
    """
    tiles = triton.cdiv(tokens, how.tokens)
    wanted = max(1, min((how.programs or _even(heads)) // heads, MAX_SPLITS))
    each = triton.cdiv(tiles, wanted)
    return int(triton.cdiv(tiles, each)), int(each)


class Share(NamedTuple):
    """How blocks of strips are shared out among programs: most take a block from top to bottom, the last a band."""

    blocks: int
    """Of a head and part of its channels."""
    whole: int
    """Programs that take a block each."""
    bands: int
    """Programs that share each of the other blocks."""
    band: int
    """Rows of a band, the last one perhaps fewer."""
    programs: int
    """All of them; the kernel need not be told."""


@functools.cache
def strips(grid: tuple[int, int, int], copies: int, how: Launch, *, alike: bool = False) -> Share:
    """Return how the strips of a frame are shared out; `copies` is samples x heads x parts of their channels.

    With `alike` every block is cut into bands.

    Programs that take a block each come in full rounds, one or several on every processor; what is left is cut into
    bands so that it keeps all of them busy too. Bits do not depend on it: a row of results is summed from above.
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
    """Return how many programs leave few of the processors idle at the end: the first number that leaves 3 %."""

    def used(rounds: int) -> float:
        return rounds * _PROCESSORS // heads * heads / (rounds * _PROCESSORS)

    return max((2, 3, 4), key=lambda rounds: min(used(rounds), 0.97)) * _PROCESSORS


def block_d(channels: int) -> int:
    """Return the channels of a tile: a power of 2, at least the 16 that a matrix product needs."""
    return max(16, int(triton.next_power_of_2(channels)))


def block_e(channels: int) -> int:
    """Return how many channels of a result a program computes: those of a head, or a part of a wide one's."""
    return block_d(channels) if channels <= 128 else PART


def parts_of(channels: int) -> int:
    """Return the programs that share a tile of a head."""
    return block_d(channels) // block_e(channels)


def dot_type(x: Tensor) -> tl.dtype:
    """Return the type that products of such tensors are fed with.

    Sums over all tokens leave the range of float16: it is computed as float32 is, in two terms of bfloat16.
    """
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32


def constants(x: Tensor, how: Launch, terms: Terms) -> dict[str, Any]:
    """Return the constants that all passes share."""
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
        # The interpreter knows no such products; its own are exact.
        "PRECISION": "ieee" if triton.knobs.runtime.interpret else "bf16x3",
        "num_warps": how.warps,
        "num_stages": how.stages,
    }
