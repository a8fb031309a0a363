"""Parts of converted layers on a GPU, in plain torch and with the kernels: `python -m benchmarks.lit_parts`.

Prints a line for each part of a window layer of Wan 14B at 720p (`--model "Wan 1.3B"` for the other model): the
milliseconds of both, and the relative difference of their results. Whole layers follow, then other launch parameters
of the memory's kernels. Takes about a minute on an H200. `-o lit_parts` also writes a result file, after every line.
`--device cpu` runs a tiny model, only to try the benchmark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gates import write_result
from benchmarks.lit_models import CHANNELS, KINDS, LARGE, SMALL, TINY, TINY_CLIP, Built, Model, clip, drawn, timed
from postgen.families import Grid
from postgen.families.attention.reading import Norms, Reading, Rope, Stream
from postgen.lit import WindowOptions, features, layers_of, set_grid, tokens
from postgen.lit.layers import Shape, make_layer, memory, window

REPEATS = 3
LAUNCHES = {
    "sums": [(64, 8, 2), (64, 8, 3), (32, 8, 3)],
    "scans": [(32, 8, 2), (16, 8, 2)],
    "reads": [(32, 8, 2), (64, 8, 2), (64, 8, 1)],
}
"""Kernel -> launch parameters to time: tokens per tile, warps, stages."""

Row = dict[str, Any]


@contextmanager
def plain() -> Iterator[None]:
    """Run layers in plain torch, except that linear and softmax attention keep their kernels."""
    with ExitStack() as stack:
        for module in (features, window):
            stack.enter_context(mock.patch.object(module, "takes", return_value=False))
        for module in (features, tokens):
            stack.enter_context(mock.patch.object(module, "for_triton", return_value=False))
        yield


class Parts:
    """A window layer and its inputs."""

    def __init__(self, model: Model, grid: Grid, device: str) -> None:
        self.model, self.grid, self.device = model, grid, device
        self.shape = Shape(heads=model.heads, channels=CHANNELS, hidden=model.heads * CHANNELS)
        with torch.device(device):
            self.layer: Any = random(make_layer("window_delta", self.shape, WindowOptions()).bfloat16())
            norms = [torch.nn.RMSNorm(self.shape.hidden, eps=1e-6).bfloat16() for _ in range(2)]
            angles = torch.rand(1, grid.tokens, 1, CHANNELS // 2)
            self.hidden = torch.randn(1, grid.tokens, self.shape.hidden, dtype=torch.bfloat16)
        self.rope = Rope(angles.cos(), angles.sin(), in_float32=False)
        self.query, self.key, self.value = drawn(model, grid.tokens, device)
        stream = Stream(self.query, self.key, self.value, Norms(*norms, across_heads=True), self.rope)
        self.reading = Reading(streams=(stream,))

    def tokens(self) -> tokens.Tokens:
        """Return the inputs as a layer receives them in a call."""
        return tokens.Tokens(self.reading, self.grid, self.hidden)

    def rows(self) -> Iterator[Row]:
        """Time every part."""
        layer, grid, query, key, value = self.layer, self.grid, self.query, self.key, self.value
        frames, compared = grid.frames, partial(compare, device=self.device)
        yield compared("norms and rotation", lambda: self.tokens().rotated()[:2])
        yield compared("norms, centred keys", lambda: self.tokens().centered())
        yield compared("convolution in space", lambda: layer.conv_key.in_space(key, grid, added=True))
        yield compared("convolution in time", lambda: layer.conv_key.in_time(key, grid, added=True))
        yield compared("sums of frames, their solve", lambda: layer._writes(key, value, self.hidden, frames))
        writes = layer._writes(key, value, self.hidden, frames)
        yield self.alone("of it the solve", lambda: memory.inverse_of(writes.inverse))
        yield compared("scans over frames", lambda: layer._reads(query, writes, []))
        gate = layer.gate(self.hidden)
        yield compared("reads of the memory", lambda: layer._far(query, writes.content, gate, torch.bfloat16))
        yield compared("all after softmax", lambda: layer._finished(self.tokens(), value, query, writes.content))
        pair = [x.float().relu() for x in (query, key)]
        yield compared("rotation of features", lambda: features.rotate_both(*pair, self.rope))

    def other_launches(self) -> Iterator[Row]:
        """Time each kernel of the memory alone, with the launch parameters of `LAUNCHES`."""
        from postgen.kernels.frame_memory import triton

        writes = self.layer._writes(self.key, self.value, self.hidden, self.grid.frames)
        strength, gate, reads = self.layer.strength(self.hidden), self.layer.gate(self.hidden), writes.content
        calls: dict[str, Callable[[], Any]] = {
            "sums": lambda: triton.frame_sums(self.key, self.value, strength, reads.shape[1], True),
            "scans": lambda: triton.frame_memories(writes.inverse, reads, writes.log_decay, 1, 1),
            "reads": lambda: triton.frame_reads(self.query, reads, self.layer.norm, gate.view(self.query.shape), 1e-5),
        }
        for name, launches in LAUNCHES.items():
            for numbers in launches:
                with mock.patch.dict(triton.LAUNCHES, {name: triton.Launch(*numbers)}):
                    yield self.alone(f"{name}, {numbers}", calls[name])

    def alone(self, part: str, call: Callable[[], Any]) -> Row:
        """Time a call of a kernel."""
        return {"part": part, "kernels_ms": timed(call, self.device, REPEATS).milliseconds}


def compare(part: str, call: Callable[[], Any], device: str) -> Row:
    """Time a call with and without the kernels, and compare the results."""
    new, found = timed(call, device, REPEATS).milliseconds, flat(call())
    with plain():
        old, expected = timed(call, device, REPEATS).milliseconds, flat(call())
    pairs = zip(found, expected, strict=True)
    error = max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs)
    return {"part": part, "plain_ms": old, "kernels_ms": new, "difference": error}


def line(row: Row) -> str:
    """Return a row as a line of text."""
    part, new, old = row["part"], row["kernels_ms"], row.get("plain_ms")
    if old is None:
        return f"{part:34} {new:8.3f} ms"
    both = f"plain {old:8.3f} ms, kernels {new:8.3f} ms ({old / new:.2f} x)"
    return f"{part:34} {both}, differ by {row['difference']:.1e}"


def flat(result: Any) -> list[Tensor]:
    """Return the tensors of a (nested) result as a flat list."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, memory.Writes):
        return [each for each in (result.inverse, result.content) if each is not None]
    return [each for part in result for each in flat(part)]


