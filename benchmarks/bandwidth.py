"""The memory bandwidth of a GPU and the time of a call, from which the kernel benchmarks compute their floors.

A floor is the time that the bytes of an operation need at the best rates that kernels reach on this GPU. Reading is
faster than copying, so written bytes count as copied together with as many read bytes, and the remaining read bytes
count as read. A `copy_` in a CUDA graph is not a kernel but a memcpy node, which is slower: 2.6 TB/s on an H200, where
a kernel copies at 4.22 TB/s and a kernel that only reads reaches 4.39 TB/s.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

REPLAYS = 50
#: The size in bytes of the tensors for the rates: twenty times the caches of an H200.
MEASURED_BYTES = 2**30
READERS = ((4, 4096, 8), (8, 2048, 4), (8, 4096, 8), (16, 2048, 4), (16, 4096, 8))
"""Arguments of `largest`, the kernel that only reads; the fastest one counts."""


def milliseconds(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> float:
    """Return the median milliseconds of one call, replayed in a CUDA graph over all input sets."""
    for inputs in sets[:2]:
        function(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            function(*inputs)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(sets))
    return statistics.median(times)


@dataclass(frozen=True)
class Bandwidth:
    """Rates in bytes per millisecond, each the best of several kernels."""

    copy: float
    """Bytes read plus bytes written."""
    read: float
    write: float

    def floor(self, moved: int, written: int) -> float:
        """Return the milliseconds that `moved` bytes need, of which `written` are written and the rest are read."""
        copied = min(written, moved - written)
        return 2 * copied / self.copy + (moved - written - copied) / self.read + (written - copied) / self.write

    def told(self) -> dict[str, float]:
        """Return the rates in TB/s with the keys of a result file."""
        rates = {"copy": self.copy, "read": self.read, "write": self.write}
        return {f"{name}_tb_per_s": rate / 1e9 for name, rate in rates.items()}


def measured_bandwidth() -> Bandwidth:
    """Measure the rates of the current GPU; copies and writes are tried in float32 and bfloat16."""
    copies, writes = [], []
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.zeros(MEASURED_BYTES // dtype.itemsize, dtype=dtype, device="cuda")
        target = torch.empty_like(source)
        copies += [
            # The arithmetic makes these calls kernels; without it, a graph would record a memcpy.
            milliseconds(lambda a=source, b=target: torch.add(a, 1, out=b), [()]),
            milliseconds(lambda a=source, b=target: torch.neg(a, out=b), [()]),
        ]
        writes.append(milliseconds(lambda b=target: b.fill_(1.0), [()]))
    source = torch.zeros(MEASURED_BYTES // 4, device="cuda")
    reads = [milliseconds(lambda a=source, h=how: largest(a, *h), [()]) for how in READERS]
    return Bandwidth(2 * MEASURED_BYTES / min(copies), MEASURED_BYTES / min(reads), MEASURED_BYTES / min(writes))


@triton.jit
def _largest(source, target, count, programs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(program * BLOCK, count, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(source + at, mask=at < count, other=float("-inf")))
    tl.store(target + program, tl.max(most, 0))


def largest(source: Tensor, per_processor: int, block: int, warps: int) -> Tensor:
    """Return the largest value that each program finds in a float32 tensor, with a kernel that only reads.

    torch's own reductions reach 3.6 TB/s on an H200, less than its copies.

    Args:
        source: any shape, contiguous.
        per_processor: programs per multiprocessor.
        block: values that a program loads at once, a power of two.
        warps: warps of a program.
    """
    programs = per_processor * torch.cuda.get_device_properties(source.device).multi_processor_count
    found = torch.empty(programs, device=source.device)
    _largest[(programs,)](source, found, source.numel(), programs, BLOCK=block, num_warps=warps)
    return found


def with_best_floors(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of several results, with floors at the best rates that any result of the same device has.

    Each run measures its own rates, which differ by 0.2 to 1 % on one GPU. With the best rates a row cannot beat its
    floor only because its run measured a slow copy. Floors can only get lower. Rows without `moved_bytes` do not
    change.

    Args:
        results: results of `benchmarks.kernels` with `device`, the rates in TB/s and `rows`.
    """
    best: dict[str, Bandwidth] = {}
    for result in results:
        now = Bandwidth(**{name: result[f"{name}_tb_per_s"] * 1e9 for name in ("copy", "read", "write")})
        seen = best.get(result["device"], now)
        best[result["device"]] = Bandwidth(
            max(now.copy, seen.copy), max(now.read, seen.read), max(now.write, seen.write)
        )
    rows = []
    for result in results:
        for row in result["rows"]:
            if "moved_bytes" in row:
                floor = best[result["device"]].floor(row["moved_bytes"], row["written_bytes"])
                row = {**row, "floor_ms": floor, "over_floor": row["ours_ms"] / floor}
            rows.append(row)
    return rows


def check_floors(rows: list[dict[str, Any]]) -> None:
    """Check that no row is faster than its floor; otherwise the floor or the counted bytes are wrong.

    Raises:
        ValueError: some rows are faster; the message names them.
    """
    faster = [
        f"{row['op']} at {row['shape']} ({row['over_floor']:.3f})" for row in rows if row.get("over_floor", 1) < 1
    ]
    if faster:
        raise ValueError(f"these rows are faster than their floors, so the floors are wrong: {', '.join(faster)}")
