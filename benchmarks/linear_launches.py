"""Search for faster launches of linear attention: other tiles, warps, stages and numbers of programs for each pass.

`python -m benchmarks.linear_launches` times each pass of `postgen.kernels.linear_attention` alone. It prints the
launch of the table and the fastest launches whose results equal those of the table up to rounding. Then it runs the
whole operation and its gradient with the fastest launches, and prints the errors against float64, the times with and
without them, and the rows for `triton_launch.LAUNCHES`. The default shape is that of Wan 1.3B at 480p.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.bandwidth import milliseconds
from benchmarks.linear_errors import ERRORS, gradients, outcome, relative, worst_errors
from postgen.kernels.linear_attention.naive import Terms, rope_table

PASSES = ("keys", "queries", "grad_queries", "grad_sums", "grad_keys", "convolution", "grad_filters")
SHOWN = 8
"""How many launches are printed, the fastest first."""
SAME = 1e-2
"""The largest relative difference between two results that differ only by rounding."""
SETS = 3
"""How many input sets a measurement walks over, so that no input is in the caches."""


def candidates(name: str, *, described: bool = False) -> Iterator[dict[str, int]]:
    """Yield the launches to try for a pass; with `described`, tiles are copied whole instead of loaded by threads."""
    if name in ("convolution", "grad_filters"):
        # Settings that need a new compilation vary fastest, so that the workers start with different kernels.
        answers = name == "convolution"
        ways = itertools.product(
            (30, 60) if answers else (0,), (132, 264, 396), (False, True) if answers else (False,)
        )
        sizes = itertools.product((16, 32), (4, 8, 16), (4, 8), (64, 128))
        for (reserved, programs, stacked), (tokens, warps, strip, channels) in itertools.product(ways, sizes):
            # A thread has two channels of a strip: fewer would shorten its loads, more would need too many sums.
            if tokens * channels == 2 * 32 * warps * strip:
                yield {
                    "tokens": tokens,
                    "warps": warps,
                    "strip": strip,
                    "channels": channels,
                    "stages": 3 if answers else 1,
                    "programs": programs,
                    "stacked": stacked,
                    "reserved": reserved,
                }
        return
    # The number of programs comes first, because changing it needs no compilation.
    if described:
        for programs, tokens, warps, stages in itertools.product((264, 528, 1056), (32, 64, 128), (4, 8), (2, 3, 4)):
            # Two programs with larger tiles and their states would not fit the on-chip memory of a multiprocessor.
            if tokens * stages <= 256:
                yield {"tokens": tokens, "warps": warps, "stages": stages, "programs": programs, "described": True}
        return
    for programs, tokens, warps, stages in itertools.product((0, 264, 1056), (32, 64, 128), (4, 8), (1, 2, 3, 4)):
        yield {"tokens": tokens, "warps": warps, "stages": stages, "programs": programs}


def passes(terms: Terms) -> dict[str, Callable[[Tensor, Tensor, Tensor, Any], Any]]:
    """Return every pass as a function of queries, keys, values and sums; the queries also serve as gradients."""
    from postgen.kernels.linear_attention import triton, triton_strips
    from postgen.kernels.linear_attention.triton_launch import block_d
    from postgen.kernels.linear_attention.triton_rope import rope_rows

    def table(x: Tensor) -> Tensor | None:
        return rope_rows(terms, x, block_d(x.shape[-1]))

    def answered(q: Tensor, sums: Any, x: Tensor | None = None) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if x is None:
            triton._read_state(q, sums, terms, table(q), out)
        else:
            triton._convolve(x, q, sums, terms, table(q), out)
        return out

    if triton_strips.convolves(terms):
        return {
            "convolution": lambda q, k, v, sums: answered(q, sums, v),
            "grad_filters": lambda q, k, v, sums: triton_strips.grad_filters(q, v, terms),
        }
    turned = "" if terms.rope is None else "turned_"
    return {
        f"{turned}keys": lambda q, k, v, sums: triton._sum_keys(k, v, terms, table(q)),
        f"{turned}queries": lambda q, k, v, sums: answered(q, sums),
        f"{turned}grad_queries": lambda q, k, v, sums: triton._of_queries(q, q, sums, terms, table(q))[0],
        f"{turned}grad_sums": lambda q, k, v, sums: triton._sums_of_queries(
            q, q, scales_of(q), (None, None), terms, table(q)
        ),
        f"{turned}grad_keys": lambda q, k, v, sums: triton._grad_keys(q, k, v, sums, terms, table(q)),
    }


def scales_of(query: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of ones, (B, H, N) each, in place of the scales that `grad_queries` computes per query."""
    batch, tokens, heads, _ = query.shape
    found = torch.ones(2, batch, heads, tokens, device=query.device)
    return found[0], found[1]


