"""Times of a training step of Wan's autoencoder: diffusers' frame chunks against whole clips (native and folded).

    python -m benchmarks.whole_clip [--batch 24] [--frames 17] [--steps 10] [--compile]

Prints a table and writes benchmarks/results/whole_clip.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gates import write_result
from postgen.pretrain.autoencoder import new_autoencoder
from postgen.pretrain.whole_clip import WholeClip


def stock(vae: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that encodes and decodes with diffusers' own methods."""
    return lambda x: vae.decode(vae.encode(x).latent_dist.mean).sample  # type: ignore[no-any-return]


def whole(vae: Any, folded: bool, compiled: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that encodes and decodes the whole clip at once."""
    model = WholeClip(vae, folded=folded, compiled=compiled)
    return lambda x: model.decode(model.encode(x)[0])


def seconds_per_step(function: Callable[[Tensor], Tensor], vae: Any, x: Tensor, steps: int) -> float:
    """Return the median seconds of a forward and backward pass after three warm-up steps."""
    times = []
    for step in range(steps + 3):
        _wait(x)
        start = time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = (function(x) - x).abs().mean()
        loss.backward()
        vae.zero_grad(set_to_none=True)
        _wait(x)
        if step >= 3:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Time all variants on the same inputs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    vae = new_autoencoder(32, [1, 2, 2], 16).to(device)
    x = torch.rand(args.batch, 3, args.frames, args.size, args.size, device=device) * 2 - 1
    variants = {"diffusers": stock(vae), "whole": whole(vae, False, False), "whole_folded": whole(vae, True, False)}
    if args.compile:
        variants["whole_compiled"] = whole(vae, False, True)
        variants["whole_folded_compiled"] = whole(vae, True, True)
    rows = []
    for name, function in variants.items():
        seconds = seconds_per_step(function, vae, x, args.steps)
        rows.append(
            {"variant": name, "seconds": seconds, "speedup": (rows[0]["seconds"] if rows else seconds) / seconds}
        )
        print(f"{name:24s} {1000 * seconds:8.1f} ms  {rows[-1]['speedup']:.2f}x", flush=True)
    settings = dict(vars(args))
    write_result("whole_clip", {"settings": settings, "seed": 0, "rows": rows, "gates": []})


if __name__ == "__main__":
    main()
