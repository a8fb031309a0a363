"""How fast a GPU's memory is, and how long a call takes on it: what the floors of the kernel benchmarks stand on.

A floor is the time that the bytes of an operation need at the best rates that kernels of this machine reach. Memory
reads faster than it copies, so what is written is counted as copied and the rest of what is read as read. A `copy_`
that a CUDA graph records is no kernel but a memcpy node, which is slower: 2.6 TB/s on an H200, where a kernel copies
at 4.22 and one that only reads reaches 4.39.
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
#: Bytes of a tensor whose traffic is timed: twenty times the caches of an H200.
MEASURED_BYTES = 2**30
READERS = ((4, 4096, 8), (8, 2048, 4), (8, 4096, 8), (16, 2048, 4), (16, 4096, 8))
"""Kernels that only read, as `largest` takes them; the fastest counts."""


def milliseconds(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> float:
    """Return the median time of one call on the GPU."""
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
    """Bytes a millisecond, each the best of a few kernels."""

    copy: float
    """Read and written together."""
    read: float
    write: float

    def floor(self, moved: int, written: int) -> float:
        """Return the milliseconds that `moved` bytes need, of which `written` are written and the rest are read."""
        copied = min(written, moved - written)
        return 2 * copied / self.copy + (moved - written - copied) / self.read + (written - copied) / self.write

    def told(self) -> dict[str, float]:
        """The rates as they stand in a result file, in TB/s."""
        rates = {"copy": self.copy, "read": self.read, "write": self.write}
        return {f"{name}_tb_per_s": rate / 1e9 for name, rate in rates.items()}


def measured_bandwidth() -> Bandwidth:
    """Measure it on the current GPU, copies and writes in float32 and in bfloat16."""
    copies, writes = [], []
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.zeros(MEASURED_BYTES // dtype.itemsize, dtype=dtype, device="cuda")
        target = torch.empty_like(source)
        copies += [
            # Work on the values makes these kernels: without it, a graph records a memcpy.
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
    """Return the largest value of each share of a float32 tensor: a kernel that only reads.

    torch's own reductions reach 3.6 TB/s on an H200, less than its copies.

    Args:
        source: any shape, contiguous.
        per_processor: programs a multiprocessor.
        block: values that a program takes at once, a power of two.
        warps: of a program.
    """
    programs = per_processor * torch.cuda.get_device_properties(source.device).multi_processor_count
    found = torch.empty(programs, device=source.device)
    _largest[(programs,)](source, found, source.numel(), programs, BLOCK=block, num_warps=warps)
    return found


def with_best_floors(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of several results, floors at the best rates that any result of the same device has measured.

    Each run measures its own rates, 0.2 to 1 % apart on one GPU: a row must not beat its floor because its run
    measured a slower copy. Floors only become faster by this. Rows that do not tell their bytes stay as they are.

    Args:
        results: as `benchmarks.kernels` writes them: `device`, rates in TB/s, `rows`.
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
    """Refuse rows that are faster than their floors: then the floors, or the counted bytes, are wrong.

    Raises:
        ValueError: it names these rows.
    """
    faster = [
        f"{row['op']} at {row['shape']} ({row['over_floor']:.3f})" for row in rows if row.get("over_floor", 1) < 1
    ]
    if faster:
        raise ValueError(f"faster than the floor, so the floor is wrong: {', '.join(faster)}")
