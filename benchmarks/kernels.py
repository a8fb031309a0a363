"""Times of the kernels: ours, the plain torch code of models, that code compiled, and the floor of memory bandwidth.

`python -m benchmarks.kernels` needs a GPU and writes `results/kernels.json`. `--quick` measures Wan's shapes only,
`--rest` the other shapes, and `--only` some operations. `--join A.json B.json` combines results, for example of two
GPUs that each measured half of the shapes: the last row of an operation and shape counts, and the floors use the best
rates that any of the files has for that GPU.

A time is the median over replays of a CUDA graph that walks over input sets larger than the caches, so no time
includes launches. The floor is the time that the bytes need at the best rates of the same run
(`benchmarks.bandwidth`); the benchmark fails if a row is faster than its floor. The inputs are random, because times
do not depend on them. Errors are relative to float64 on the first input set.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernel_attention, kernel_linear, kernel_norm_rope
from benchmarks.bandwidth import REPLAYS, Bandwidth, check_floors, measured_bandwidth, milliseconds, with_best_floors
from benchmarks.enhance_cost import layer_cost
from benchmarks.gates import device, gate, largest, smallest, write_result
from postgen.kernels.adaln import naive as adaln_naive
from postgen.kernels.adaln.ops import gate_residual_norm_modulate, norm_modulate
from postgen.kernels.temporal_cfi import naive as cfi_naive
from postgen.kernels.temporal_cfi.ops import temporal_self_share

MIB = 2**20
ROTATED_BYTES = 512 * MIB
"""The total size of the input sets: eight times the caches of an H200."""
STAMPS = ("date", "device", "versions", "copy_tb_per_s", "read_tb_per_s", "write_tb_per_s")
"""The keys that a joined result keeps for each of its parts, beside the rows."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a clip in a transformer: latent frames, tokens per frame (`places`), heads and channels per head."""

    name: str
    frames: int
    places: int
    heads: int
    channels: int


WAN = (
    Shape(name="Wan 1.3B 480p 81f", frames=21, places=1560, heads=12, channels=128),
    Shape(name="Wan 14B 720p 81f", frames=21, places=3600, heads=40, channels=128),
)
OTHERS = (
    Shape(name="Wan 1.3B 720p 81f", frames=21, places=3600, heads=12, channels=128),
    Shape(name="Wan 14B 480p 81f", frames=21, places=1560, heads=40, channels=128),
    Shape(name="HunyuanVideo 720p 129f", frames=33, places=3600, heads=24, channels=128),
    Shape(name="CogVideoX-5B 49f", frames=13, places=1350, heads=48, channels=64),
    Shape(name="LTX 97f 512x768", frames=13, places=384, heads=32, channels=64),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape."""

    op: str
    shape: str
    moved_bytes: int
    """The bytes that must be read and written once."""
    make: Callable[[], tuple[Any, ...]]
    """Draws one set of inputs."""
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    """The plain torch code of models."""
    exact: Callable[..., Any]
    """The reference; it receives float64 inputs."""
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Kernels of other packages."""
    compared: Callable[[Tensor], Tensor] = lambda x: x
    """Selects the part of every input and result whose error is computed, for example some heads."""

    def error(self) -> float:
        """Return the largest relative L2 error of the results of `ours`."""
        inputs = self.make()
        found = [self.compared(x) for x in _tuple(self.ours(*inputs))]
        expected = _tuple(self.exact(*(self.compared(x).double() for x in inputs)))
        return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))


def temporal_cfi(shape: Shape, device: str = "cuda") -> Case:
    """Return the case of the temporal self-attention share of Enhance-A-Video, with inputs in token order."""
    size = (1, shape.frames, shape.places, shape.heads, shape.channels)

    def make() -> tuple[Tensor, Tensor]:
        query, key = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
        return query, key

    return Case(
        op="temporal_cfi",
        shape=shape.name,
        moved_bytes=2 * 2 * torch.Size(size).numel(),
        make=make,
        ours=temporal_self_share,
        eager=official_self_share,
        exact=cfi_naive.temporal_self_share,
    )


