"""Draw sheets of enlarged cubes from generated clips, so that a person can judge whether each one is a cube.

    python -m benchmarks.world_cube_sheets FOLDER       # the clips of `benchmarks.world_cube_clips`

The command finds each cube only by its colour, with the segmentation of the judge, and shows it in frames that are
spread over the clip and in which nearly all of it is visible. It writes FOLDER/sheet-NN.png and FOLDER/cubes.json,
which lists the cubes in the order of the sheets. It measures no shape and shows no verdict.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.world_cube_clips import kept
from postgen.world.check.ground import balance
from postgen.world.check.segment import find_blobs, smooth
from postgen.world.spec import COLOURS

#: Number of frames shown of a cube, their size in pixels, cubes per column and columns per sheet.
SHOWN, _SIDE, _ROWS, _COLUMNS = 6, 88, 11, 2
_GAP, _TEXT = 4, 62
#: Smallest area of the cube in a shown frame, relative to its largest area in the clip; half the side of the crop,
#: relative to the square root of the largest area.
_NEARLY, _REACH = 0.6, 1.0


def crops(clip_F3HW: Tensor, colours: Sequence[str]) -> Iterator[tuple[str, list[Image.Image]]]:
    """Yield each colour with up to `SHOWN` pictures of the largest body of this colour.

    The list of pictures is empty if no body of the colour is found.

    Args:
        clip_F3HW: clip in uint8.
        colours: names from `COLOURS`.
    """
    pictures = smooth(clip_F3HW.float() / 255)
    blobs = find_blobs(pictures, balance(pictures, len(pictures)))
    for name in colours:
        area = torch.where(blobs.valid & (blobs.colour == list(COLOURS).index(name)), blobs.area, 0.0)
        most, slot = area.max(1)
        frames = (most >= max(_NEARLY * float(most.max()), 1.0)).nonzero()[:, 0]
        chosen = frames[torch.linspace(0, max(len(frames) - 1, 0), min(SHOWN, len(frames))).round().long()]
        reach = _REACH * float(most.max()) ** 0.5 + 2
        found = []
        for frame in chosen.tolist():
            x, y = (float(v[frame, slot[frame]]) for v in (blobs.x, blobs.y))
            image = Image.fromarray(clip_F3HW[frame].permute(1, 2, 0).numpy())
            box = (x + 0.5 - reach, y + 0.5 - reach, x + 0.5 + reach, y + 0.5 + reach)
            found.append(image.transform((_SIDE, _SIDE), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC))
        yield name, found


def sheet(cubes: Sequence[tuple[str, list[Image.Image]]], path: Path) -> None:
    """Write a PNG of cubes: each cube is a row of its pictures after its caption."""
    wide, tall = _TEXT + SHOWN * (_SIDE + _GAP), _SIDE + _GAP
    picture = Image.new("RGB", (_COLUMNS * wide, _ROWS * tall), "white")
    draw = ImageDraw.Draw(picture)
    for place, (caption, images) in enumerate(cubes):
        column, row = divmod(place, _ROWS)
        draw.text((column * wide + 2, row * tall + _SIDE // 3), caption, fill="black")
        for k, image in enumerate(images):
            picture.paste(image, (column * wide + _TEXT + k * (_SIDE + _GAP), row * tall))
    picture.save(path)


def main() -> None:
    """Draw the cubes of all clips in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the clips, in which the sheets are written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, listed = [], []
    for row, clip in kept(args.folder):
        for colour, images in crops(clip, row.cubes):
            found.append((f"{len(found)} {colour}", images))
            listed.append({"clip": row.name, "prompt": row.prompt, "seed": row.seed, "body": colour})
    (args.folder / "cubes.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    for number, low in enumerate(range(0, len(found), _ROWS * _COLUMNS)):
        sheet(found[low : low + _ROWS * _COLUMNS], args.folder / f"sheet-{number:02d}.png")


if __name__ == "__main__":
    main()
