"""Profile of linear attention with a convolution: times of the pass without some of its parts, and its machine code.

`python -m benchmarks.convolution_profile` needs a GPU and writes `results/convolution_profile.json`. At two shapes of
Wan it times the second pass of `postgen.kernels.linear_attention` with both convolutions, with smaller convolutions,
without queries and without convolution, and the gradient of the weights, and computes the floor of the bytes that each
must move. For the whole pass and for that gradient it counts the instructions that a thread executes for one row of
its columns. This gives the time in which the multiprocessors issue instructions; in the rest of the time they wait.
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

SHAPES = {"Wan 1.3B 480p 81f": ((21, 30, 52), 12), "Wan 14B 720p 81f": ((21, 45, 80), 40)}
"""Name -> token grid and number of heads."""
CHANNELS = 128
CLOCK_GHZ = 1.755
"""The clock of an H100 SXM under load, which converts counted instructions to time."""
SCHEDULERS = 4
"""Schedulers per multiprocessor; each issues one instruction of one warp per cycle."""
FILTERS = {"5x5 + 3": (5, 3), "3x3 + 3": (3, 3), "1x1": (1, 0)}
"""Name -> side length of the weights in space, and their length in time."""
WHOLE = "5x5 + 3"
SUMMED, OF_WEIGHTS = "keys and values summed", f"gradient of the weights {WHOLE}"

Call = Callable[[Tensor, Tensor, Tensor, Any], Any]


def loops(sass: str) -> list[Counter[str]]:
    """Count the instructions of one iteration of each loop of a kernel by kind, as if no branch skipped code."""
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
    """Return the name of an instruction in Triton's disassembly without its suffixes, or None for a label."""
    instruction = re.search(r"\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", line)
    return instruction[1] if instruction else None


def terms_of(grid: tuple[int, int, int], heads: int, space: int, time: int) -> Terms:
    """Return terms with convolutions of the given side length in space and length in time; 0 is no convolution."""
    width = heads * CHANNELS
    return Terms(
        grid=grid,
        conv_space=torch.randn(width, space, space, device="cuda") / 5 if space else None,
        conv_time=torch.randn(width, time, device="cuda") / 3 if time else None,
    )


def part_calls(grid: tuple[int, int, int], heads: int) -> dict[str, tuple[Call, int]]:
    """Return every part as a function of queries, keys, values and sums, and how many tensors it must move."""
    from postgen.kernels.linear_attention import triton

    def alone(terms: Terms) -> Call:
        return lambda q, k, v, sums: triton._convolve(
            v, None, None, terms, None, torch.empty(q.shape, dtype=q.dtype, device=q.device)
        )

    plain = passes(Terms())
    # The sums read two tensors, keys and values; the pass over queries reads the queries and writes the results.
    found = {SUMMED: (plain["keys"], 2), "queries": (plain["queries"], 2)}
    for name, taps in FILTERS.items():
        terms = terms_of(grid, heads, *taps)
        found[f"convolution {name}"] = alone(terms), 2
        found[f"convolution {name}, queries"] = passes(terms)["convolution"], 3
    found[OF_WEIGHTS] = passes(terms_of(grid, heads, *FILTERS[WHOLE]))["grad_filters"], 2
    return found


def code(name: str, kernel: Any, grid: tuple[int, int, int], heads: int, given: tuple[Any, ...]) -> dict[str, Any]:
    """Launch a pass that walks down rows on one input set; return its registers, memory and instructions."""
    from postgen.kernels.linear_attention.triton_launch import LAUNCHES

    how = LAUNCHES[name, CHANNELS]
    kernel.device_caches.clear()
    passes(terms_of(grid, heads, *FILTERS[WHOLE]))[name](*given)
    (compiled,) = kernel.device_caches[torch.cuda.current_device()][0].values()
    row = max(loops(compiled.asm["sass"]), key=lambda body: body.total())
    elements = how.tokens * how.channels // (32 * how.warps)
    warp_rows = math.prod(grid) * heads * CHANNELS / elements / 32
    cycles = warp_rows * row.total() / (torch.cuda.get_device_properties(0).multi_processor_count * SCHEDULERS)
    return {
        "launch": str(how),
        "registers": compiled.n_regs,
        "spilled": compiled.n_spills,
        "shared_bytes": compiled.metadata.shared,
        "warps_a_processor": 65536 // (compiled.n_regs * 32 * how.warps) * how.warps,
        "elements_of_a_thread_and_row": elements,
        "instructions_a_row": row.total(),
        "instructions_an_element": row.total() / elements,
        "by_kind": dict(row.most_common()),
        "issue_ms": cycles / CLOCK_GHZ / 1e6,
    }


def profile() -> dict[str, Any]:
    """Time the parts and count the instructions at both shapes."""
    from postgen.kernels.linear_attention.triton_convolution import convolve_rows
    from postgen.kernels.linear_attention.triton_filters import sum_filters

    bandwidth = measured_bandwidth()
    shapes = {}
    for shape, (grid, heads) in SHAPES.items():
        sets = drawn(grid, heads, CHANNELS, Terms())
        size = 2 * math.prod(grid) * heads * CHANNELS
        rows = []
        for name, (call, tensors) in part_calls(grid, heads).items():
            # The sums write almost nothing; every other part writes one tensor.
            floor = bandwidth.floor(size * tensors, 0 if name in (SUMMED, OF_WEIGHTS) else size)
            rows.append({"part": name, "ms": milliseconds(call, sets), "floor_ms": floor})
            print(shape, rows[-1], flush=True)
        kernels = {"convolution": convolve_rows, "grad_filters": sum_filters}
        codes = {name: code(name, kernel, grid, heads, sets[0]) for name, kernel in kernels.items()}
        shapes[shape] = {"rows": rows, "code": codes}
    return {**bandwidth.told(), "shapes": shapes, "gates": []}


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
    for shape, each in found["shapes"].items():
        print(shape, each["code"])
    print(write_result(options.output, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