def official_self_share(query: Tensor, key: Tensor) -> Tensor:
    """Compute the share as the authors of Enhance-A-Video do (arXiv:2502.07508, eq. 5-6), with all attention maps."""
    frames, channels = query.shape[1], query.shape[-1]
    query, key = (x.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous() for x in (query, key))
    logits = (query * channels**-0.5) @ key.transpose(-2, -1)
    maps = logits.float().softmax(dim=-1).flatten(0, 1)
    others = maps.masked_fill(torch.eye(frames, dtype=torch.bool, device=maps.device), 0.0)
    intensity = others.sum(dim=(-2, -1)) / (frames * (frames - 1))
    return 1 - (frames - 1) * intensity.mean(dim=0, keepdim=True)


def adaln(shape: Shape, *, residual: bool, per_token: bool = False, device: str = "cuda") -> Case:
    """Return the case of the norm before a layer, with or without the gate and residual of the previous layer."""
    tokens, width = shape.frames * shape.places, shape.heads * shape.channels
    rows, streams = (tokens if per_token else 1), (2 if residual else 1)

    def make() -> tuple[Tensor, ...]:
        streamed = [torch.randn(1, tokens, width, dtype=torch.bfloat16, device=device) for _ in range(streams)]
        return *streamed, *(torch.randn(1, rows, width, device=device) for _ in range(streams + 1))

    kind = "per token" if per_token else "per sample"
    return Case(
        op="adaln gate + residual + norm + modulate" if residual else "adaln norm + modulate",
        shape=f"{shape.name}, modulation {kind}",
        moved_bytes=2 * streams * tokens * width * 2 + (streams + 1) * rows * width * 4,
        make=make,
        ours=gate_residual_norm_modulate if residual else norm_modulate,
        eager=official_residual if residual else official_norm,
        exact=adaln_naive.gate_residual_norm_modulate if residual else adaln_naive.norm_modulate,
    )


def official_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute the norm in float32 and the modulation as a Wan block of diffusers does."""
    return (F.layer_norm(x.float(), x.shape[-1:], None, None, 1e-6) * (1 + scale) + shift).type_as(x)


def official_residual(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gated residual in float32 and the norm of the next layer as a Wan block of diffusers does."""
    total = (x.float() + y * gate).type_as(x)
    return total, official_norm(total, scale, shift)


