"""Profile of linear attention: the time of every kernel of a call, the floor of its bytes, and the pauses.

`python -m benchmarks.linear_profile` needs a GPU and writes the key `passes` of `results/linear_profile.json`; other
keys stay. It profiles Wan 14B at 720p and LTX, which has the lowest floors. It replays CUDA graphs of the operation,
with RoPE, with convolutions and of the gradient, as `benchmarks.kernels` times them, and traces them with CUPTI: the
time of each kernel, the pause before it, its registers, spills and shared memory, and how many of its programs fit a
multiprocessor. It also measures the time of a call in the graph and without the graph, and the time that the host
needs for the launches of a call, which shows whether the host limits the speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bandwidth import Bandwidth, measured_bandwidth, milliseconds
from benchmarks.gates import amend_result
from benchmarks.kernel_linear import cases
from benchmarks.kernels import OTHERS, ROTATED_BYTES, WAN, Case, Shape

SHAPES = ("Wan 14B 720p 81f", "LTX 97f 512x768")
REPLAYS = 20
"""How many replays of a graph are traced."""
HOST_CALLS = 30
"""How many calls are timed on the host; the queue of the GPU holds more, so the host never waits for it."""
REGISTERS, THREADS, PROGRAMS, SHARED = 65536, 2048, 32, 228 * 1024
"""The limits of a multiprocessor of Hopper: registers, threads, programs and bytes of shared memory."""
RESERVED = 1024
"""The bytes of shared memory that the driver takes for every program."""
TENSORS = {
    "sum_keys": (2, 0), "read_state": (1, 1), "convolve_rows": (2, 1), "grad_queries": (2, 1), "grad_keys": (2, 2),
}  # fmt: skip
"""Kernel -> how many tensors of all tokens and channels it must read and write. Other tensors are negligible."""


def programs_a_processor(registers: int, threads: int, shared: int) -> int:
    """Return how many programs fit a multiprocessor of Hopper; a thread gets a multiple of 8 registers."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(by_registers, THREADS // threads, PROGRAMS, SHARED // (shared + RESERVED))


