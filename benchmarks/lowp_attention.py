"""FP8 attention at the shapes of real models: its time, rounding included, and its error, next to exact attention.

`python -m benchmarks.lowp_attention` needs a GPU that computes FP8 attention and writes `results/lowp_attention.json`.
All kernels are recorded in CUDA graphs, which are replayed in turns, as in `benchmarks.kernel_attention`. Errors are
relative L2 errors against float64 from the same bfloat16 inputs, on some queries of all heads, for each kind of input
(`benchmarks.lowp_inputs`). xformers cannot be imported beside FlashAttention-4. So `--without-fa4` hides
FlashAttention-4 to measure xformers; use it with another `-o`. `--tiny` runs the same code with tiny shapes on any
device, with simulated FP8 attention where there is no kernel, and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gates import gate, largest, write_result
from benchmarks.kernel_attention import SHAPES, AttentionShape, default, in_8_bits, in_turns
from benchmarks.lowp_inputs import KINDS, drawn
from postgen.kernels.attention import naive
from postgen.kernels.attention.backends import CUDNN_FP8, TIMED, Call
from postgen.kernels.attention.ops import router
from postgen.kernels.attention.router import milliseconds
from postgen.kernels.attention_fp8 import graphs
from postgen.kernels.attention_fp8.ops import attention_fp8, quantised
from postgen.kernels.attention_fp8.preparation import CANDIDATES, Preparation

TINY = (
    AttentionShape(name="tiny 64", tokens=300, heads=2, channels=64),
    AttentionShape(name="tiny 128", tokens=129, heads=3, channels=128),
)
QUERIES = 64
"""How many queries are compared with float64, spread evenly over the tokens."""
LARGEST = "Wan 14B 720p"
"""The shape of the speed gates."""
Runs = dict[str, Callable[[], Any]]


def measure(shape: AttentionShape, device: str, *, simulate: bool) -> dict[str, Any]:
    """Measure one shape and return its row."""
    refused: dict[str, str] = {}
    call = call_of(shape, "normal", device)
    runs = exact_runs(call, refused)
    runs["cudnn_fp8"] = partial(attention_fp8, *call[:3], simulate=simulate)
    runs |= in_8_bits(call) if device == "cuda" else {}
    # The rounding is timed separately: next to it all other runs would count as hopelessly slow.
    alone: Runs = {"rounding": partial(quantised, *call[:3], Preparation())}
    times, rounding = (in_turns(x, refused) if device == "cuda" else timed(x) for x in (runs, alone))
    if "cudnn_fp8" not in times:
        raise RuntimeError(f"cudnn_fp8 could not be recorded in a CUDA graph: {refused['cudnn_fp8']}")
    work = 4 * shape.tokens**2 * shape.heads * shape.channels
    errors, preparations = {}, {}
    for kind in KINDS:
        errors[kind], preparations[kind] = errors_of(call_of(shape, kind, device), simulate=simulate)
    row = {
        "op": "lowp_attention",
        "shape": shape.name,
        "ms": times,
        "rounding_ms": rounding["rounding"],
        "tflop_per_s": {name: work / each / 1e9 for name, each in times.items()},
        "fp8_vs": {name: each / times["cudnn_fp8"] for name, each in times.items() if name != "cudnn_fp8"},
        "refused": refused,
        "errors": errors,
        "fp8_errors_by_preparation": preparations,
    }
    print(row, flush=True)
    return row


def call_of(shape: AttentionShape, kind: str, device: str) -> Call:
    """Return an attention call with random inputs of a shape and kind."""
    tensors = drawn(kind, shape.tokens, shape.heads, shape.channels, device=device)
    return Call(*tensors, shape.channels**-0.5, None, False)


def exact_runs(call: Call, refused: dict[str, str]) -> Runs:
    """Return torch's default and every kernel of the router that works here.

    The reasons of the kernels that do not work are added to `refused`.
    """
    runs: Runs = {"default": partial(default, *call[:3])}
    for backend in TIMED:
        if backend.races_without_lengths:
            if reason := router().why_not(backend, call):
                refused[backend.name] = reason
            else:
                runs[backend.name] = partial(backend.run, call)
    return runs


def timed(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median milliseconds of each run on a CPU, without CUDA graphs."""
    device = torch.device("cpu")
    return {name: statistics.median(milliseconds(run, device) for _ in range(3)) for name, run in runs.items()}