def norm_rope(shape: Shape, device: str = "cuda") -> Case:
    """Return the case of the norm and rotation of queries and keys before attention."""
    tokens, norm = shape.frames * shape.places, kernel_norm_rope.norm_of(shape.name)
    width = shape.heads * shape.channels if norm == "rms_norm_across_heads" else shape.channels
    table_heads = shape.heads if shape.name.startswith("LTX") else 1
    affine = 4 if norm == "layer_norm" else 2

    def make() -> tuple[Tensor, ...]:
        size = (1, tokens, shape.heads, shape.channels)
        streams = [torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2)]
        weights = [torch.randn(width, dtype=torch.bfloat16, device=device) for _ in range(affine)]
        angles = torch.randn(tokens, table_heads, shape.channels // 2, device=device).repeat_interleave(2, dim=-1)
        return *streams, *weights, angles.cos(), angles.sin()

    return Case(
        op="norm_rope",
        shape=shape.name,
        moved_bytes=(4 * 2 * shape.heads + 2 * 4 * table_heads) * tokens * shape.channels + affine * width * 2,
        make=make,
        ours=kernel_norm_rope.ours(norm),
        eager=kernel_norm_rope.official(norm),
        exact=kernel_norm_rope.exact(norm),
        peers=kernel_norm_rope.peers(norm, table_heads=table_heads),
    )


def extra_mib(function: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    """Return the peak memory of a call in MiB, without its inputs and results."""
    function(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*inputs)
    peak = torch.cuda.max_memory_allocated() - before
    return (peak - sum(x.numel() * x.element_size() for x in _tuple(result))) / MIB


def written_bytes(case: Case, inputs: tuple[Any, ...]) -> int:
    """Return the bytes of the results of a call, which are part of `moved_bytes`."""
    return sum(x.numel() * x.element_size() for x in _tuple(case.ours(*inputs)))


def measure(case: Case, bandwidth: Bandwidth) -> dict[str, Any]:
    """Measure one case and return its row."""
    error = case.error()
    torch.cuda.empty_cache()
    sets = [case.make() for _ in range(max(2, -(-ROTATED_BYTES // case.moved_bytes)))]
    torch.compiler.reset()
    compiled = torch.compile(case.eager, fullgraph=True, dynamic=False)
    moved, written = case.moved_bytes, written_bytes(case, sets[0])
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "moved_bytes": moved,
        "written_bytes": written,
        "ours_ms": milliseconds(case.ours, sets),
        "eager_ms": milliseconds(case.eager, sets),
        "compiled_ms": milliseconds(compiled, sets),
        "floor_ms": bandwidth.floor(moved, written),
        "relative_error": error,
        "extra_mib": extra_mib(case.ours, sets[0]),
        **{f"{name}_ms": milliseconds(peer, sets) for name, peer in case.peers.items()},
    }
    row["over_floor"] = row["ours_ms"] / row["floor_ms"]
    row["vs_eager"] = row["eager_ms"] / row["ours_ms"]
    row["vs_compiled"] = row["compiled_ms"] / row["ours_ms"]
    row |= {f"vs_{name}": row[f"{name}_ms"] / row["ours_ms"] for name in case.peers}
    print({name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    return row


def gates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the gates: the worst shape of each operation counts, and the gate of an unmeasured operation fails."""
    cfi = [row for row in rows if row["op"] == "temporal_cfi"]
    norms = [row for row in rows if row["op"].startswith("adaln")]
    ropes = [row for row in rows if row["op"] == "norm_rope"]
    return [
        gate("cfi_over_floor", largest(cfi, "over_floor"), "<=", 1.3),
        gate("cfi_extra_mib", largest(cfi, "extra_mib"), "<=", 1),
        gate("cfi_vs_official_eager", smallest(cfi, "vs_eager"), ">=", 7),
        gate("cfi_relative_error", largest(cfi, "relative_error"), "<=", 1e-4),
        gate("adaln_over_floor", largest(norms, "over_floor"), "<=", 1.3),
        gate("adaln_vs_best_peer", min(map(_vs_best, norms), default=None), ">=", 1),
        gate("adaln_relative_error", largest(norms, "relative_error"), "<=", 4e-3),
        gate("norm_rope_over_floor", largest(ropes, "over_floor"), "<=", 1.3),
        gate("norm_rope_vs_best_peer", min(map(_vs_best, ropes), default=None), ">=", 1),
        gate("norm_rope_relative_error", largest(ropes, "relative_error"), "<=", 4e-3),
    ]


def _vs_best(row: dict[str, Any]) -> float:
    return min(value for name, value in row.items() if name.startswith("vs_"))


def cases(shapes: tuple[Shape, ...], device: str = "cuda") -> list[Case]:
    """Return the cases of every operation at every shape."""
    found = [each(shape, device) for each in (temporal_cfi, norm_rope) for shape in shapes]
    for shape in shapes:
        found += [adaln(shape, residual=residual, device=device) for residual in (False, True)]
        found += [Case(**each) for each in kernel_linear.cases(shape, device)]
    return [*found, adaln(shapes[0], residual=True, per_token=True, device=device)]


def enhance_row() -> dict[str, Any]:
    """Measure what Enhance-A-Video adds to one block of Wan 14B at 720p; a forward pass has 40 blocks."""
    cost = layer_cost(720, 1280)
    row = {
        "op": "enhance_a_video",
        "shape": "Wan 14B 720p 81f, one block",
        "ours_ms": cost["milliseconds_with"],
        "without_ms": cost["milliseconds_without"],
        "overhead": cost["overhead_percent"] / 100,
        "extra_mib": cost["peak_mib_with"] - cost["peak_mib_without"],
    }
    print(row, flush=True)
    return row


def all_gates(rows: list[dict[str, Any]], stamps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the gates of all kinds of rows; the gate of the bandwidth only if all `stamps` are of an H200."""
    timed = [row for row in rows if "over_floor" in row]
    attention = [row for row in rows if "backends_ms" in row]
    overhead = next((row["overhead"] for row in rows if row["op"] == "enhance_a_video"), None)
    rates = [stamp["copy_tb_per_s"] for stamp in stamps if "H200" in str(stamp["device"])]
    bandwidth = [gate("copy_tb_per_s", min(rates), ">=", 4.1)] if rates and len(rates) == len(stamps) else []
    return [
        *bandwidth,
        *gates(timed),
        gate("eav_step_overhead", overhead, "<=", 0.005),
        *kernel_linear.gates(timed),
        *kernel_attention.attention_gates(attention),
    ]


def joined(paths: list[str]) -> dict[str, Any]:
    """Return the payload of several results combined.

    Raises:
        ValueError: a file does not exist or is no result of this benchmark, or a row is faster than its floor.
    """
    results = [part for path in paths for part in _results(path)]
    rows = list({(row["op"], row["shape"]): row for row in with_best_floors(results)}.values())
    check_floors(rows)
    return {
        "measured": [{key: result[key] for key in STAMPS} for result in results],
        "replays": REPLAYS,
        "rows": rows,
        "gates": all_gates(rows, results),
    }


def _results(path: str) -> list[dict[str, Any]]:
    """Read a result and check its keys; a joined result is returned as its runs, with all rows in the last one."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        for row in result["rows"]:
            row["op"], row["shape"]
        all_gates(result["rows"], [])
        *others, last = ({key: run[key] for key in STAMPS} for run in result.get("measured", [result]))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of benchmarks.kernels: {error!r}") from error
    if len(devices := {run["device"] for run in (*others, last)}) > 1:
        raise ValueError(f"{path} joins runs of several devices, {', '.join(sorted(devices))}: give one file per run")
    return [*({**run, "rows": []} for run in others), {**last, "rows": result["rows"]}]


def check_operations(only: list[str]) -> None:
    """Check the names of `--only`.

    Raises:
        ValueError: a name is unknown; the message lists the known names.
    """
    known = {"attention", "enhance_a_video", *(case.op for case in cases(WAN[:1], "cpu"))}
    if strange := set(only) - known:
        raise ValueError(f"--only {', '.join(sorted(strange))}: unknown, choose from {', '.join(sorted(known))}")


def measured(*, quick: bool, rest: bool, only: list[str] | None) -> dict[str, Any]:
    """Measure and return the payload; it has no gates if `only` selects operations."""

    def wanted(op: str) -> bool:
        return only is None or op in only

    shapes = WAN if quick else OTHERS if rest else WAN + OTHERS
    with torch.no_grad():
        bandwidth = measured_bandwidth()
        rows = [measure(case, bandwidth) for case in cases(shapes) if wanted(case.op)]
        if wanted("enhance_a_video") and not rest:
            rows.append(enhance_row())
        if wanted("attention"):
            first, last = (2, None) if rest else (0, 2 if quick else None)
            rows += kernel_attention.attention_rows(kernel_attention.SHAPES[first:last])
    told = bandwidth.told()
    found = all_gates(rows, [{"device": device(), **told}]) if only is None else []
    return {**told, "replays": REPLAYS, "rows": rows, "gates": found}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the rows and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="Wan 1.3B at 480p and Wan 14B at 720p only")
    part.add_argument("--rest", action="store_true", help="the shapes that --quick leaves out")
    part.add_argument("--join", nargs="+", metavar="JSON", help="result files to combine; measures nothing")
    parser.add_argument("--only", nargs="+", metavar="OP", help="operations to measure, by the `op` of their rows")
    parser.add_argument("-o", "--output", default="kernels", help="name or path of the result file")
    options = parser.parse_args(argv)
    try:
        if options.join and options.only:
            raise ValueError("--only selects what to measure, but --join measures nothing: omit one of them")
        if options.only:
            check_operations(options.only)
        payload = joined(options.join) if options.join else None
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if payload is None and not torch.cuda.is_available():
        print("benchmarks.kernels needs a GPU: torch sees none", file=sys.stderr)
        return 2
    payload = payload or measured(quick=options.quick, rest=options.rest, only=options.only)
    print(write_result(options.output, payload))
    try:
        # The check comes last, so that the file keeps the measurements even if the check fails.
        check_floors(payload["rows"])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


if __name__ == "__main__":
    sys.exit(main())