def random(layer: Any) -> Any:
    """Add noise to all weights, because a new layer multiplies the reads of its memory by zeros."""
    for parameter in layer.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return layer


def whole(model: Model, grid: Grid, device: str) -> Iterator[Row]:
    """Time self-attention of each layer type."""
    here = Built(model, grid, 2, device, fused=True)
    with here.side(None):
        call = here.calls()["layer"]
    for name, kind in KINDS.items():
        with here.side(kind.config("1:{}", grid)):
            set_grid(here.transformer, grid)
            (layer,) = layers_of(here.transformer).values()
            if not layer.covers(grid):
                random(layer)
                yield compare(f"layer, {name}", call, device)


@torch.no_grad()
def rows(model: Model, grid: Grid, device: str) -> Iterator[Row]:
    """Time parts, whole layers and, on a GPU, other launch parameters."""
    parts = Parts(model, grid, device)
    yield from parts.rows()
    if device == "cuda":
        torch.cuda.empty_cache()
    yield from whole(model, grid, device)
    if device == "cuda":
        yield from parts.other_launches()


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, print its rows and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lit_parts", description=__doc__.splitlines()[0])
    models = {model.name: model for model in (LARGE, SMALL)}
    parser.add_argument("--model", choices=[*models], default=LARGE.name, help="model to measure")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs a tiny model")
    parser.add_argument("-o", "--output", metavar="RESULT", help="name or path of a result file (default: no file)")
    options = parser.parse_args(argv)
    on_cpu = options.device == "cpu"
    if on_cpu and options.output and not options.output.endswith(".json"):
        print("a CPU run must not replace the measured results: name another file with -o FILE.json", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.lit_parts needs a GPU: torch sees none", file=sys.stderr)
        return 2
    model, size = (TINY, TINY_CLIP) if on_cpu else (models[options.model], clip("720p", 21))
    about = {"model": model.name, "clip": size.name, "tokens": size.grid.tokens, "repeats": REPEATS}
    found: list[Row] = []
    for row in rows(model, size.grid, options.device):
        print(line(row), flush=True)
        found.append(row)
        if options.output:
            write_result(options.output, {**about, "rows": found, "gates": []})
    return 0


if __name__ == "__main__":
    sys.exit(main())
