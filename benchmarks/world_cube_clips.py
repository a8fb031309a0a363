"""Clips of the embedded model whose prompts name a cube, and sheets of these cubes for a person to look at.

    python -m benchmarks.world_cube_clips FOLDER [--batches 35] [--device cuda]
    python -m benchmarks.world_cube_sheets FOLDER

They are made as a policy draws them (`benchmarks.world_eye_clips.ROLLOUT`), one and two bodies in equal parts. What a
person says of each cube stands in benchmarks/data/world_cubes.json, and `benchmarks.world_cube_cross` tries
what the network of `postgen.world.check.edges` learns from them. No judge sees the clips here. A batch that is there
already is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.embedded_sampling import Job, generate, load
from benchmarks.embedded_sheets import bytes_of, read_clips, write_clips
from benchmarks.world_eye import DATA
from benchmarks.world_eye_clips import ROLLOUT
from postgen import world
from postgen.assets import embedded_model

LABELS = DATA / "world_cubes.json"
#: First seed of the clips of one body and of two. No other benchmark takes these.
FIRST = {1: 900_000, 2: 920_000}
#: Clips of a batch of each number of bodies.
_EACH = 4


@dataclass(frozen=True, slots=True)
class Row:
    """A clip: its name, what it should show, its seed, and the colours of its cubes."""

    name: str
    prompt: str
    seed: int
    cubes: tuple[str, ...]


def rows(bodies: int) -> Iterator[Row]:
    """Clips of so many bodies with at least one cube, without end."""
    for seed in itertools.count(FIRST[bodies]):
        spec = world.sample(seed, num_bodies=bodies, camera="static", num_frames=ROLLOUT.frames)
        cubes = tuple(body.colour for body in spec.bodies if body.shape == "cube")
        if cubes:
            yield Row(f"{bodies}-{seed - FIRST[bodies]:04d}", world.simple_caption(spec), seed, cubes)


def batch_rows(number: int) -> list[Row]:
    """The clips of a batch."""
    part = (number * _EACH, (number + 1) * _EACH)
    return [row for bodies in FIRST for row in itertools.islice(rows(bodies), *part)]


def make(folder: Path, number: int, pipe: object) -> None:
    """Write the clips of a batch."""
    part = batch_rows(number)
    job = Job(prompts=[row.prompt for row in part], seeds=[row.seed for row in part], **asdict(ROLLOUT))
    clips = bytes_of(generate(pipe, job))
    write_clips(folder / f"batch-{number:03d}.safetensors", list(clips), job.prompts)


def kept(folder: Path) -> Iterator[tuple[Row, Tensor]]:
    """The clips (F,3,H,W) uint8 that are there."""
    for path in sorted(folder.glob("batch-*.safetensors")):
        clips, prompts = read_clips(path)
        for row, clip, prompt in zip(batch_rows(int(path.stem[6:])), clips, prompts, strict=True):
            if row.prompt != prompt:
                raise RuntimeError(f"{path} holds {prompt!r} where {row.prompt!r} was to be")
            yield row, clip


def labels() -> dict[tuple[str, str], str]:
    """Clip and colour of each cube -> "cube", "not" or "unclear", as a person said."""
    told = json.loads(LABELS.read_text(encoding="utf-8"))["cubes"]
    return {(row["clip"], row["body"]): row["label"] for row in told}


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, default=35, help="of 8 clips (default: 35)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    pipe = load(embedded_model(), args.device)
    for number in range(args.batches):
        if not (args.folder / f"batch-{number:03d}.safetensors").is_file():
            make(args.folder, number, pipe)
            print(f"batch {number + 1} of {args.batches}", flush=True)


if __name__ == "__main__":
    main()
