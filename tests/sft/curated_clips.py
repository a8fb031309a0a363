"""A folder of clips with captions, one for each thing that the curation has to find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from postgen.video import write_video
from postgen.world.plan import sample
from postgen.world.render import render

MOVING = (3, 6, 12, 15, 20, 22)
"""Seeds of scenes with motion."""


def scene(seed: int, size: int = 96) -> Tensor:
    """Return a clip of the synthetic world (17, 3, size, size)."""
    return render([sample(seed)], size=size, supersample=1, geometry=False).rgb_BF3HW[0]


def written(clip: Tensor, text: str, size: int = 12, place: tuple[int, int] = (2, 2)) -> Tensor:
    """Return a clip with a text on every frame."""
    frames = []
    for frame in clip:
        picture = Image.fromarray((frame.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
        ImageDraw.Draw(picture).text(
            place, text, fill="white", font=ImageFont.load_default(size), stroke_width=1, stroke_fill="black"
        )
        frames.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)
    return torch.stack(frames)


def barred(clip: Tensor, rows: int) -> Tensor:
    """Return a clip with black rows above and below."""
    out = clip.clone()
    out[:, :, :rows] = out[:, :, -rows:] = 0
    return out


def blurred(clip: Tensor) -> Tensor:
    """Return a clip that was made small and large again."""
    return interpolate(avg_pool2d(clip, 8), clip.shape[-2:], mode="bicubic").clamp(0, 1)


def put(folder: Path, name: str, clip: Tensor, caption: str | None, fps: float = 8) -> None:
    """Write a clip, or a picture if the name ends in .png, with its caption."""
    path = folder / name
    if path.suffix == ".png":
        Image.fromarray((clip[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(path)
    else:
        write_video(path, clip, fps=fps, quality=10)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def make_folder(folder: Path, scenes: Sequence[Tensor]) -> Path:
    """Write the folder; the name of each file says what is wrong with it."""
    folder.mkdir()
    a, b, c, d, e, f = scenes
    put(folder, "good.mp4", a, "a first ball rolls to the left")
    put(folder, "barred.mp4", barred(b, 16), "a cube between bars slides")
    put(folder, "two_shots.mp4", torch.cat((c, d)), "a cylinder, and then another one")
    put(folder, "dark.mp4", e * 0.03, "a night without light")
    put(folder, "flat.mp4", (e - 0.5) * 0.05 + 0.5, "a grey fog hides everything")
    put(folder, "soft.mp4", blurred(e), "an unsharp scene")
    put(folder, "still.mp4", e[:1].repeat(17, 1, 1, 1), "nothing moves here at all")
    put(folder, "titled.mp4", written(a.flip(-1), "SALE NOW\nwww.buy.me", 14), "an advertisement with letters")
    put(folder, "short.mp4", f[:4], "it ends at once")
    put(folder, "slow.mp4", f[::2], "few pictures per second", fps=3)
    put(folder, "twin.mp4", (a * 0.9 + 0.03).clamp(0, 1), "the same ball again, darker")
    put(folder, "asked.mp4", f, "A red ball rolls to the RIGHT.")
    put(folder, "picture.png", e, "one picture of a scene")
    put(folder, "silent.mp4", f, None)
    data = (folder / "good.mp4").read_bytes()
    (folder / "broken.mp4").write_bytes(data[: len(data) // 2])
    (folder / "broken.txt").write_text("half of a file")
    return folder
