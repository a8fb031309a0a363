"""Attention at the shapes of real models: the router's choice, every usable backend, and the default of diffusers.

Part of `python -m benchmarks.kernels`. All backends are recorded in CUDA graphs and replayed in turns, so that a GPU
that slows down slows all of them. A time is the median. Errors are relative to float64 on the first queries. If
SageAttention is installed, it is timed too; it multiplies queries and keys in 8 bits, so the router never chooses it.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gates import gate, largest
from postgen.kernels.attention import naive
from postgen.kernels.attention.backends import TIMED, Call
from postgen.kernels.attention.ops import attention, router
from postgen.kernels.attention.router import Router

ROUNDS = 30
"""How often every backend is replayed."""
FIRST_ROUNDS = 5
"""After this many replays, backends that take twice as long as the fastest are left out."""
GRAPH_MS = 3.0
"""A graph repeats the call until it takes about this many milliseconds."""
QUERIES = 256
"""The number of queries that are compared to float64."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The size of one self-attention of a model; `tokens` includes text tokens that attend together with the video."""

    name: str
    tokens: int
    heads: int
    channels: int


SHAPES = (
    AttentionShape(name="Wan 1.3B 480p 81f", tokens=32760, heads=12, channels=128),
    AttentionShape(name="Wan 1.3B 720p 81f", tokens=75600, heads=12, channels=128),
    AttentionShape(name="Wan 14B 480p 81f", tokens=32760, heads=40, channels=128),
    AttentionShape(name="Wan 14B 720p 81f", tokens=75600, heads=40, channels=128),
    AttentionShape(name="CogVideoX-5B 49f", tokens=17776, heads=48, channels=64),
    AttentionShape(name="LTX 97f 512x768", tokens=4992, heads=32, channels=64),
    AttentionShape(name="HunyuanVideo 720p 129f", tokens=119056, heads=24, channels=128),
)


def attention_rows(shapes: tuple[AttentionShape, ...] = SHAPES) -> list[dict[str, Any]]:
    """Measure every shape: one row with all installed backends, and one row without FlashAttention-4."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        size = (1, shape.tokens, shape.heads, shape.channels)
        query, key, value = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        found = measure(shape, Call(query, key, value, shape.channels**-0.5, None, False))
        rows += found
        print(*found, sep="\n", flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return rows


def measure(shape: AttentionShape, call: Call) -> list[dict[str, Any]]:
    """Measure one shape and return its rows; the second row exists only if FlashAttention-4 runs."""
    mine = router()
    out = attention(*call[:3])
    choices = {"": mine.choose(call).name}
    runs: dict[str, Callable[[], object]] = {
        "router": partial(attention, *call[:3]),
        "default": partial(default, *call[:3]),
    }
    refused = {}
    for backend in TIMED:
        if reason := mine.why_not(backend, call):
            refused[backend.name] = reason
        else:
            runs[backend.name] = partial(backend.run, call)
    if "fa4" in runs:
        choices["fa4"] = without(mine, "fa4", call)
    error = relative_error(out, call)
    lossy = in_8_bits(call)
    times = in_turns(runs | lossy, refused)
    peers = {
        name: {"ms": times.pop(name), "relative_error": relative_error(run(), call)}
        for name, run in lossy.items()
        if name in times
    }
    rows = [row(shape, times, refused, error, left_out, chosen) for left_out, chosen in choices.items()]
    return [{**each, "in_8_bits": peers} for each in rows]


def in_8_bits(call: Call) -> dict[str, Callable[[], Tensor]]:
    """Return SageAttention if it is installed."""
    if importlib.util.find_spec("sageattention") is None:
        return {}
    from sageattention import sageattn

    query, key, value = call[:3]
    key = key.clone()  # sageattn subtracts the mean in place
    return {"sageattention": lambda: sageattn(query, key, value, tensor_layout="NHD", sm_scale=call.scale)}


def without(mine: Router, name: str, call: Call) -> str:
    """Return the backend that the router chooses if the backend `name` is not installed."""
    others = [backend for backend in TIMED if backend.name != name]
    return Router(others, mine.last_resorts).choose(call).name


def default(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention as diffusers does by default."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def row(
    shape: AttentionShape,
    times: Mapping[str, float],
    refused: Mapping[str, str],
    error: float,
    left_out: str,
    chosen: str,
) -> dict[str, Any]:
    """Return one row; without the backend `left_out`, the router's time is that of the backend it chooses instead."""
    backends = {name: each for name, each in times.items() if name not in ("router", "default", left_out)}
    ours = times.get(chosen, times["default"]) if left_out else times["router"]
    best = min(backends.values(), default=times["default"])
    return {
        "op": f"attention without {left_out}" if left_out else "attention",
        "shape": shape.name,
        "chosen": chosen,
        "ours_ms": ours,
        "default_ms": times["default"],
        "backends_ms": backends,
        "refused": {name: reason for name, reason in refused.items() if name != left_out},
        "router_vs_best": ours / best,
        "router_vs_default": times["default"] / ours,
        "tflop_per_s": 4 * shape.tokens**2 * shape.heads * shape.channels / ours / 1e9,
        "relative_error": error,
    }


def in_turns(runs: Mapping[str, Callable[[], object]], refused: dict[str, str]) -> dict[str, float]:
    """Return the median milliseconds of each function; add functions that no graph can record to `refused`."""
    replays = {}
    for name, run in runs.items():
        try:
            replays[name] = recorded(run)
        except Exception as error:  # kernels of other packages may raise anything
            refused[name] = f"{type(error).__name__}: {str(error)[:160]}"
    times: dict[str, list[float]] = {name: [] for name in replays}
    for turn in range(ROUNDS):
        if turn == FIRST_ROUNDS:
            best = min(statistics.median(each) for each in times.values())
            replays = {name: each for name, each in replays.items() if statistics.median(times[name]) < 2 * best}
        for name, replay in replays.items():
            times[name].append(replay())
    return {name: statistics.median(each) for name, each in times.items()}


def recorded(run: Callable[[], object]) -> Callable[[], float]:
    """Record a function in a CUDA graph; return a function that replays it and returns the milliseconds per call."""
    for _ in range(2):
        run()
    repeats = max(1, round(GRAPH_MS / elapsed(run)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    return lambda: elapsed(graph.replay) / repeats


def elapsed(function: Callable[[], object]) -> float:
    """Return how many milliseconds the GPU takes for the work that a function launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def relative_error(out: Tensor, call: Call) -> float:
    """Return the relative L2 error of the first queries against float64."""
    query, key, value = (x.double() for x in (call.query[:, :QUERIES], call.key, call.value))
    expected, _ = naive.attention(query, key, value, scale=call.scale)
    return float((out[:, :QUERIES].double() - expected).norm() / expected.norm())


def attention_gates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the gates: the worst shape counts. Gates against diffusers' default take the rows with all backends."""
    whole = [row for row in rows if row["op"] == "attention"]

    def slowest(*models: str) -> float | None:
        return min((row["router_vs_default"] for row in whole if row["shape"].startswith(models)), default=None)

    return [
        gate("router_vs_best", largest(rows, "router_vs_best"), "<=", 1.03),
        gate("router_vs_default", slowest("Wan", "CogVideoX"), ">=", 1.15),
        gate("router_vs_default_ltx", slowest("LTX"), ">=", 1.08),
        gate("attention_relative_error", largest(rows, "relative_error"), "<=", 4e-3),
    ]
