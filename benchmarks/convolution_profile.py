"""What linear attention with a convolution spends its time on: the pass with parts left out, and its machine code.

`python -m benchmarks.convolution_profile` needs a GPU and writes `results/convolution_profile.json`. It times the
second pass of `postgen.kernels.linear_attention` at Wan 1.3B's 480p with both convolutions, with smaller ones, without
queries and without convolution, beside the bytes that each must move. Of the whole pass it counts what a thread
executes for a row of its columns, and from that how long processors have instructions to issue; the rest is waiting.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bandwidth import measured_bandwidth, milliseconds
from benchmarks.gates import write_result
from benchmarks.linear_launches import drawn, passes
from postgen.kernels.linear_attention.naive import Terms

GRID = (21, 30, 52)
HEADS, CHANNELS = 12, 128
CLOCK_GHZ = 1.755
"""Of an H100 SXM under load: the base of what counted instructions take."""
SCHEDULERS = 4
"""Of a processor; each issues one instruction of one warp a cycle."""
FILTERS = {"5x5 + 3": (5, 3), "3x3 + 3": (3, 3), "1x1": (1, 0)}
"""Taps along a side in space and in time."""
WHOLE = "5x5 + 3"

Call = Callable[[Tensor, Tensor, Tensor, Any], Any]


def loops(sass: str) -> list[Counter[str]]:
    """Return what the loops of a kernel execute once around, by kind, as if no branch within them skipped code."""
    lines = [line.strip() for line in sass.splitlines() if line.strip()]
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\.?\w+:", line)}
    found = []
    for at, line in enumerate(lines):
        target = re.search(r"BRA (?:`\()?(\.?\w+)", line)
        if target and labels.get(target[1], at) < at:
            body = [kind(each) for each in lines[labels[target[1]] : at + 1]]
            found.append(Counter(each for each in body if each))
    return found


def kind(line: str) -> str | None:
    """Return the name of an instruction of Triton's disassembly, without what follows a dot; None of a label."""
    instruction = re.search(r"\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", line)
    return instruction[1] if instruction else None


def moved(tensors: int) -> int:
    """Return the bytes of so many tensors."""
    return 2 * math.prod(GRID) * HEADS * CHANNELS * tensors


def terms_of(space: int, time: int) -> Terms:
    """Return convolutions of so many taps along a side; 0 is none."""
    width = HEADS * CHANNELS
    return Terms(
        grid=GRID,
        conv_space=torch.randn(width, space, space, device="cuda") / 5 if space else None,
        conv_time=torch.randn(width, time, device="cuda") / 3 if time else None,
    )


def part_calls() -> dict[str, tuple[Call, int]]:
    """Return every part as a call of queries, keys, values and sums, and the bytes that it must move."""
    from postgen.kernels.linear_attention import triton

    def alone(terms: Terms) -> Call:
        return lambda q, k, v, sums: triton._convolve(
            v, None, None, terms, None, torch.empty(q.shape, dtype=q.dtype, device=q.device)
        )

    plain = passes(Terms())
    # Keys and values are two tensors that are read, queries one that is read and the results another.
    found = {"keys and values summed": (plain["keys"], moved(2)), "queries": (plain["queries"], moved(2))}
    for name, taps in FILTERS.items():
        terms = terms_of(*taps)
        found[f"convolution {name}"] = alone(terms), moved(2)
        found[f"convolution {name}, queries"] = passes(terms)["convolution"], moved(3)
    return found


def code(given: tuple[Any, ...]) -> dict[str, Any]:
    """Return registers, memory and instructions of the whole pass, launched on one set of inputs."""
    from postgen.kernels.linear_attention.triton_convolution import convolve_rows
    from postgen.kernels.linear_attention.triton_launch import LAUNCHES

    how = LAUNCHES["convolution", CHANNELS]
    convolve_rows.device_caches.clear()
    passes(terms_of(*FILTERS[WHOLE]))["convolution"](*given)
    (kernel,) = convolve_rows.device_caches[torch.cuda.current_device()][0].values()
    row = max(loops(kernel.asm["sass"]), key=lambda body: body.total())
    elements = how.tokens * how.channels // (32 * how.warps)
    warp_rows = math.prod(GRID) * HEADS * CHANNELS / elements / 32
    cycles = warp_rows * row.total() / (torch.cuda.get_device_properties(0).multi_processor_count * SCHEDULERS)
    return {
        "launch": str(how),
        "registers": kernel.n_regs,
        "spilled": kernel.n_spills,
        "shared_bytes": kernel.metadata.shared,
        "warps_a_processor": 65536 // (kernel.n_regs * 32 * how.warps) * how.warps,
        "elements_of_a_thread_and_row": elements,
        "instructions_a_row": row.total(),
        "instructions_an_element": row.total() / elements,
        "by_kind": dict(row.most_common()),
        "issue_ms": cycles / CLOCK_GHZ / 1e6,
    }


def profile() -> dict[str, Any]:
    """Time the parts."""
    sets = drawn(GRID, HEADS, CHANNELS, Terms())
    bandwidth = measured_bandwidth()
    rows = []
    for name, (call, volume) in part_calls().items():
        rows.append({"part": name, "ms": milliseconds(call, sets), "floor_ms": volume / bandwidth.best})
        print(rows[-1], flush=True)
    return {
        "shape": "Wan 1.3B 480p 81f",
        **bandwidth.told(),
        "rows": rows,
        "code": code(sets[0]),
        "gates": [],
    }


def main(argv: list[str] | None = None) -> int:
    """Profile, print and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convolution_profile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("-o", "--output", default="convolution_profile", help="name or path of the result file")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.convolution_profile needs a GPU: torch sees none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with torch.no_grad():
        found = profile()
    print(found["code"])
    print(write_result(options.output, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
