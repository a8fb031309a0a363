"""Generate clips of the embedded model whose prompts name a cube, so that a person can judge these cubes.

    python -m benchmarks.world_cube_clips FOLDER [--batches 35] [--device cuda]
    python -m benchmarks.world_cube_sheets FOLDER

The first command generates the clips with the settings of RL rollouts (`benchmarks.world_eye_clips.ROLLOUT`). Half of
the clips have one body, half have two. The second command draws sheets of the cubes. A person's verdict on each cube
is in benchmarks/data/world_cubes.json. `benchmarks.world_cube_cross` measures how these cubes improve the network of
`postgen.world.check.edges`. No judge is applied to the clips here. The first command skips batches that exist already.
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
#: First seeds of the clips, by the number of bodies. No other benchmark uses these seeds.
FIRST = {1: 900_000, 2: 920_000}
#: Number of clips per batch for each number of bodies.
_EACH = 4


@dataclass(frozen=True, slots=True)
class Row:
    """A clip to generate: its name, prompt and seed, and the colours of its cubes."""

    name: str
    prompt: str
    seed: int
    cubes: tuple[str, ...]


def rows(bodies: int) -> Iterator[Row]:
    """Yield the clips with `bodies` bodies of which at least one is a cube, without end."""
    for seed in itertools.count(FIRST[bodies]):
        spec = world.sample(seed, num_bodies=bodies, camera="static", num_frames=ROLLOUT.frames)
        cubes = tuple(body.colour for body in spec.bodies if body.shape == "cube")
        if cubes:
            yield Row(f"{bodies}-{seed - FIRST[bodies]:04d}", world.simple_caption(spec), seed, cubes)


def batch_rows(number: int) -> list[Row]:
    """Return the clips of batch `number`."""
    part = (number * _EACH, (number + 1) * _EACH)
    return [row for bodies in FIRST for row in itertools.islice(rows(bodies), *part)]


def make(folder: Path, number: int, pipe: object) -> None:
    """Generate the clips of batch `number` and write them to the folder."""
    part = batch_rows(number)
    job = Job(prompts=[row.prompt for row in part], seeds=[row.seed for row in part], **asdict(ROLLOUT))
    clips = bytes_of(generate(pipe, job))
    write_clips(folder / f"batch-{number:03d}.safetensors", list(clips), job.prompts)


def kept(folder: Path) -> Iterator[tuple[Row, Tensor]]:
    """Yield the clips, uint8 (F,3,H,W), of all batches in the folder.

    Raises:
        RuntimeError: if a file holds a clip of another prompt.
    """
    for path in sorted(folder.glob("batch-*.safetensors")):
        clips, prompts = read_clips(path)
        for row, clip, prompt in zip(batch_rows(int(path.stem[6:])), clips, prompts, strict=True):
            if row.prompt != prompt:
                raise RuntimeError(
                    f"{path} holds a clip of {prompt!r}, expected {row.prompt!r}: delete the file and make it again"
                )
            yield row, clip


def labels() -> dict[tuple[str, str], str]:
    """Return a person's label of each cube, "cube", "not" or "unclear", by the clip's name and the cube's colour."""
    told = json.loads(LABELS.read_text(encoding="utf-8"))["cubes"]
    return {(row["clip"], row["body"]): row["label"] for row in told}


def main() -> None:
    """Generate the batches that are not in the folder yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the clips")
    parser.add_argument("--batches", type=int, default=35, help="number of batches of 8 clips (default: 35)")
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
