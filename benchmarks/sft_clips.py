"""Clips, captions and prompts of `python -m benchmarks.sft`: a world with new words, and the old world.

In the new world yellow is called sage and green is called slate: words that the base model knows as colours of floors,
but has never read before a body. Its text encoder, which is frozen, tells them apart from all colours; synonyms of
colours have nearly the encoding of their colour. The colours are those of the old world, because the autoencoder shows
no others (`check_autoencoder`). `train` and `held-out` clips, and the prompts of the evaluation, come from separate
ranges of seeds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from postgen import world
from postgen.errors import UserError
from postgen.families import Denoiser
from postgen.files import replacing
from postgen.video import write_video
from postgen.world.check import check_batch
from postgen.world.spec import FPS, Spec

PALETTE = world.Palette(names={"yellow": "sage", "green": "slate"}, turn=0.0, strength=1.0)
FIRST = {
    "train": 930_000,
    "held-out": 950_000,
    "test": 960_000,
    "valid": 970_000,
}
"""Seed of the first scene of each group; trainings on the world begin at 1,000,000."""
_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A scene with a prompt. `spec` and `plain` have the colours of the world, also for the new world."""

    spec: Spec
    new: bool
    """Whether it is shown in the new colours."""
    plain: str
    """Caption in the colours of the world, for the judge."""

    @property
    def prompt(self) -> str:
        """Caption for the model."""
        return PALETTE.rename(self.plain) if self.new else self.plain


def scenes(group: str, count: int, frames: int, *, new: bool) -> list[Scene]:
    """Return scenes with different captions that the judge reads completely.

    Args:
        group: a key of `FIRST`.
        count: number of scenes.
        frames: frames of a clip.
        new: whether the scenes are those of the new colours; otherwise of all colours of the world, one or two bodies.
    """
    found: dict[str, Scene] = {}
    seed = FIRST[group]
    while len(found) < count:
        number, seed = seed, seed + 1
        if new:
            spec = PALETTE.sample(number, num_frames=frames)
        else:
            spec = world.sample(number, num_frames=frames, num_bodies=1 + number % 2, camera="static")
        plain = world.simple_caption(spec)
        # Few captions exist of one body in two colours: the scenes of one caption differ in layout and noise.
        key = f"{plain} {number}" if new else plain
        reading = world.read(plain)
        if reading is not None and key not in found and all(clause.readable for clause in reading.clauses):
            found[key] = Scene(spec=spec, new=new, plain=plain)
    return list(found.values())


def rendered(wanted: list[Scene], size: int, frames: int, device: str = "cpu") -> Tensor:
    """Return the exact clips (B,F,3,H,W) of scenes of one world, on a device."""
    specs = [scene.spec for scene in wanted]
    parts = [
        world.render(
            specs[low : low + _AT_ONCE], num_frames=frames, size=size, geometry=False, device=device
        ).rgb_BF3HW
        for low in range(0, len(specs), _AT_ONCE)
    ]
    clips = torch.cat(parts)
    return PALETTE.paint(clips) if wanted[0].new else clips


def write_folder(folder: Path, *, count: int, held_out: int, size: int, frames: int, device: str) -> None:
    """Write the training clips of both worlds as video files, and lists of rows for each mixture.

    Args:
        folder: gets `new/NNNNN.mp4`, `old/NNNNN.mp4`, `held-out/NNNNN.mp4` and `NAME.jsonl` for `new`, `old`,
            `mixed` and `held-out`. `ready.json` is written last.
        count: number of training clips of each world.
        held_out: number of held-out clips of the new world.
        size: height and width in pixels.
        frames: frames of a clip.
        device: where the scenes are rendered.
    """
    groups = {
        "new": scenes("train", count, frames, new=True),
        "old": scenes("train", count, frames, new=False),
        "held-out": scenes("held-out", held_out, frames, new=True),
    }
    rows = {name: list(_written(folder / name, wanted, size, frames, device)) for name, wanted in groups.items()}
    for name, content in {**rows, "mixed": rows["new"] + rows["old"]}.items():
        text = "".join(json.dumps({"video": f"{file}", "prompt": prompt}) + "\n" for file, prompt in content)
        with replacing(folder / f"{name}.jsonl") as part:
            part.write_text(text, encoding="utf-8")
    with replacing(folder / "ready.json") as part:
        part.write_text(json.dumps({"count": count, "held_out": held_out, "size": size, "frames": frames}) + "\n")


def _written(folder: Path, wanted: list[Scene], size: int, frames: int, device: str) -> Iterator[tuple[str, str]]:
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1))) as pool:
        for low in range(0, len(wanted), _AT_ONCE):
            part = wanted[low : low + _AT_ONCE]
            clips = rendered(part, size, frames, device).cpu()
            files = [folder / f"{low + number:05d}.mp4" for number in range(len(part))]
            list(pool.map(lambda pair: write_video(pair[0], pair[1], fps=FPS), zip(files, clips, strict=True)))
            yield from zip(
                (f"{file.parent.name}/{file.name}" for file in files), (s.prompt for s in part), strict=True
            )


def check_autoencoder(
    denoiser: Denoiser, *, count: int = 16, size: int = 96, frames: int = 17, device: str = "cpu"
) -> None:
    """Check that the autoencoder of a model can show the new world, before anything is trained.

    Args:
        denoiser: the base model.
        count: number of exact clips that are encoded and decoded.
        size: height and width in pixels.
        frames: frames of a clip.
        device: the device of the model.

    Raises:
        UserError: less than half of the clips are wholly right afterwards.
    """
    wanted = scenes("valid", count, frames, new=True)
    with torch.no_grad():
        shown = denoiser.decode(denoiser.encode_video(rendered(wanted, size, frames, device)))
    reports = check_batch(PALETTE.unpaint(shown.float().clamp(0, 1)), [scene.plain for scene in wanted])
    right = sum(report.all_right for report in reports)
    if right < count / 2:
        raise UserError(
            f"the autoencoder of the base model shows {right} of {count} exact clips of the new world wholly right,"
            " and a fine-tuned model cannot be better: give PALETTE other colours"
        )


def digest(folder: Path) -> str:
    """Return a digest of the lists of rows, which name all clips and captions."""
    lists = sorted(folder.glob("*.jsonl"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in lists)).hexdigest()[:12]
