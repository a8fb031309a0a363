"""Clips that are right or wrong on purpose, in kinds, and what a person says of each.

    python -m benchmarks.world_constructions FOLDER [--seed 1] [--fresh] [--only extra]

Draws the contact sheets of a draw into FOLDER. A person looks at them and writes a verdict for each clip into
benchmarks/data/world_verdicts.json: "right", "unclear" (not counted), or "wrong: why". `benchmarks.world_check`
measures the judge against that file.
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

#: The first draw. The fresh one was chosen after the judge was frozen.
SEED = 1
VERDICTS = Path(__file__).with_name("data") / "world_verdicts.json"


@dataclass(frozen=True, slots=True)
class Construction:
    """A clip (F,3,H,W) in [0,1] under a prompt; `name` is the kind, the seed and a number."""

    name: str
    group: str
    kind: str
    right: bool
    prompt: str
    clip: Tensor


def draw(seed: int = SEED, fresh: bool = False, only: str = "") -> Iterator[Construction]:
    """Yield the constructions of a seed; the same seed gives the same clips. A fresh draw has half as many."""
    for kind in KINDS.values():
        if only not in kind.name:
            continue
        for number in range((kind.count + 1) // 2 if fresh else kind.count):
            made = kind.make(random.Random(f"{kind.name}-{seed}-{number}"))
            # 8 bits a channel, as a video file has it.
            clip = (made[1].clamp(0, 1) * 255).round() / 255
            yield Construction(
                f"{kind.name}/{seed}/{number}", kind.group, kind.name, kind.right, made[0], clip.contiguous()
            )


def verdicts() -> dict[str, str]:
    """What a person says: name of a clip -> "right", "unclear", or "wrong" and why."""
    found: dict[str, str] = json.loads(VERDICTS.read_text(encoding="utf-8"))["verdicts"]
    return found


def strip(clip: Tensor, title: str, frames: int, side: int) -> Image.Image:
    """Frames of a clip in a row under a title."""
    frames = min(frames, len(clip))
    chosen = torch.linspace(0, len(clip) - 1, frames).round().long()
    shown = functional.interpolate(clip[chosen], (side, side), mode="area" if clip.shape[-1] > side else "nearest")
    row = (shown.clamp(0, 1) * 255).byte().permute(2, 0, 3, 1).reshape(side, -1, 3)
    picture = Image.new("RGB", (row.shape[1], side + 13), "white")
    picture.paste(Image.fromarray(row.numpy()), (0, 13))
    ImageDraw.Draw(picture).text((2, 1), title, fill="black")
    return picture


def sheets(strips: list[Image.Image], folder: Path, name: str, columns: int, rows: int) -> None:
    """Write strips of one size as sheets of that many columns and rows."""
    folder.mkdir(parents=True, exist_ok=True)
    wide, high = max(s.width for s in strips), strips[0].height
    for page, low in enumerate(range(0, len(strips), columns * rows)):
        part = strips[low : low + columns * rows]
        sheet = Image.new("RGB", (columns * (wide + 6), -(-len(part) // columns) * (high + 3)), "white")
        for k, one in enumerate(part):
            sheet.paste(one, (k % columns * (wide + 6), k // columns * (high + 3)))
        sheet.save(folder / f"{name}_{page:02d}.png")


def main() -> None:
    """Draw the sheets: all frames of what is about time, few large ones of what is about looks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--fresh", action="store_true", help="half as many of each kind")
    parser.add_argument("--only", default="", help="kinds whose name holds this")
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