def drawn(
    grid: tuple[int, int, int], heads: int, channels: int, terms: Terms, count: int = SETS
) -> list[tuple[Any, ...]]:
    """Return `count` sets of queries, keys and values (views of fused projections) and their sums."""
    from postgen.kernels.linear_attention import triton

    sets = []
    for _ in range(count):
        size = (1, math.prod(grid), 3, heads, channels)
        query, key, value = torch.randn(size, dtype=torch.bfloat16, device="cuda").unbind(2)
        sets.append((query, key, value, triton._sum_keys(key, value, terms, None)))
    return sets


def unusable(options: argparse.Namespace) -> str | None:
    """Return why the options cannot be used, or None."""
    if options.channels % 2 or not 32 < options.channels <= 256:
        return f"--channels {options.channels}: the table has launches for even numbers from 34 to 256"
    if min(options.heads, *options.grid) < 1 or options.workers < 0:
        return "--heads and --grid must be at least 1, --workers at least 0"
    if options.described and options.conv:
        return "--described and --conv: the passes with a convolution do not copy whole tiles, so omit one of the two"
    if options.only and {options.conv} != {only in ("convolution", "grad_filters") for only in options.only}:
        return "--only convolution and --only grad_filters need --conv, and --conv has no other passes"
    return None


def compile_all(options: argparse.Namespace, argv: list[str]) -> None:
    """Compile every launch in worker processes, because compiling takes longer than timing; Triton caches on disk."""
    words = [sys.executable, "-m", "benchmarks.linear_launches", *argv, "--workers", "0"]
    parts = [f"{part}/{options.workers}" for part in range(options.workers)]
    for process in [subprocess.Popen([*words, "--compile_only", part]) for part in parts]:
        process.wait()


def launch_part(calls: dict[str, Callable[..., Any]], given: tuple[Any, ...], options: argparse.Namespace) -> None:
    """Launch one part of the candidates once, which compiles them."""
    from postgen.kernels.linear_attention.triton_launch import LAUNCHES, Launch, block_d

    first, step = map(int, options.compile_only.split("/"))
    every = ((name, each) for name in calls for each in candidates(name, described=options.described))
    for name, candidate in itertools.islice(every, first, None, step):
        LAUNCHES[name, block_d(options.channels)] = Launch(**candidate)
        with contextlib.suppress(Exception):  # `sweep` reports launches that fail
            calls[name](*given)


def sweep(name: str, call: Callable[..., Any], sets: list[tuple[Any, ...]], options: argparse.Namespace) -> Any:
    """Time one pass with every launch, print the best launches and return the fastest; the table's launch is one."""
    from postgen.kernels.linear_attention.triton_launch import LAUNCHES, Launch, block_d

    key = name, block_d(options.channels)
    kept, expected = LAUNCHES[key], outcome(call(*sets[0]))
    times = {kept: milliseconds(call, sets)}
    print(f"{name}, in the table: {times[kept]:.4f} ms  {kept}")
    for given in candidates(name, described=options.described):
        LAUNCHES[key] = Launch(**given)
        try:
            if (error := relative(outcome(call(*sets[0])), expected)) > SAME:
                print(f"{name}: {given} is wrong: {error:.1e} from the table's", file=sys.stderr)
                continue
            times[LAUNCHES[key]] = milliseconds(call, sets)
        except Exception as error:  # Triton raises a different exception for each resource that does not suffice
            print(f"{name}: {given} does not run: {type(error).__name__}", file=sys.stderr)
    LAUNCHES[key] = kept
    ranked = sorted(times.items(), key=lambda item: item[1])
    for how, time in ranked[:SHOWN]:
        print(f"{name}: {time:.4f} ms  {how}", flush=True)
    return ranked[0][0]


