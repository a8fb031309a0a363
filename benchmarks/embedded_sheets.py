"""Files of generated clips that people look at: one small lossless file per group, and sheets with the prompts.

    python -m benchmarks.embedded_sheets CLIPS.safetensors [--sheet sheet.png] [--gif clip.gif --clip 3]

A file of kept clips holds the bytes of a lossless WebP animation for each clip. `read_clips` returns them as tensors.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from postgen.files import replacing
from postgen.video import write_video
from postgen.world.check import Report
from postgen.world.spec import FPS

#: Largest size of a file of clips in bytes. If a group needs more, its last clips are left out.
LIMIT = 14_000_000
#: Number of evenly spaced frames that a sheet shows of each clip, and number of clips side by side.
SHOWN, COLUMNS = 5, 2
_GAP, _TEXT, _LINE = 4, 11, 15
_MILLISECONDS = 1000 // FPS


def bytes_of(clips: Tensor) -> Tensor:
    """Convert clips (B,F,3,H,W) in [0,1] to uint8 on the CPU."""
    return (clips.clamp(0, 1) * 255).round().byte().cpu()


def verdict(report: Report) -> str:
    """Return the verdict of the judge in a few words: "right", or "wrong" and the wrong attributes."""
    if report.all_right:
        return "right"
    names = ("count", "colour", "shape", "direction", "event", "camera", "steady")
    wrong = [name for name in names if getattr(report, name) is False]
    return f"wrong: {', '.join(wrong) or 'score'}"


def write_clips(path: Path, clips: Sequence[Tensor], captions: Sequence[str]) -> int:
    """Write clips, uint8 (F,3,H,W), with their captions to `path`; return how many of them fit into `LIMIT`."""
    held, used = {}, 0
    for number, clip in enumerate(clips):
        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip]
        target = io.BytesIO()
        # A duration per frame lets `read_clips` restore equal frames, which the animation stores only once.
        pictures[0].save(
            target, "WEBP", save_all=True, append_images=pictures[1:], lossless=True, method=1, duration=_MILLISECONDS
        )
        data = target.getvalue()
        used += len(data)
        if used > LIMIT:
            break
        held[f"{number:03d}"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with replacing(path) as part:
        save_file(held, part, metadata={"captions": json.dumps(list(captions[: len(held)]))})
    return len(held)


def read_clips(path: Path) -> tuple[list[Tensor], list[str]]:
    """Return the clips, uint8 (F,3,H,W), and the captions of a file that `write_clips` wrote."""
    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
        data = [file.get_tensor(name).numpy().tobytes() for name in names]
        captions: list[str] = json.loads(file.metadata()["captions"])
    clips = []
    for item in data:
        frames = []
        for frame in ImageSequence.Iterator(Image.open(io.BytesIO(item))):
            # PIL sets the duration when it loads the frame. Equal frames are stored once with a longer duration.
            picture = torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1)
            frames += [picture] * max(1, round(frame.info.get("duration", _MILLISECONDS) / _MILLISECONDS))
        clips.append(torch.stack(frames))
    return clips, captions


def sheet(
    clips: Sequence[Tensor], captions: Sequence[str], path: Path, *, columns: int = COLUMNS, shown: int = SHOWN
) -> Path:
    """Write a PNG of clips, uint8 (F,3,H,W): each clip is a row of `shown` frames under its caption."""
    height, width = clips[0].shape[-2:]
    wide, tall = shown * (width + _GAP) + 2 * _GAP, height + _LINE + 2 * _GAP
    rows = -(-len(clips) // columns)
    picture = Image.new("RGB", (columns * wide, rows * tall), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(_TEXT)
    for place, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        row, column = divmod(place, columns)
        left, top = column * wide + _GAP, row * tall + _GAP
        draw.text((left, top), _cut(caption, font, wide - 2 * _GAP), fill="black", font=font)
        for number, index in enumerate(torch.linspace(0, len(clip) - 1, shown).round().long().tolist()):
            frame = Image.fromarray(clip[index].permute(1, 2, 0).numpy())
            picture.paste(frame, (left + number * (width + _GAP), top + _LINE))
    with replacing(path) as part:
        picture.save(part, "PNG")
    return path


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    while font.getlength(text) > width:
        text = text[:-4] + "..."
    return text


def main() -> None:
    """Print the captions of kept clips. Write all clips as a sheet with --sheet, and one as a video with --gif."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="file of kept clips")
    parser.add_argument("--sheet", type=Path, help="PNG to write with all clips")
    parser.add_argument("--gif", type=Path, help="video file to write with one clip; the suffix sets the format")
    parser.add_argument("--clip", type=int, default=0, help="number of the clip for --gif (default: 0, the first)")
    args = parser.parse_args()
    clips, captions = read_clips(args.clips)
    print(*(f"{number:3d}  {caption}" for number, caption in enumerate(captions)), sep="\n")
    if args.sheet:
        sheet(clips, captions, args.sheet)
    if args.gif:
        write_video(args.gif, clips[args.clip], fps=FPS)


if __name__ == "__main__":
    main()
