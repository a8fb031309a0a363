"""Times, memory and errors of one linear layer in every way of quantising it, for `benchmarks.quant_speed`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.fused_step import wait
from benchmarks.lowp_linears import Shape
from benchmarks.quant_speed_methods import BF16, Method

SPAN = 0.03
"""Seconds that the calls between two readings of the clock take together, so that starting them costs no time."""
BF16_RATE, EIGHT_BIT_RATE = 0.79e15, 1.58e15
"""Floating-point operations that an H200 does in a second: measured for bfloat16, twice that in 8 bits."""
BANDWIDTH = 4.3e12
"""Bytes that it moves in a second, measured with a large copy."""
CHECKED = 256
"""Tokens whose results are compared with float64."""

Row = dict[str, Any]


def floor_ms(shape: Shape, eight_bits: bool, weight_bits: float = 16) -> float:
    """Return the fewest milliseconds that layers can take on an H200: operations and bytes at the measured rates.

    The product takes 2 M N K operations, or the time to read its inputs and write its result. Layers in 8 bits also
    read their input in 16 bits and write it in 8, each layer again. A weight of fewer bits than the product's is read
    packed and written expanded.

    Args:
        shape: the layers.
        eight_bits: whether the product is in 8 bits.
        weight_bits: stored bits of a weight.
    """
    m, k, n = shape.tokens, shape.inputs, shape.outputs
    width = 1 if eight_bits else 2
    product = max(
        2 * m * n * k / (EIGHT_BIT_RATE if eight_bits else BF16_RATE),
        (m * k * width + n * k * width + m * n * 2) / BANDWIDTH,
    )
    rounding = 3 * m * k / BANDWIDTH if eight_bits else 0.0
    expansion = n * k * (weight_bits / 8 + width) / BANDWIDTH if weight_bits < 8 * width else 0.0
    return 1000 * shape.count * (product + rounding + expansion)


@torch.no_grad()
def layer_rows(
    shape: Shape, methods: Sequence[Method], device: str, compiles: bool, late: Callable[[], bool]
) -> Iterator[Row]:
    """Measure layers of one shape in every way, and yield each row as soon as it is measured.

    Args:
        shape: the layers; `count` layers with the same weight run one after the other.
        methods: the ways; the first is bfloat16.
        device: "cuda" or "cpu".
        compiles: whether methods that need torch.compile are also timed with it.
        late: returns whether the time is over; the methods that are left get a row that says so.
    """
    torch.manual_seed(0)
    x = torch.randn(1, shape.tokens, shape.inputs, device=device, dtype=torch.bfloat16)
    linear = nn.Linear(shape.inputs, shape.outputs, device=device, dtype=torch.bfloat16)
    linear.weight.copy_(torch.randn_like(linear.weight) / shape.inputs**0.5)
    some = x[:, :CHECKED]
    exact = functional.linear(some.double(), linear.weight.double(), linear.bias.double())
    for method in methods:
        measure = partial(_measured, method, linear, x, exact, compiles, shape.count)
        yield row_of({**vars(shape), "method": method.name}, method, late, measure)


def row_of(row: Row, method: Method, late: Callable[[], bool], measure: Callable[[], Row]) -> Row:
    """Return a row with what was measured, or with the reason why nothing was: `why`.

    A library that is not installed, or that fails, does not end the run.
    """
    if method.missing:
        row["why"] = "not installed"
    elif late():
        row["why"] = "the time was over"
    else:
        try:
            row.update(measure())
        except Exception as error:
            lines = str(error).splitlines() or [""]
            row["why"] = f"failed: {type(error).__name__}: {lines[0][:160]}"
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


def compare(rows: Sequence[Row]) -> None:
    """Add the speed relative to the first row, which is bfloat16; the faster of both times of a row counts."""
    base = rows[0].get("ms")
    for row in rows:
        if base and "ms" in row:
            row["vs_bf16"] = base / min(row["ms"], row.get("compiled_ms", row["ms"]))


def _measured(method: Method, linear: nn.Linear, x: Tensor, exact: Tensor, compiles: bool, count: int) -> Row:
    device = x.device.type
    before = allocated(device)
    module = method.make(linear)
    with method.accumulating():
        found = module(x[:, : exact.shape[1]])
        row: Row = {"error": float((found.double() - exact).norm() / exact.norm())}
        row["bytes"] = linear.weight.nbytes if method is BF16 else allocated(device) - before
        row["ms"] = count * call_ms(lambda: module(x), device)
        if compiles and method.compiles:
            torch.compiler.reset()
            fast = torch.compile(module)
            fast(x)
            row["compiled_ms"] = count * call_ms(lambda: fast(x), device)
    return row


def call_ms(call: Callable[[], Any], device: str, *, times: int = 3) -> float:
    """Return the median milliseconds of a call. On a GPU many calls run between two readings of the clock."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    first = time.perf_counter() - start
    count = min(50, max(1, round(SPAN / max(first, 1e-6)))) if device == "cuda" else 1
    found = []
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait(device)
        found.append((time.perf_counter() - start) / count)
    return 1000 * statistics.median(found)


def allocated(device: str) -> int:
    """Return the bytes of all tensors on a GPU; 0 without one."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0