def compare(fastest: dict[str, Any], terms: Terms, sets: list[tuple[Any, ...]], channels: int) -> int:
    """Compare the table's and the fastest launches in the operation and its gradient; return 1 if an error is high."""
    from postgen.kernels.linear_attention import triton
    from postgen.kernels.linear_attention.triton_launch import LAUNCHES, block_d

    def forward(q: Tensor, k: Tensor, v: Tensor, sums: Any) -> tuple[Tensor, ...]:
        return triton.linear_attention(q, k, v, terms)

    def backward(q: Tensor, k: Tensor, v: Tensor, sums: Any) -> tuple[Tensor, ...]:
        return gradients(q, q, k, v, sums.matrix, sums.vector, terms)

    before = [milliseconds(call, sets) for call in (forward, backward)]
    LAUNCHES.update({(name, block_d(channels)): how for name, how in fastest.items()})
    after = [milliseconds(call, sets) for call in (forward, backward)]
    errors = worst_errors(*sets[0][:3], terms)
    for name, was, now, error in zip(ERRORS, before, after, errors, strict=True):
        print(f"{name}: {was:.4f} ms with the table, {now:.4f} with the fastest, error {error:.2e} of {ERRORS[name]}")
    for name, how in fastest.items():
        given = ", ".join(f"{each.name}={getattr(how, each.name)!r}" for each in changed(how))
        print(f'    ("{name}", {block_d(channels)}): Launch({given}),')
    return int(any(not error <= most for error, most in zip(errors, ERRORS.values(), strict=True)))


def changed(how: Any) -> list[Any]:
    """Return the fields of a launch that differ from the defaults."""
    return [each for each in fields(how) if getattr(how, each.name) != each.default]


def main(argv: list[str] | None = None) -> int:
    """Search for the fastest launches of one shape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_launches", description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=128, help="channels per head; even, 34 to 256")
    parser.add_argument("--heads", type=int, default=12, help="number of heads, at least 1")
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52), help="frames, rows, columns of tokens")
    parser.add_argument("--rope", action="store_true", help="use RMSNorm per head and a rotary embedding")
    parser.add_argument("--without_norm", action="store_true", help="with --rope: no norm, as in benchmarks.kernels")
    parser.add_argument("--described", action="store_true", help="try launches that copy whole tiles (Hopper)")
    parser.add_argument("--conv", action="store_true", help="time the passes with 5 x 5 taps in space and 3 in time")
    parser.add_argument("--only", nargs="+", choices=PASSES, help="passes to time (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile the launches beforehand")
    parser.add_argument("--compile_only", metavar="PART/PARTS", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if wrong := unusable(options):
        print(wrong, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("benchmarks.linear_launches needs a GPU: torch sees none", file=sys.stderr)
        return 2

    terms = _turned(tuple(options.grid), options.channels) if options.rope else Terms()
    if options.without_norm:
        terms = replace(terms, qk_norm=None)
    if options.conv:
        width = options.heads * options.channels
        space, time = torch.randn(width, 5, 5).cuda() / 5, torch.randn(width, 3).cuda()
        terms = replace(terms, grid=tuple(options.grid), conv_space=space, conv_time=time)
    # A worker only compiles, so one input set is enough; many workers share the memory of the GPU.
    count = 1 if options.compile_only else SETS
    sets = drawn(tuple(options.grid), options.heads, options.channels, terms, count)
    calls = {
        name: call
        for name, call in passes(terms).items()
        if not options.only or name.removeprefix("turned_") in options.only
    }
    if options.compile_only:
        launch_part(calls, sets[0], options)
        return 0
    if options.workers:
        compile_all(options, sys.argv[1:] if argv is None else argv)
    fastest = {name: sweep(name, call, sets, options) for name, call in calls.items()}
    return compare(fastest, terms, sets, options.channels)


def _turned(grid: tuple[int, int, int], channels: int) -> Terms:
    pairs = channels // 6
    rope_pairs = (channels // 2 - 2 * pairs, pairs, pairs)
    angles = (torch.randn(length, count) for length, count in zip(grid, rope_pairs, strict=True))
    return Terms(grid=grid, rope=rope_table(*angles).cuda(), rope_pairs=rope_pairs, qk_norm="rms_norm")


if __name__ == "__main__":
    sys.exit(main())
