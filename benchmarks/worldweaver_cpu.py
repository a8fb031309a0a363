"""Long videos of the embedded model on a CPU: time for 20 s of video, constant cost per chunk, bitwise resume.

    python -m benchmarks.worldweaver_cpu --adapter FOLDER --out out/worldweaver/cpu

The benchmark writes OUT/cpu.json for `benchmarks.worldweaver_report --cpu`, and the video beside it. First it times
`postgen generate "..." --long 20` on two cores, from the start of the process to its end. Then it runs a stream
without end. Chunks count once the memory bank is full, because from then on the cost should not grow. It also saves a
state of the stream, loads it, and compares the chunks of the resumed stream with those of the first stream.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gates import device
from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.files import replacing
from postgen.info import versions
from postgen.metrics.drift.cost import flat_cost
from postgen.pipelines.worldweaver import WorldWeaverPipeline

PROMPT = "a red ball rolls left and a blue cube stays still"
SECONDS, CORES = 20, 2
CAPACITY = 64
"""Number of frames that a memory bank stores. The bank grows up to this number."""
AGAIN = 4
"""Number of chunks that are generated a second time, from the saved state."""


def timed(adapter: Path, out: Path) -> float:
    """Return the time in seconds of the command on two cores.

    Raises:
        UserError: the command failed.
    """
    words = [PROMPT, "--long", str(SECONDS), "-o", str(out / "video.mp4"), "--adapter", str(adapter)]
    cores = sorted(os.sched_getaffinity(0))[:CORES] if hasattr(os, "sched_getaffinity") else None
    start = "import os, sys; cores = set(map(int, sys.argv.pop(1).split(',')) if sys.argv[1] else ())\n"
    start += "if cores: os.sched_setaffinity(0, cores)\n"
    start += "from postgen.cli import main; main()"
    told = ",".join(map(str, cores or ()))
    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES), "CUDA_VISIBLE_DEVICES": ""}
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", start, told, "generate", *words], env=environment, check=False)
    if done.returncode:
        raise UserError(
            f"postgen generate {' '.join(words)} failed with exit code {done.returncode}: see its messages above"
        )
    return time.perf_counter() - before


def resident() -> int | None:
    """Return the resident memory of this process in bytes; None: the system does not report it."""
    place = Path("/proc/self/statm")
    return int(place.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if place.is_file() else None


def loaded(adapter: Path) -> Any:
    """Return the pipeline, with its LoRA merged."""
    from diffusers import WanPipeline

    base: Any = WanPipeline.from_pretrained(embedded_model())
    pipe: Any = WorldWeaverPipeline.from_pipe(base, adapter)
    if getattr(base.transformer, "peft_config", None):
        base.fuse_lora()
        base.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def streamed(pipe: Any, chunks: int, out: Path, size: int) -> dict[str, Any]:
    """Run a stream, and return its cost per chunk and whether a resumed stream is identical."""
    words = {"height": size, "width": size, "output_type": "pt", "return_depth": True}
    stream = pipe.stream(PROMPT, generator=torch.Generator().manual_seed(0), **words)
    skip, kept = _full(chunks), []
    seconds, memory = [], []
    while len(seconds) < chunks:
        before = time.perf_counter()
        chunk = next(stream)
        seconds.append(time.perf_counter() - before)
        gc.collect()
        memory.append(resident())
        if len(seconds) == chunks - AGAIN:
            chunk.state.save(out / "state")
        elif len(seconds) > chunks - AGAIN:
            kept.append((chunk.frames, chunk.depth))
        frames = chunk.start_frame + chunk.frames.shape[1]
    again = pipe.stream(state=pipe.load_state(out / "state"), output_type="pt", return_depth=True)
    made = [(chunk.frames, chunk.depth) for chunk in itertools.islice(again, AGAIN)]
    same = [_same(*pair) for pair in zip(kept, made, strict=True)]
    row: dict[str, Any] = {"chunks": chunks, "skipped": skip, "frames": frames, "resume_identical": float(all(same))}
    row["seconds_per_chunk"] = sum(seconds[skip:]) / len(seconds[skip:])
    for name, values in {"time": seconds, "memory": memory}.items():
        if None not in values:
            trend = flat_cost([float(value) for value in values if value is not None], skip=skip)
            row[f"{name}_slope"] = [trend.slope.low, trend.slope.value, trend.slope.high]
            row[f"{name}_growth"] = [trend.growth.low, trend.growth.value, trend.growth.high]
    return row


def _full(chunks: int) -> int:
    """Return the number of first chunks to skip: until the bank is full, and a few while the window fills."""
    return CAPACITY + 8 if chunks >= CAPACITY + 24 else 8


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--out", type=Path, default=Path("out/worldweaver/cpu"), help="output folder")
    parser.add_argument("--chunks", type=int, default=128, help="number of chunks of the stream, at least 16")
    parser.add_argument("--size", type=int, default=128, help="height and width of the stream")
    parser.add_argument("--no-command", action="store_true", help="do not time the command for 20 s of video")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(CORES)
    try:
        row = streamed(loaded(options.adapter), max(16, options.chunks), options.out, options.size)
        row |= {} if options.no_command else {"seconds_per_20s": timed(options.adapter, options.out)}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    row |= {"size": options.size, "device": device(), "versions": versions()}
    with replacing(options.out / "cpu.json") as part:
        part.write_text(json.dumps(row, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
