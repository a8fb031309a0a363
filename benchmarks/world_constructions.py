"""Constructed clips that are right or wrong on purpose, in several kinds, and a person's verdict on each.

    python -m benchmarks.world_constructions FOLDER [--seed 1] [--fresh] [--only extra]

The command writes the contact sheets of one draw (all clips of one seed) to FOLDER. A person looks at the sheets and
writes a verdict for each clip to benchmarks/data/world_verdicts.json: "right", "unclear" (not counted), or
"wrong: reason". `benchmarks.world_check` compares the judge with these verdicts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from benchmarks.world_kinds.table import KINDS

for _name in ("motion", "bodies", "physics", "looks", "language", "search"):
    importlib.import_module(f"benchmarks.world_kinds.{_name}")

#: Seed of the first draw. The seed of the fresh draw was chosen after the judge was frozen.
SEED = 1
VERDICTS = Path(__file__).with_name("data") / "world_verdicts.json"


@dataclass(frozen=True, slots=True)
class Construction:
    """A clip (F,3,H,W) in [0,1] with its prompt. `name` consists of the kind, the seed and a number."""

    name: str
    group: str
    kind: str
    right: bool
    prompt: str
    clip: Tensor


def draw(seed: int = SEED, fresh: bool = False, only: str = "") -> Iterator[Construction]:
    """Yield the constructions of a seed. They depend only on the seed. A fresh draw has half as many."""
    for kind in KINDS.values():
        if only not in kind.name:
            continue
        for number in range((kind.count + 1) // 2 if fresh else kind.count):
            made = kind.make(random.Random(f"{kind.name}-{seed}-{number}"))
            # Round to 8 bits per channel, because a video file has 8 bits.
            clip = (made[1].clamp(0, 1) * 255).round() / 255
            yield Construction(
                f"{kind.name}/{seed}/{number}", kind.group, kind.name, kind.right, made[0], clip.contiguous()
            )


def verdicts() -> dict[str, str]:
    """Return a person's verdicts by the name of the clip: "right", "unclear", or "wrong: reason"."""
    found: dict[str, str] = json.loads(VERDICTS.read_text(encoding="utf-8"))["verdicts"]
    return found


def strip(clip: Tensor, title: str, frames: int, side: int) -> Image.Image:
    """Draw evenly spaced frames of a clip in a row under a title."""
    frames = min(frames, len(clip))
    chosen = torch.linspace(0, len(clip) - 1, frames).round().long()
    shown = functional.interpolate(clip[chosen], (side, side), mode="area" if clip.shape[-1] > side else "nearest")
    row = (shown.clamp(0, 1) * 255).byte().permute(2, 0, 3, 1).reshape(side, -1, 3)
    picture = Image.new("RGB", (row.shape[1], side + 13), "white")
    picture.paste(Image.fromarray(row.numpy()), (0, 13))
    ImageDraw.Draw(picture).text((2, 1), title, fill="black")
    return picture


def sheets(strips: list[Image.Image], folder: Path, name: str, columns: int, rows: int) -> None:
    """Write strips of equal size to PNG sheets with the given number of columns and rows."""
    folder.mkdir(parents=True, exist_ok=True)
    wide, high = max(s.width for s in strips), strips[0].height
    for page, low in enumerate(range(0, len(strips), columns * rows)):
        part = strips[low : low + columns * rows]
        sheet = Image.new("RGB", (columns * (wide + 6), -(-len(part) // columns) * (high + 3)), "white")
        for k, one in enumerate(part):
            sheet.paste(one, (k % columns * (wide + 6), k // columns * (high + 3)))
        sheet.save(folder / f"{name}_{page:02d}.png")


def main() -> None:
    """Draw the sheets: all frames of clips that differ in motion, few large frames of clips that differ in looks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the sheets")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of the draw (default: {SEED})")
    parser.add_argument("--fresh", action="store_true", help="draw half as many clips of each kind")
    parser.add_argument("--only", default="", help="draw only kinds whose name contains this text (default: all)")
    args = parser.parse_args()
    still: list[Image.Image] = []
    moving: list[Image.Image] = []
    for made in draw(args.seed, args.fresh, args.only):
        title = f"{made.name}: {made.prompt}"
        if made.group == "looks":
            still.append(strip(made.clip, title[:92], 4, 144))
        else:
            moving.append(strip(made.clip, title, 17, 88))
    if still:
        sheets(still, args.folder, "looks", 2, 8)
    if moving:
        sheets(moving, args.folder, "moving", 1, 14)


if __name__ == "__main__":
    main()
