"""Long videos of the embedded model on a CPU: seconds of 20 s of video, flat cost a chunk, resuming to the bit.

    python -m benchmarks.worldweaver_cpu --adapter FOLDER --out out/worldweaver/cpu

Writes OUT/cpu.json, which `benchmarks.worldweaver_report --cpu` reads, and leaves the video beside it. The 20 s are
those of `postgen generate "..." --long 20`, from the start of the process to its end, on two cores. Then a stream
without end: a chunk counts once the memory bank is full, from when on nothing should grow. One state of it is saved,
loaded again, and what comes out of it is compared with what came out of the stream.
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
"""Frames that a memory bank stores: until then it grows."""
AGAIN = 4
"""Chunks that are made a second time, from the saved state."""


def timed(adapter: Path, out: Path) -> float:
    """Return the seconds that the command takes on two cores.

    Raises:
        UserError: it failed.
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
        raise UserError(f"postgen generate {' '.join(words)} ended with code {done.returncode}")
    return time.perf_counter() - before


def resident() -> int | None:
    """Return the bytes of this process that are in memory; None where the system does not say."""
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
    """Return cost a chunk and whether a resumed stream is the same."""
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
    """Chunks that are left out: until the bank is full, and a few in which the window fills."""
    return CAPACITY + 8 if chunks >= CAPACITY + 24 else 8


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/worldweaver/cpu"))
    parser.add_argument("--chunks", type=int, default=128, help="of the stream, from 16 on")
    parser.add_argument("--size", type=int, default=128, help="height and width of the stream")
    parser.add_argument("--no-command", action="store_true", help="leave the 20 s out")
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
