"""Speed of the judge of the synthetic world in clips per second, in one process and with four worker processes.

    python -m benchmarks.world_speed [--device cpu|cuda] [--clips 256] [--repeats 3] [--output NAME]

The clips are true clips of one to three bodies, in the size of RL rollouts (96 px, 17 frames) and in the default size
of the embedded model (128 px, 33 frames). The result is the median of the repeats, with the processes already started.
The command writes benchmarks/results/world_speed.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.gates import device, gate, write_result
from postgen import world
from postgen.world.check import check_batch

SHAPES = {"96 px, 17 frames": (96, 17), "128 px, 33 frames": (128, 33)}
GATED = "96 px, 17 frames"
WORKERS = (0, 4)


def rates(size: int, frames: int, clips: int, repeats: int, place: str) -> dict[str, float]:
    """Return the clips per second for each number of worker processes."""
    specs = [world.sample(seed, num_frames=frames) for seed in range(clips)]
    rgb = world.render(specs, size=size, device=place).rgb_BF3HW
    found = {}
    for workers in WORKERS:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            check_batch(rgb, specs, workers=workers)
            times.append(time.perf_counter() - start)
        found[f"{workers} workers"] = clips / statistics.median(times[1:])
    return found


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clips", type=int, default=256, help="number of clips per call (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="calls that count, after one warm-up (default: 3)")
    parser.add_argument("--output", default="world_speed", help="name or path of the result file")
    return parser.parse_args()


def main() -> None:
    """Measure the rates, print and write them."""
    args = options()
    rows: dict[str, dict[str, float]] = {}
    for name, (size, frames) in SHAPES.items():
        rows[name] = rates(size, frames, args.clips, args.repeats, args.device)
        print(f"{name:18s}", {workers: round(rate, 1) for workers, rate in rows[name].items()}, flush=True)
    # The gate is for a training machine, which has a GPU. On a machine without one it is not measured.
    rate = rows[GATED]["4 workers"] if args.device == "cuda" else None
    payload: dict[str, Any] = {
        "settings": {"clips": args.clips, "repeats": args.repeats, "device": args.device},
        "clips_per_second": rows,
        "gates": [gate("clips_per_second", rate, ">=", 100)],
    }
    print(device(), "->", write_result(args.output, payload))


if __name__ == "__main__":
    main()
