"""Time and memory of long videos, chunk by chunk, at the shapes of Wan 1.3B and 14B, with random weights.

`python -m benchmarks.worldweaver_speed` needs a GPU. It writes `results/worldweaver_speed.json` after every row, the
rows of the gates first. `--only 1.3b 14b/worldweaver` selects a size or a row, `--join A.json B.json` joins several
results, and `--profile` adds the kernels of one forward pass of WorldWeaver. `--device cpu` runs everything with tiny
models, to test the benchmark itself.

All rows: 480 x 832, 6 steps, no guidance, bfloat16, random encodings of 512 tokens, eager mode, and diffusers' native
attention backend, which is torch's SDPA. `attention` in each row is the kernel that torch chose. All rows except the
last have latents as output; the last row decodes RGB and depth in float32.

- WorldWeaver has K = 3 groups of F = 3 latent frames behind 4 + 2 frames of memory, with depth: a window of 15.
- SkyReels-V2 with diffusion forcing (`ar_step=0`) has the same widths. Its windows have 97 frames (25 latent frames),
  17 of them history. `skyreels_v2_same_window` has equal steps and context: windows of 15 latent frames, 6 of them
  history.
- Helios has the same widths. FramePack has its own size, 13B. Both generate 9 latent frames behind 19 packed ones.

Weights are random, so the benchmark does not measure quality.

`seconds_per_latent` is the time per new latent frame of a long video: over chunks once the window is full, and over
windows after the first. For the systems of diffusers, the time of a window is six times its mean step without the
first step, because all steps of all windows have the same shapes; therefore 14B runs a single window.
`network_seconds_per_latent` is the part inside the network.

`time_slope` is the increase of the trend over chunks during the run, once window and memory are full: the distance of
its 95 % interval from 0. Times are divided by the time of fixed matrix products after every chunk, because a GPU gets
slower as it warms up. Values up to 0.5 % are noise. `memory_slope` is the same for peak bytes, and exact.

Expected values on an H200 from FLOPs (500 TFLOP/s, attention 560) and bytes (3.8 TB/s) follow. The value from FLOPs
alone is `expected_seconds_per_call` in each row. The last column is the time of the row including its start:

    row                           tokens  PFLOP  calls/latent  s/call  s/latent  / SkyReels-V2  seconds
    1.3b worldweaver               23400   0.16  2/3            0.37    0.25     0.94            55
    1.3b skyreels_v2               39000   0.38  6/20           0.89    0.27                     14
    14b worldweaver                23400   1.02  2/3            2.05    1.37     1.01           225
    14b skyreels_v2                39000   2.20  6/20           4.5     1.36                     32
    1.3b skyreels_v2_same_window   23400   0.16  6/9            0.41    0.27                      8
    1.3b helios                    17966   0.10  6/9            0.28    0.19                      6
    14b framepack                  18951   0.52  6/9            1.1     0.75                     12
    14b helios                     17966   0.69  6/9            1.5     1.0                      15
    1.3b worldweaver_decoded       23400   0.16  2/3                                             20
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gates import RESULTS, Gate, amend_result, gate, largest, write_result
from benchmarks.worldweaver_systems import MODELS, SYSTEMS, TINY, Bench, Row
from postgen.files import replacing

ORDER = (
    ("1.3b", "worldweaver"),
    ("1.3b", "skyreels_v2"),
    ("14b", "worldweaver"),
    ("14b", "skyreels_v2"),
    ("1.3b", "skyreels_v2_same_window"),
    ("1.3b", "helios"),
    ("14b", "framepack"),
    ("14b", "helios"),
    ("1.3b", "worldweaver_decoded"),
)
CHUNKS = {"1.3b": 60, "14b": 50, "tiny": 56}
"""Number of WorldWeaver chunks. Window and memory bank are full after the first 25."""


def rows(asked: Sequence[tuple[str, str]], place: str, chunks: int | None, profile: bool) -> Iterator[Row]:
    """Yield the rows. A row that does not fit into memory has an entry `error`."""
    for size, name in asked:
        model = TINY if size == TINY.name else MODELS[size]
        bench = Bench(model, place, CHUNKS[size] if chunks is None else chunks, profile)
        before = bench.synchronized()
        row: Row = {"model": size, "system": name}
        try:
            with torch.no_grad():
                row |= SYSTEMS[name](bench)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        row["row_seconds"] = bench.synchronized() - before
        yield row
        gc.collect()
        if bench.place.type == "cuda":
            torch.cuda.empty_cache()


def gates(found: list[Row]) -> list[Gate]:
    """Return the gates for the rows that exist: the largest value of both sizes."""
    by_name = {(row["model"], row["system"]): row for row in found if "seconds_per_latent" in row}
    own = [row for (_, system), row in by_name.items() if system == "worldweaver"]
    ratios = [
        {"ratio": row["seconds_per_latent"] / other["seconds_per_latent"]}
        for row in own
        if (other := by_name.get((row["model"], "skyreels_v2")))
    ]
    slopes = {
        name: [{"away": _away(row[f"{name}_growth"])} for row in own if f"{name}_growth" in row]
        for name in ("time", "memory")
    }
    return [
        gate("time_per_latent_vs_skyreels", largest(ratios, "ratio"), "<=", 1.1),
        gate("time_slope", largest(slopes["time"], "away"), "<=", 0.005),
        gate("memory_slope", largest(slopes["memory"], "away"), "==", 0),
    ]


def _away(interval: Sequence[float]) -> float:
    """Return the distance of an interval (low, value, high) from 0."""
    low, _, high = interval
    return max(0.0, low, -high)


def join(first: Path, others: Sequence[Path], output: str) -> None:
    """Write the rows of several results as one; of rows of the same name the last one counts.

    The result keeps date, device and versions of the first file; rows of the other files have their own, under
    `remeasured`.
    """
    whole = json.loads(first.read_text(encoding="utf-8"))
    target = Path(output) if output.endswith(".json") else RESULTS / f"{output}.json"
    with replacing(target) as part:
        part.write_text(json.dumps(whole), encoding="utf-8")
    found = {(row["model"], row["system"]): row for row in whole["rows"]}
    for file in others:
        more = json.loads(file.read_text(encoding="utf-8"))
        found |= {(row["model"], row["system"]): row for row in more["rows"]}
        names = ["/".join((row["model"], row["system"])) for row in more["rows"]]
        rows = list(found.values())
        amend_result(output, {"rows": rows}, {}, gates(rows), stamp=more, parts=names)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*MODELS, *("/".join(row) for row in ORDER)]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=list(MODELS), metavar="SIZE[/ROW]", help="sizes or rows"
    )
    parser.add_argument("--join", nargs="+", type=Path, metavar="FILE", help="results to join into one")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for tiny models")
    parser.add_argument("--chunks", type=int, help=f"number of WorldWeaver chunks (default: {CHUNKS})")
    parser.add_argument("--profile", action="store_true", help="add the kernels of one WorldWeaver forward pass")
    parser.add_argument("-o", "--output", default="worldweaver_speed", help="name or path of the result file")
    options = parser.parse_args(argv)
    if options.join:
        join(options.join[0], options.join[1:], options.output)
        return 0
    asked: list[Any] = [row for row in ORDER if {row[0], "/".join(row)} & {*options.only}]
    if options.device == "cpu":
        asked = [(TINY.name, name) for name in SYSTEMS]
    found = []
    for row in rows(asked, options.device, options.chunks, options.profile):
        print(
            {name: value for name, value in row.items() if not isinstance(value, list) or len(value) < 4}, flush=True
        )
        found.append(row)
        write_result(options.output, {"rows": found, "gates": gates(found)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
