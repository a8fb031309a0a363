"""Generated clips for a person: kept without loss in one small file a group, and drawn in sheets with their prompts.

    python -m benchmarks.embedded_sheets CLIPS.safetensors [--sheet sheet.png] [--gif clip.gif --clip 3]

A file of kept clips holds, of each clip, the bytes of a lossless WebP animation; `read_clips` gives them as tensors.
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

#: Most bytes of a file of clips; of a group that needs more, the last clips are left out.
LIMIT = 14_000_000
#: Frames of a clip that a sheet shows, evenly spread, and clips side by side.
SHOWN, COLUMNS = 5, 2
_GAP, _TEXT, _LINE = 4, 11, 15
_MILLISECONDS = 1000 // FPS


def bytes_of(clips: Tensor) -> Tensor:
    """Clips (B,F,3,H,W) in [0,1] as uint8 on the CPU."""
    return (clips.clamp(0, 1) * 255).round().byte().cpu()


def verdict(report: Report) -> str:
    """What the judge says, in a few words."""
    if report.all_right:
        return "right"
    names = ("count", "colour", "shape", "direction", "event", "camera", "steady")
    wrong = [name for name in names if getattr(report, name) is False]
    return f"wrong: {', '.join(wrong) or 'score'}"


def write_clips(path: Path, clips: Sequence[Tensor], captions: Sequence[str]) -> int:
    """Keep clips (F,3,H,W) uint8 with their captions; how many fitted into `LIMIT`."""
    held, used = {}, 0
    for number, clip in enumerate(clips):
        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip]
        target = io.BytesIO()
        # Equal frames must stay frames of their own.
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
    """Clips (F,3,H,W) uint8 that `write_clips` kept, and their captions."""
    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
        data = [file.get_tensor(name).numpy().tobytes() for name in names]
        captions: list[str] = json.loads(file.metadata()["captions"])
    clips = []
    for item in data:
        frames = []
        for frame in ImageSequence.Iterator(Image.open(io.BytesIO(item))):
            # Loading it tells how long it is shown: a frame that repeats is held once.
            picture = torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1)
            frames += [picture] * max(1, round(frame.info.get("duration", _MILLISECONDS) / _MILLISECONDS))
        clips.append(torch.stack(frames))
    return clips, captions


def sheet(
    clips: Sequence[Tensor], captions: Sequence[str], path: Path, *, columns: int = COLUMNS, shown: int = SHOWN
) -> Path:
    """Draw clips (F,3,H,W) uint8, each as a row of `shown` frames under its caption, as a PNG."""
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
    """Turn kept clips into a sheet or one of them into a GIF."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="file of kept clips")
    parser.add_argument("--sheet", type=Path, help="PNG of all clips")
    parser.add_argument("--gif", type=Path, help="one clip as a video, by the suffix of the name")
    parser.add_argument("--clip", type=int, default=0, help="which clip (default: the first)")
    args = parser.parse_args()
    clips, captions = read_clips(args.clips)
    print(*(f"{number:3d}  {caption}" for number, caption in enumerate(captions)), sep="\n")
    if args.sheet:
        sheet(clips, captions, args.sheet)
    if args.gif:
        write_video(args.gif, clips[args.clip], fps=FPS)


if __name__ == "__main__":
    main()
