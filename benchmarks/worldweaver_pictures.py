"""Pictures of long rollouts: strips of the first scenes for each arm, contact sheets, films, and plots over time.

OUT/sheets/ARM.png has a row of frames for each of the first scenes, every 20th frame. ARM.depth.png has the depth, and
truth.png the render. OUT/films/ARM.WORLD.webp is an animation of the true clip, the generated clip and its depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from benchmarks.worldweaver_tables import OURS
from postgen import world
from postgen.files import replacing
from postgen.world.spec import FPS
from postgen.worldweaver.depth import DisparityRange

WORLDS, FILMS, EVERY = 4, 2, 20
"""Number of scenes in sheets, number of scenes with a film, and frames between two columns."""
FILM_BYTES, FILM_FRAMES = 1_500_000, 161
"""Largest size of a film in bytes."""
_QUALITIES = (80, 65, 50, 35, 20)
_GAP, _LINE, _LEFT = 4, 16, 110


def keep_pictures(out: Path, name: str, frames: Tensor, disparity: Tensor | None, truth: world.Frames) -> None:
    """Write the strips and films of an arm, and those of the true clips if they are missing.

    Args:
        out: folder of the benchmark.
        name: name of the arm.
        frames: (B, F, 3, H, W) in [0, 1].
        disparity: (B, F, H, W), if the arm has depth.
        truth: the render.
    """
    limits = DisparityRange.of(truth.disparity_BFHW)
    clips = {name: frames, "truth": truth.rgb_BF3HW, "truth.depth": limits.picture(truth.disparity_BFHW)}
    if disparity is not None:
        clips[f"{name}.depth"] = limits.picture(disparity)
    sheets, films = out / "sheets", out / "films"
    for folder in (sheets, films):
        folder.mkdir(parents=True, exist_ok=True)
    for key, clip in clips.items():
        if not key.startswith("truth") or not (sheets / f"{key}.png").is_file():
            strips = [torch.cat(list(row[::EVERY]), -1) for row in clip[:WORLDS]]
            _save(_picture(torch.cat(strips, -2)), sheets / f"{key}.png", "PNG")
    shown = [clips[key] for key in ("truth", name, f"{name}.depth") if key in clips]
    titles = ["the world", "made", "its depth"][: len(shown)]
    # The film of our arm is shown in the README, at twice the size.
    scale = 2 if name.split(".")[0] == OURS else 1
    for number in range(min(FILMS, len(frames))):
        film([clip[number, :FILM_FRAMES] for clip in shown], titles, films / f"{name}.{number}.webp", scale)


def film(clips: Sequence[Tensor], titles: Sequence[str], target: Path, scale: int = 1, most: int = FILM_BYTES) -> int:
    """Write clips (F, 3, H, W) in [0, 1] side by side as an animated WebP, and return its size in bytes.

    The quality is lowered until the file has at most `most` bytes; at the lowest quality it may be larger.
    """
    moments = []
    for parts in zip(*clips, strict=True):
        pictures = [ImageOps.scale(_picture(part), scale, Image.Resampling.LANCZOS) for part in parts]
        width, height = pictures[0].size
        moment = Image.new("RGB", (len(pictures) * (width + _GAP) - _GAP, height + _LINE), "white")
        pen = ImageDraw.Draw(moment)
        for place, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            pen.text((place * (width + _GAP) + 2, 1), title, "black", ImageFont.load_default(11))
            moment.paste(picture, (place * (width + _GAP), _LINE))
        moments.append(moment)
    for quality in _QUALITIES:
        words = {"append_images": moments[1:], "duration": 1000 // FPS, "loop": 0, "quality": quality, "method": 4}
        _save(moments[0], target, "WEBP", save_all=True, **words)
        if target.stat().st_size <= most:
            break
    return target.stat().st_size


def sheet(
    out: Path, names: Sequence[str], target: Path, frames: int, worlds: Sequence[int] = (0, 1), step: int = 1
) -> None:
    """Draw the clips of some scenes over time, with one row per arm below the true clip.

    Args:
        out: folder of the benchmark.
        names: names of arms, and of depth strips (`e.depth`); names without a strip are skipped.
        target: path of the picture, .webp.
        frames: number of frames of the clips.
        worlds: numbers of the scenes; scenes without a row in the strips are skipped.
        step: 2 draws every second picture of the strips, and so on.
    """
    places = {name: out / "sheets" / f"{name}.png" for name in ("truth", *names)}
    strips = {name: Image.open(place).convert("RGB") for name, place in places.items() if place.is_file()}
    if not strips:
        return
    whole_width, whole = next(iter(strips.values())).size
    columns = range(0, len(range(0, frames, EVERY)), step)
    side = whole_width // len(range(0, frames, EVERY))
    width = side * len(columns)
    there = [number for number in worlds if (number + 1) * side <= whole]
    height = _LINE + len(there) * (len(strips) * (side + 2) + 2 * _GAP)
    picture, font = Image.new("RGB", (_LEFT + width, height), "white"), ImageFont.load_default(12)
    pen = ImageDraw.Draw(picture)
    for place, column in enumerate(columns):
        pen.text((_LEFT + place * side + 2, 1), f"{column * EVERY / FPS:g} s", "black", font)
    y = _LINE
    for number in there:
        for name, strip in strips.items():
            pen.text((4, y + side // 2 - 6), name, "black", font)
            for place, column in enumerate(columns):
                cut = strip.crop((column * side, number * side, (column + 1) * side, (number + 1) * side))
                picture.paste(cut, (_LEFT + place * side, y))
            y += side + 2
        y += 2 * _GAP
    _save(picture, target, "WEBP", quality=80)


PLOTS = {
    "psnr": "background, dB",
    "presence": "bodies in place",
    "motion": "motion / true motion",
    "saturation": "saturation - true saturation",
    "depth": "relative error of depth",
    "rgb": "error of RGB latents",
    "latent depth": "error of depth latents",
}
"""Line -> title of its plot."""
COLOURS = ((30, 110, 60), (200, 80, 60), (70, 110, 200), (170, 130, 30), (130, 80, 170), (90, 90, 90))


def plots(lines: Mapping[str, Mapping[str, Sequence[Mapping[str, Any] | None]]], seconds: float, target: Path) -> None:
    """Draw measures over time: one plot for each measure, with a line and an interval for each arm.

    Args:
        lines: for each measure and arm, an interval {value, low, high} or None for each latent frame.
        seconds: time between two latent frames.
        target: path of the PNG.
    """
    size, columns = (460, 210), 2
    shown = [name for name in PLOTS if lines.get(name)]
    picture = Image.new("RGB", (columns * size[0], -(-len(shown) // columns) * size[1] + 22), "white")
    pen, font = ImageDraw.Draw(picture, "RGBA"), ImageFont.load_default(12)
    arms = list(dict.fromkeys(arm for name in shown for arm in lines[name]))
    for number, arm in enumerate(arms):
        pen.text((10 + number * 90, 4), arm, COLOURS[number % len(COLOURS)], ImageFont.load_default(14))
    for place, name in enumerate(shown):
        row, column = divmod(place, columns)
        box = (column * size[0] + 48, row * size[1] + 42, (column + 1) * size[0] - 12, (row + 1) * size[1] + 4)
        _plot(pen, box, {arm: lines[name].get(arm, []) for arm in arms}, seconds, font)
        pen.text((box[0], box[1] - 16), PLOTS[name], "black", font)
    _save(picture, target, "PNG")


def _plot(
    pen: Any, box: tuple[int, int, int, int], arms: Mapping[str, Sequence[Any]], seconds: float, font: Any
) -> None:
    left, top, right, bottom = box
    every = [each[key] for line in arms.values() for each in line if each for key in ("low", "high")]
    low, high = min(every, default=0.0), max(every, default=1.0)
    spread, longest = (high - low) or 1.0, max(2, *(len(line) for line in arms.values()))

    def at(number: int, value: float) -> tuple[float, float]:
        across = left + (right - left) * number / (longest - 1)
        return across, bottom - (bottom - top) * (value - low) / spread

    pen.rectangle(box, outline=(200, 200, 200))
    for value in (low, (low + high) / 2, high):
        pen.text((left - 44, at(0, value)[1] - 7), f"{value:.3g}", (110, 110, 110), font)
    pen.text((right - 34, bottom - 15), f"{(longest - 1) * seconds:.0f} s", (110, 110, 110), font)
    for number, line in enumerate(arms.values()):
        colour, known = COLOURS[number % len(COLOURS)], [(k, each) for k, each in enumerate(line) if each]
        if len(known) < 2:
            continue
        band = [at(k, each["high"]) for k, each in known] + [at(k, each["low"]) for k, each in reversed(known)]
        pen.polygon(band, fill=(*colour, 50))
        pen.line([at(k, each["value"]) for k, each in known], fill=(*colour, 255), width=2)


def _picture(frame: Tensor) -> Image.Image:
    """Convert a frame (3, H, W) in [0, 1]."""
    pixels = (frame.float().clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu()
    return Image.fromarray(pixels.numpy())


def _save(picture: Image.Image, target: Path, kind: str, **words: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part:
        picture.save(part, kind, **words)
