"""Rendering speed of the synthetic world in frames per second, at 64 and 128 px, with and without geometry.

    python -m benchmarks.world [--device cpu|cuda] [--repeats 5] [--output NAME]

The variants are RGB with one ray per pixel, RGB with 2x2 antialiasing, and RGB with 2x2 antialiasing plus depth, ids
and flow. The clips have 17 frames and one to three bodies. The result is the median of the repeats, without the time
to draw the scenes. The command writes benchmarks/results/world.json and keeps the rows of other devices in this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks.gates import RESULTS, device, write_result
from postgen import world
from postgen.world.spec import Spec

FRAMES = 17
BATCH = {"cpu": 8, "cuda": 128}
VARIANTS = {
    "RGB, 1 ray": {"supersample": 1, "geometry": False},
    "RGB, 2x2 rays": {"supersample": 2, "geometry": False},
    "RGB, 2x2 rays, depth, ids, flow": {"supersample": 2, "geometry": True},
}


def seconds(specs: list[Spec], size: int, place: str, repeats: int, **options: Any) -> list[float]:
    """Return the seconds of each of `repeats` renders, after one render that is not counted."""
    times = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        world.render(specs, size=size, device=place, **options)
        if place == "cuda":
            torch.cuda.synchronize()
        if repeat:
            times.append(time.perf_counter() - start)
    return times


def main() -> None:
    """Time every variant, print the rates and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5, help="number of renders that count (default: 5)")
    parser.add_argument("--output", default="world", help="name or path of the result file")
    args = parser.parse_args()
    place = device() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    specs = [world.sample(seed, num_frames=FRAMES) for seed in range(BATCH[args.device])]
    rows = []
    for size in (64, 128):
        for name, options in VARIANTS.items():
            times = seconds(specs, size, args.device, args.repeats, **options)
            rate = len(specs) * FRAMES / statistics.median(times)
            rows.append({"device": place, "size": size, "variant": name, "batch": len(specs), "frames_per_s": rate})
            print(f"{place}  {size} px  {name:32s} {rate:10.1f} frames/s", flush=True)
    old = RESULTS / "world.json"
    kept = json.loads(old.read_text())["rows"] if old.is_file() else []
    kept = [row for row in kept if row["device"] != place]
    settings = {"frames": FRAMES, "repeats": args.repeats}
    write_result(args.output, {"settings": settings, "rows": sorted(kept + rows, key=str), "gates": []})


if __name__ == "__main__":
    main()
