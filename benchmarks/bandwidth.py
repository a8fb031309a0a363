"""How fast a GPU's memory is, and how long a call takes on it: what the floors of the kernel benchmarks stand on.

A floor is the bytes that must move over the best rate that a kernel of this machine reaches. A `copy_` that a CUDA
graph records is no kernel but a memcpy node, which is slower: 2.6 TB/s on an H200, where a kernel copies at 4.25.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

REPLAYS = 50
#: Bytes of a tensor whose traffic is timed: twenty times the caches of an H200.
MEASURED_BYTES = 2**30


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

    @property
    def best(self) -> float:
        """The rate of the floors.

        Every operation that is measured reads at least as much as it writes. So the rate of a kernel that only writes,
        which is higher than that of a copy on an H200, bounds none of them and stands in the result for information.
        """
        return max(self.copy, self.read)

    def told(self) -> dict[str, float]:
        """The rates as they stand in a result file, in TB/s."""
        rates = {"copy": self.copy, "read": self.read, "write": self.write}
        return {f"{name}_tb_per_s": rate / 1e9 for name, rate in rates.items()}


def measured_bandwidth() -> Bandwidth:
    """Measure it on the current GPU, in float32 and in bfloat16."""
    copies, reads, writes = [], [], []
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.zeros(MEASURED_BYTES // dtype.itemsize, dtype=dtype, device="cuda")
        target = torch.empty_like(source)
        long, short = (source.view(-1, length) for length in (65536, 8192))
        copies += [
            # Work on the values makes these kernels: without it, a graph records a memcpy.
            milliseconds(lambda a=source, b=target: torch.add(a, 1, out=b), [()]),
            milliseconds(lambda a=source, b=target: torch.neg(a, out=b), [()]),
        ]
        reads += [
            milliseconds(lambda a=rows, f=reduce: f(a, 1), [()])
            for rows in (short, long)
            for reduce in (torch.sum, torch.amax)
        ]
        writes.append(milliseconds(lambda b=target: b.fill_(1.0), [()]))
    return Bandwidth(2 * MEASURED_BYTES / min(copies), MEASURED_BYTES / min(reads), MEASURED_BYTES / min(writes))


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
