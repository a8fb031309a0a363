"""Whole denoising steps with every way of quantising the linear layers, for `benchmarks.quant_speed`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fused_step import Case, built, free
from benchmarks.lowp_steps import hunyuan_video, timed, wan
from benchmarks.quant_speed_layers import Row, allocated, row_of
from benchmarks.quant_speed_methods import BF16, Method
from postgen.families import layout_of
from postgen.families.linear import replace_linears
from postgen.quant.layers import parts_of
from postgen.quant.report import tensor_bytes


def short_hunyuan_video() -> Case:
    """Return HunyuanVideo with 33 frames of 720 x 1280: 9 latent frames, about as many tokens as Wan at 480p."""
    case = hunyuan_video()

    def arguments() -> dict[str, Any]:
        given = case.arguments()
        return {**given, "hidden_states": given["hidden_states"][:, :, :9].contiguous()}

    return replace(case, name="HunyuanVideo 720p 33f", arguments=arguments)


CASES = (
    wan("Wan 14B 480p 81f", 40, 13824, 40),
    wan("Wan 1.3B 480p 81f", 12, 8960, 30),
    short_hunyuan_video(),
)
"""The model whose gates are read comes first."""
COMPILED = ("bf16", "fp8", "torchao fp8 row", "torchao int8")
"""The methods that are also timed with compiled blocks, for the first model, at the end and if time is left."""


@torch.no_grad()
def step_rows(
    case: Case,
    methods: Sequence[Method],
    device: str,
    late: Callable[[], bool],
    *,
    repeats: int = 3,
    compiles: bool = False,
) -> Iterator[Row]:
    """Measure a whole step of a model with random weights in every way, and yield each row as soon as it is measured.

    Args:
        case: the model and its inputs.
        methods: the ways.
        device: "cuda" or "cpu".
        late: returns whether the time is over; the methods that are left get a row that says so.
        repeats: timed calls of a step; long ones are timed twice.
        compiles: whether to compile the blocks.

    Yields:
        Rows with milliseconds, the bytes of the model, the most bytes that a step needs beside them, and the
        difference from the step in bfloat16, whose size says nothing about quality because the weights are random.
    """
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        model = built(getattr(diffusers, case.kind), case.config)
        arguments = case.arguments()
    stock = model(**arguments, return_dict=False)[0].double()
    for method in methods:
        row: Row = {"model": case.name, "method": method.name, "compiled": compiles}
        yield row_of(row, method, late, partial(_step, model, arguments, stock, method, repeats, compiles))
        free(device)


def _step(
    model: nn.Module, arguments: dict[str, Any], stock: Tensor, method: Method, repeats: int, compiles: bool
) -> Row:
    device = stock.device.type
    before = allocated(device)
    changed: Any = model if method is BF16 and not compiles else copy.deepcopy(model)
    if method is not BF16:
        replace_all(changed, method)
    weights = tensor_bytes(changed) if changed is model or device != "cuda" else allocated(device) - before
    if compiles:
        for block in layout_of(changed).block_modules(changed).values():
            block.compile()

    def step() -> Tensor:
        out: Tensor = changed(**arguments, return_dict=False)[0]
        return out

    with method.accumulating():
        resting = allocated(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        difference = float((step().double() - stock).norm() / stock.norm())
        peak = torch.cuda.max_memory_allocated() - resting if device == "cuda" else 0
        return {
            "ms": timed(step, device, repeats),
            "weight_bytes": weights,
            "working_bytes": peak,
            "difference": difference,
        }


def replace_all(model: nn.Module, method: Method) -> None:
    """Replace the linear layers of a model that process its video tokens, the same ones for every method."""
    pattern = "|".join(map(re.escape, parts_of(model)))
    replace_linears(
        model, lambda _, linear: method.make(linear), owner="quant_speed", pattern=pattern, originals="dropped"
    )
