"""Count calls in several threads on one transformer whose result differs from that of the same call alone.

    python -m benchmarks.faults_threads

Four pipelines of tiny random models share one transformer, and each has its own scheduler. In each of four threads,
one pipeline is called 25 times, with its own settings and seeds. The threads wait for each other in the middle of the
transformer. This is repeated for every plug-in of the table. Run the benchmark from the root of a checkout, because it
uses the tiny models of the tests.
"""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from postgen.plug_ins import known_plug_ins

THREADS = 4
CALLS = 100
"""Number of calls for each plug-in, in all threads together."""


def threads_wrong() -> int:
    """Return the number of wrong calls of all plug-ins together, with `CALLS` calls per plug-in."""
    return sum(wrong_by_plug_in().values())


def wrong_by_plug_in(calls: int = CALLS) -> dict[str, int]:
    """Return by plug-in how many calls fail, or differ in any bit from the same call alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the order of sums, and results are compared bit by bit
    try:
        return {row.name: _wrong(row.name, calls) for row in known_plug_ins()}
    finally:
        torch.set_num_threads(threads)


def _wrong(name: str, calls: int) -> int:
    from tests.families.test_calls import SETTINGS

    settings = (*SETTINGS[name], False, None)
    pipes = _pipelines()
    rounds = calls // THREADS
    work = [[(settings[(one + k) % THREADS], THREADS * k + one) for k in range(rounds)] for one in range(THREADS)]
    alone = [[_latents(pipe, name, *job) for job in jobs] for pipe, jobs in zip(pipes, work, strict=True)]
    distinct = [_latents(pipes[0], name, setting, 0) for setting in settings[:3]]
    if any(torch.equal(a, b) for a, b in itertools.combinations(distinct, 2)):
        raise RuntimeError(f"two settings of {name} produce equal results, so a mix-up of settings cannot be detected")
    barrier = threading.Barrier(THREADS, timeout=60)
    hook = pipes[0].transformer.transformer_blocks[1].register_forward_pre_hook(lambda *_: _meet(barrier))
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            running = [pool.submit(_run, pipe, name, jobs) for pipe, jobs in zip(pipes, work, strict=True)]
            found = [each.result() for each in running]
    finally:
        hook.remove()
    pairs = [pair for got, expected in zip(found, alone, strict=True) for pair in zip(got, expected, strict=True)]
    return sum(got is None or not torch.equal(got, expected) for got, expected in pairs)


def _pipelines() -> list[Any]:
    """Return drop-in pipelines that share one transformer. Each has its own copy of all other components."""
    from postgen.pipelines import CogVideoXPipeline
    from tests.pipelines.others import cogvideox_parts

    parts = cogvideox_parts("CogVideoX 1.5")
    shared = parts.pop("transformer").eval()
    pipes = [CogVideoXPipeline(transformer=shared, **copy.deepcopy(parts)) for _ in range(THREADS)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def _latents(pipe: Any, name: str, setting: Any, seed: int) -> Tensor:
    size = {"height": 16, "width": 32, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(seed)
    result = pipe("a ball", **size, generator=generator, output_type="latent", **{name: setting})
    latents: Tensor = result.frames
    return latents


def _run(pipe: Any, name: str, jobs: list[tuple[Any, int]]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for setting, seed in jobs:
        try:
            found.append(_latents(pipe, name, setting, seed))
        except Exception as failure:
            print(f"{name}: {failure}", file=sys.stderr)
            found.append(None)
    return found


def _meet(barrier: threading.Barrier) -> None:
    """Wait for the other threads. If one of them has failed, continue without waiting."""
    try:
        barrier.wait()
    except threading.BrokenBarrierError:
        return


if __name__ == "__main__":
    counts = wrong_by_plug_in()
    print("\n".join(f"{name}: {count} of {CALLS} calls wrong" for name, count in counts.items()))
    sys.exit(any(counts.values()))