def errors_of(call: Call, *, simulate: bool) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return the errors of every method (over all heads and of the worst head), and those of FP8 by preparation."""
    rows = torch.linspace(
        0, call.query.shape[1] - 1, min(call.query.shape[1], QUERIES), device=call.query.device
    ).long()
    expected, _ = naive.attention(
        call.query[:, rows].double(), call.key.double(), call.value.double(), scale=call.scale
    )
    methods: Runs = {"default": partial(default, *call[:3])}
    methods["cudnn_fp8"] = partial(attention_fp8, *call[:3], simulate=simulate)
    methods |= in_8_bits(call) if call.query.is_cuda else {}
    found = {name: error_of(run()[:, rows], expected) for name, run in methods.items()}
    by_preparation = {}
    for preparation in CANDIDATES:
        out = attention_fp8(*call[:3], preparation=preparation, simulate=simulate)
        by_preparation[str(preparation)] = error_of(out[:, rows], expected)["error"]
    return found, by_preparation


def error_of(out: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the relative L2 error over all heads, and that of the worst head."""
    wrong, whole = ((x.double().square().sum((0, 1, 3))) for x in (out.double() - expected, expected))
    return {"error": float((wrong.sum() / whole.sum()).sqrt()), "worst_head": float((wrong / whole).sqrt().max())}


def gates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the gates: the speed at the largest shape, and the largest error over all shapes.

    The gate against an exact kernel that is not installed has no value and does not pass.
    """
    whole = [row for row in rows if row["shape"].startswith(LARGEST)]

    def speed(peer: str) -> float | None:
        return min((row["fp8_vs"][peer] for row in whole if peer in row["fp8_vs"]), default=None)

    def error(kind: str) -> float | None:
        return largest([row["errors"][kind]["cudnn_fp8"] for row in rows], "error")

    return [
        gate("fp8_vs_fa4", speed("fa4"), ">=", 1.12),
        gate("fp8_vs_cudnn_bf16", speed("cudnn"), ">=", 1.4),
        gate("fp8_error", error("normal"), "<=", 0.06),
        gate("fp8_error_hard", error("hard"), "<=", 0.085),
    ]


def check_kernel(shapes: tuple[AttentionShape, ...]) -> None:
    """Check that this machine runs FP8 attention; otherwise the benchmark would measure the exact fallback as FP8.

    Raises:
        ValueError: it does not; the message names what is missing.
    """
    for shape in shapes:
        reason = graphs.refusal(torch.device("cuda"), shape.channels)
        if reason is None:
            small = torch.ones(1, 128, 2, shape.channels, device="cuda", dtype=torch.bfloat16)
            reason = router().why_not(CUDNN_FP8, Call(small, small, small, 0.1, None, False))
        if reason is not None:
            raise ValueError(f"benchmarks.lowp_attention: cudnn_fp8 {reason}")


def main(argv: list[str] | None = None) -> int:
    """Measure all shapes, print the rows and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowp_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="use tiny shapes on any device and write nothing")
    parser.add_argument("--without-fa4", action="store_true", help="hide FlashAttention-4, for xformers")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure only shapes whose names begin with NAME")
    parser.add_argument("-o", "--output", default="lowp_attention", help="name or path of the result file")
    options = parser.parse_args(argv)
    if options.without_fa4:
        # With None in sys.modules every import of the package fails.
        sys.modules["flash_attn"] = None  # type: ignore[assignment]
    shapes = TINY if options.tiny else SHAPES
    shapes = tuple(each for each in shapes if not options.only or each.name.startswith(tuple(options.only)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if not shapes:
            known = ", ".join(each.name for each in (TINY if options.tiny else SHAPES))
            raise ValueError(f"no shape begins with {', '.join(options.only)}. Known: {known}")
        if not options.tiny:
            if device == "cpu":
                raise ValueError("benchmarks.lowp_attention needs a GPU, and torch finds none: use --tiny on a CPU")
            check_kernel(shapes)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    simulate = options.tiny and graphs.refusal(torch.device(device), 128) is not None
    rows = []
    with torch.no_grad():
        for shape in shapes:
            rows.append(measure(shape, device, simulate=simulate))
            if device == "cuda":
                torch.cuda.empty_cache()
    if options.tiny:
        return 0
    # The gates need all shapes and all kernels.
    found = [] if options.only or options.without_fa4 else gates(rows)
    print(write_result(options.output, {"queries": QUERIES, "rows": rows, "gates": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