def kernel_events(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the kernel events of a trace in the order of their start."""
    found = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    return sorted(found, key=lambda event: float(event["ts"]))


def by_place(events: Sequence[dict[str, Any]], calls: int) -> list[list[dict[str, Any]]]:
    """Group the events of consecutive equal calls by their position in a call.

    Raises:
        ValueError: the number of events is not a multiple of `calls`, or a position has different kernels.
    """
    if not events or len(events) % calls:
        raise ValueError(f"{len(events)} kernel events cannot be {calls} equal calls")
    each = len(events) // calls
    places = [list(events[place::each]) for place in range(each)]
    for place in places:
        if len({event["name"] for event in place}) > 1:
            raise ValueError(f"calls differ: {sorted({event['name'] for event in place})}")
    return places


def pauses_of(events: Sequence[dict[str, Any]]) -> list[float]:
    """Return the microseconds between the end of the previous event and the start of each event; 0 for the first."""
    ends = [float(event["ts"]) + float(event["dur"]) for event in events]
    starts = [float(event["ts"]) for event in events]
    return [0.0, *(start - end for start, end in zip(starts[1:], ends[:-1], strict=True))]


def row_of(place: Sequence[dict[str, Any]], pauses: Sequence[float], spills: dict[tuple[str, int], int]) -> Any:
    """Return the times of the kernel at one position of a call, in microseconds, and the resources it takes."""
    name, said = place[0]["name"], place[0]["args"]
    threads, registers = _product(said["block"]), int(said["registers per thread"])
    shared = int(said["shared memory"])
    return {
        "kernel": name,
        "us": statistics.median(float(event["dur"]) for event in place),
        "pause_before_us": statistics.median(pauses),
        "programs": _product(said["grid"]),
        "warps": threads // 32,
        "registers": registers,
        "spilled": spills.get((name, registers)),
        "shared_bytes": shared,
        "programs_a_processor": programs_a_processor(registers, threads, shared),
    }


def compiled_spills() -> dict[tuple[str, int], int]:
    """Return the register spills of the compiled kernels of linear attention, by kernel name and registers."""
    from postgen.kernels.linear_attention import triton_backward, triton_convolution, triton_forward, triton_rope

    found = {}
    for kernel in (
        triton_rope.spread_rope, triton_forward.token_rstd, triton_forward.sum_keys, triton_forward.join_splits,
        triton_forward.read_state, triton_convolution.convolve_rows, triton_backward.grad_queries,
        triton_backward.grad_keys,
    ):  # fmt: skip
        for compiled in kernel.device_caches[torch.cuda.current_device()][0].values():
            found[compiled.metadata.name, compiled.n_regs] = compiled.n_spills
    return found


def traced(call: Callable[..., Any], sets: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return the kernel events of graph replays over all input sets, without the first replay."""
    call(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            call(*inputs)
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernel_events(json.loads(path.read_text(encoding="utf-8")))


def host_microseconds(call: Callable[..., Any], sets: list[tuple[Any, ...]]) -> tuple[float, float]:
    """Return the host time of a call and the time from call to call without a graph, in microseconds."""
    call(*sets[0])
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for which in range(HOST_CALLS):
        call(*sets[which % len(sets)])
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return (launched - begun) / HOST_CALLS * 1e6, (time.perf_counter() - begun) / HOST_CALLS * 1e6


def profile_case(case: Case, shape: Shape, bandwidth: Bandwidth) -> dict[str, Any]:
    """Profile one operation at one shape."""
    sets = [case.make() for _ in range(max(2, -(-ROTATED_BYTES // case.moved_bytes)))]
    size = 2 * shape.frames * shape.places * shape.heads * shape.channels
    graph_ms = milliseconds(case.ours, sets)
    host, apart = host_microseconds(case.ours, sets)
    events = traced(case.ours, sets)
    places = by_place(events, REPLAYS * len(sets))
    spills, rows = compiled_spills(), []
    pauses = pauses_of(events)
    for place, of_place in enumerate(places):
        # The pauses between two replays are left out.
        within = [each for call, each in enumerate(pauses[place :: len(places)]) if call % len(sets)]
        row = row_of(of_place, within, spills)
        read, written = TENSORS.get(row["kernel"], (0, 0))
        floor = 1e3 * bandwidth.floor((read + written) * size, written * size)
        rows.append({**row, "floor_us": floor, "over_floor": row["us"] / floor if floor else None})
    written_tensors = 3 if case.op.endswith("backward") else 1
    floor_ms = bandwidth.floor(case.moved_bytes, written_tensors * size)
    return {
        "op": case.op,
        "shape": case.shape,
        "graph_ms": graph_ms,
        "floor_ms": floor_ms,
        "over_floor": graph_ms / floor_ms,
        "kernels_ms": sum(row["us"] for row in rows) / 1e3,
        "pauses_ms": sum(row["pause_before_us"] for row in rows) / 1e3,
        "passes_floor_ms": sum(row["floor_us"] for row in rows) / 1e3,
        "host_us": host,
        "alone_ms": apart / 1e3,
        "host_bound": host > 1e3 * graph_ms,
        "passes": rows,
    }


def profiled(shapes: Sequence[str]) -> dict[str, Any]:
    """Profile every operation at the given shapes."""
    bandwidth = measured_bandwidth()
    with profile(activities=[ProfilerActivity.CUDA]):
        torch.ones(1, device="cuda").sum()  # start CUPTI here, because it may lose the first kernels
    rows = []
    for shape in (each for each in WAN + OTHERS if each.name in shapes):
        for fields in cases(shape):
            try:
                rows.append(profile_case(Case(**fields), shape, bandwidth))
            except ValueError as error:  # CUPTI has lost kernels; go on with the other operations
                rows.append({"op": fields["op"], "shape": shape.name, "failed": str(error), "passes": []})
            print(json.dumps({name: value for name, value in rows[-1].items() if name != "passes"}), flush=True)
            for row in rows[-1]["passes"]:
                print("   ", json.dumps(row), flush=True)
            torch.cuda.empty_cache()
    return {**bandwidth.told(), "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Profile, print the rows and write them into the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_profile", description=__doc__.splitlines()[0])
    names = [shape.name for shape in WAN + OTHERS]
    parser.add_argument("--shapes", nargs="+", choices=names, default=SHAPES, metavar="SHAPE", help="; ".join(names))
    parser.add_argument("-o", "--output", default="linear_profile", help="name or path of an existing result file")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.linear_profile needs a GPU: torch sees none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with torch.no_grad():
        found = profiled(options.shapes)
    settings = {"replays": REPLAYS, "host_calls": HOST_CALLS, "shapes": list(options.shapes)}
    print(amend_result(options.output, {"passes": found}, settings, []))
    return 0


def _product(numbers: Sequence[int]) -> int:
    product = 1
    for each in numbers:
        product *= int(each)
    return product


if __name__ == "__main__":
    sys.exit(main())
