"""Draw the animated picture of the README: clips of the embedded model side by side, each under its prompt.

    python -m benchmarks.embedded_picture [--seed 0] [--model FOLDER] [-o docs/images/embedded.webp]

The size, steps and guidance scale are those of the model's postgen.json. Clip i uses the seed --seed + i.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from postgen.assets import embedded_model
from postgen.files import replacing

PROMPTS = (
    "an orange ball hits a blue cylinder",
    "a golden sphere bounces and a navy box falls",
    "a purple ball passes behind a yellow cube",
    "a green cylinder stays still, the camera orbits left",
    "a crimson cube moves closer",
    "a pink ball bounces and a cyan cube stays still",
)
COLUMNS, SCALE = 3, 2
_GAP, _LINE, _TEXT = 6, 16, 11
_QUALITY = 80


def clips(pipe: Any, facts: dict[str, Any], seed: int) -> Tensor:
    """Generate one clip per prompt of `PROMPTS`; return them as uint8 (N,F,3,H,W)."""
    made = []
    for number, prompt in enumerate(PROMPTS):
        output = pipe(
            prompt,
            height=facts["height"],
            width=facts["width"],
            num_frames=facts["num_frames"],
            num_inference_steps=facts["num_inference_steps"],
            guidance_scale=facts["guidance_scale"],
            generator=torch.Generator("cpu").manual_seed(seed + number),
            output_type="pt",
        )
        made.append((output.frames[0].float().clamp(0, 1) * 255).round().byte())
    return torch.stack(made)


def drawn(frames: Tensor) -> Image.Image:
    """Draw one frame of every clip, uint8 (N,3,H,W), in a grid, each under its prompt."""
    height, width = (SCALE * side for side in frames.shape[-2:])
    rows = -(-len(frames) // COLUMNS)
    size = (COLUMNS * (width + _GAP) + _GAP, rows * (height + _LINE + _GAP) + _GAP)
    picture, font = Image.new("RGB", size, "white"), ImageFont.load_default(_TEXT)
    pen = ImageDraw.Draw(picture)
    for place, frame in enumerate(frames):
        row, column = divmod(place, COLUMNS)
        left, top = _GAP + column * (width + _GAP), _GAP + row * (height + _LINE + _GAP)
        pen.text((left, top), PROMPTS[place], fill="black", font=font)
        shown = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.LANCZOS)
        picture.paste(shown, (left, top + _LINE))
    return picture


def main() -> None:
    """Generate the clips and write the picture."""
    from diffusers import WanPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip (default: 0)")
    parser.add_argument(
        "--model", type=Path, default=embedded_model(), help="folder of the model (default: the embedded model)"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/embedded.webp"), help="file to write")
    args = parser.parse_args()
    facts = json.loads((args.model / "postgen.json").read_text())
    pictures = [drawn(moment) for moment in clips(WanPipeline.from_pretrained(args.model), facts, args.seed).unbind(1)]
    with replacing(args.output) as part:
        pictures[0].save(
            part,
            "WEBP",
            save_all=True,
            append_images=pictures[1:],
            duration=1000 // facts["fps"],
            loop=0,
            quality=_QUALITY,
            method=6,
        )


if __name__ == "__main__":
    main()
