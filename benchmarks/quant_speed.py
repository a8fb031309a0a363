"""Quantised linear layers and steps of real models: ours, torchao, bitsandbytes, quanto and GGUF, in one run.

`python -m benchmarks.quant_speed` needs a GPU with FP8 and writes `results/quant_speed.json` after each row.
`--seconds` limits the time: what is left out then has a row that says so. `--only` measures the models whose names
begin with a given text, and keeps the rows of the other models in the file. `--tiny` runs everything once on any
device with tiny models and writes nothing (its times have no meaning). Other libraries are optional: without one, its
rows say "not installed". Shapes are the published ones, and weights are random, because time does not depend on them.

Layers: milliseconds with the rounding of the input and the expansion of the weight, bytes of the layer, and the error
against float64 for normal inputs and weights. Methods whose documentation asks for torch.compile are timed without and
with it for Wan 14B. Steps: milliseconds, bytes of the model, and bytes that a step needs beside it. Every method
quantises the same layers, those that process video tokens; the keys and values of cross-attention, which are 15 % of
Wan 14B, stay in bfloat16.

What to expect on an H200 (788 TFLOP/s in bfloat16, twice that in 8 bits, 4.3 TB/s; `floor_ms`), for one block of Wan
14B at 480p (32,760 tokens): the products of q, k, v, out and the feed-forward network are 16.1 TFLOP, 20.4 ms in
bfloat16 and 10.2 ms in 8 bits. Rounding the inputs moves 3 bytes for each number, 3.9 GB, 0.9 ms; 0.23 ms less if q, k
and v shared it. Expanding 246 million 4-bit weights moves 0.38 GB to 8 bits, 0.09 ms, and 0.63 GB to bfloat16,
0.15 ms. So the layers can be 1.84 times as fast in 8 bits, 4-bit weights cost 1 % of that, and packed weights alone
save memory and no time. A step has 0.8 PFLOP in quantised layers and 0.9 PFLOP in attention, which stays in bfloat16
at about 650 TFLOP/s: 2.3 seconds in bfloat16 become 1.9.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.fused_step import free
from benchmarks.gates import RESULTS, Gate, gate, read_result, write_result
from benchmarks.lowp_linears import SHAPES, Shape, shapes_of
from benchmarks.lowp_steps import tiny
from benchmarks.quant_speed_layers import Row, compare, floor_ms, layer_rows
from benchmarks.quant_speed_methods import METHODS, OURS, PEERS
from benchmarks.quant_speed_steps import CASES, COMPILED, step_rows
from benchmarks.quant_tables import configs, sizes
from postgen.kernels.fp8_rows.ops import why_not_fp8

FIRST = CASES[0].name
MEASURED = tuple(
    shape for model in (FIRST, "Wan 1.3B", "HunyuanVideo") for shape in SHAPES if shape.model.startswith(model)
)
TINY = shapes_of("tiny", 40, 128, 256)
SECONDS = 300.0
"""The usual limit of a run in seconds."""
SHARE = 0.45
"""The part of the time after which no further layers are measured, so that the steps have enough."""
IN_STEPS = {
    *("bf16", "fp8", "int8", "int4 in fp8", "int4", "torchao fp8 row", "torchao int8"),
    *("bitsandbytes NF4", "quanto int8 weights", "GGUF Q4_0"),
}
"""The methods that are measured in whole steps."""
IN_OTHER_STEPS = {"bf16", "fp8", "int4 in fp8", "int4", "torchao fp8 row", "bitsandbytes NF4", "GGUF Q4_0"}
"""The methods in steps of the other models than the first."""


WAN_14B = "Wan-AI/Wan2.1-T2V-14B-Diffusers"


def gates(layers: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """Return the gates: the layers of a block of Wan 14B together, and the bytes of the whole model in 4 bits.

    The bytes are counted on the published config, with the layers of the text, which are exact by default, in 4 bits.
    """
    fp8, four, plain = (total_ms(layers, name) for name in ("fp8", "int4 in fp8", "bf16"))
    counted = wan_14b_bytes()
    return [
        gate("fp8_linear_speedup", plain / fp8 if plain and fp8 else None, ">=", 1.6),
        gate("w4_fp8_linear_vs_fp8", fp8 / four if fp8 and four else None, ">=", 0.9),
        gate("wan14b_memory_ratio_w4", counted["text"] / counted["exact"], "<=", 0.32),
    ]


@functools.cache
def wan_14b_bytes() -> dict[str, Any]:
    """Return the bytes of Wan 14B in several formats."""
    return sizes(configs()[WAN_14B])


def total_ms(layers: Sequence[Mapping[str, Any]], method: str) -> float | None:
    """Return the milliseconds of all layers of a block of Wan 14B with a method, or None if one was not measured."""
    rows = [row for row in layers if row["model"] == FIRST and row["method"] == method]
    times = {row["layers"]: row["ms"] for row in rows if "ms" in row}
    wanted = {shape.layers for shape in MEASURED if shape.model == FIRST}
    return sum(times.values()) if times.keys() == wanted else None


def floors(shape: Shape) -> dict[str, float]:
    """Return the fewest milliseconds of layers in bfloat16, in 8 bits, and in 8 bits from packed 4-bit weights."""
    return {
        "bf16": floor_ms(shape, False),
        "eight_bits": floor_ms(shape, True, 8),
        "four_in_eight_bits": floor_ms(shape, True, 4.5),
    }


class Run:
    """A run: what was measured, and the time that is left."""

    def __init__(self, device: str, seconds: float, output: str | None) -> None:
        self.device, self.seconds, self.output = device, seconds, output
        self.start = time.monotonic()
        self.layers: list[Row] = []
        self.steps: list[Row] = []

    def late(self, share: float = 1.0) -> Callable[[], bool]:
        """Return a function that tells whether a part of the time is over."""
        return lambda: time.monotonic() - self.start > share * self.seconds

    def measure(self, shapes: Sequence[Shape], cases: Sequence[Any], keep: Mapping[str, Sequence[Row]]) -> None:
        """Measure shapes and models; `keep` has rows of an earlier run that are not measured again."""
        self.layers, self.steps = [*keep["layers"]], [*keep["steps"]]
        for shape in shapes:
            compiles = self.device == "cuda" and shape.model == FIRST and shape.layers != "attention out"
            rows = layer_rows(shape, METHODS, self.device, compiles, self.late(SHARE))
            self.keep(self.layers, ({**row, "floor_ms": floors(shape)} for row in rows))
        for case in cases:
            self.measure_step(case, IN_STEPS if case.name in (FIRST, "tiny") else IN_OTHER_STEPS)
        for case in cases:  # compilation takes a minute, so the other models come first
            if case.name == FIRST:
                self.measure_step(case, COMPILED, compiles=True)

    def measure_step(self, case: Any, names: Collection[str], *, compiles: bool = False) -> None:
        """Measure a step of a model with the methods of these names."""
        methods = [each for each in METHODS if each.name in names]
        self.keep(self.steps, step_rows(case, methods, self.device, self.late(), compiles=compiles))

    def keep(self, kept: list[Row], rows: Iterable[Row]) -> None:
        """Compare each new row with that of bfloat16, the first of its shape or model, and write the result file."""
        for row in rows:
            kept.append(row)
            compare([each for each in kept if all(each[key] == row[key] for key in ("model", "layers") if key in row)])
            self.write()
        free(self.device)

    def write(self) -> None:
        """Write the result file, if there is one."""
        if self.output is not None:
            told = {"seconds": time.monotonic() - self.start, "layers": self.layers, "steps": self.steps}
            write_result(self.output, {**told, "gates": gates(self.layers)})


def main(argv: list[str] | None = None) -> int:
    """Measure layers and steps, print the rows, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="run tiny models on any device and write nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure only models whose names begin with NAME")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the limit of the run (default: %(default)s)")
    parser.add_argument("-o", "--output", default="quant_speed", help="name or path of the result file")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.tiny:
        Run(device, options.seconds, None).measure(TINY[:1], [tiny()], {"layers": [], "steps": []})
        return 0

    def wanted(name: str) -> bool:
        return not options.only or name.startswith(tuple(options.only))

    shapes = [each for each in MEASURED if wanted(each.model)]
    cases = [each for each in CASES if wanted(each.name)]
    reason = why_not_fp8(torch.device(device)) if shapes or cases else f"no model begins with {options.only}"
    if reason:
        print(f"benchmarks.quant_speed needs a GPU with FP8 and a model: {reason}", file=sys.stderr)
        return 2
    print({"not installed": [each.name for each in PEERS if each.missing], "ours": [each.name for each in OURS]})
    before = _before(options.output) if options.only else {}
    keep = {part: [row for row in before.get(part, ()) if not wanted(row["model"])] for part in ("layers", "steps")}
    Run(device, options.seconds, options.output).measure(shapes, cases, keep)
    print(_place(options.output))
    return 0


def _before(output: str) -> dict[str, Any]:
    return read_result(output) if _place(output).is_file() else {}


def _place(output: str) -> Path:
    return Path(output) if output.endswith(".json") else RESULTS / f"{output}.json"


if __name__ == "__main__":
    sys.exit(main())
