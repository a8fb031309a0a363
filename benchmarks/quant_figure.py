"""The figure of docs/quantization_results.md: PSNR over bits for each recipe, and the advice for each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.quant_advice import FOUR_BITS
from benchmarks.quant_arms import CONTROLS, PLANES, RECIPES, WEIGHTS
from postgen.files import replacing

SIZE, PANEL = (1200, 460), (560, 340)
COLOURS = (
    *((30, 110, 60), (200, 80, 60), (70, 110, 200), (170, 130, 30), (130, 80, 170), (90, 90, 90), (20, 150, 160)),
    *((220, 120, 180), (120, 170, 60), (150, 90, 50)),
)
_GREY = (110, 110, 110)
_TOP = 80


def draw(result: Mapping[str, Any], target: Path) -> bool:
    """Draw the figure as a PNG.

    Args:
        result: content of `results/quant.json`.
        target: path of the PNG.

    Returns:
        Whether there was anything to draw.
    """
    lines = curves(result["arms"])
    advice = result.get("advice")
    if not lines and advice is None:
        return False
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture)
    if lines:
        _curves(pen, (60, _TOP, 60 + PANEL[0] - 60, _TOP + PANEL[1]), lines)
    if advice is not None:
        _advice(pen, (PANEL[0] + 170, _TOP, SIZE[0] - 20, _TOP + PANEL[1]), advice["layers"])
    with replacing(target) as part:
        picture.quantize(64).save(part, "PNG", optimize=True)
    return True


def curves(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return for each recipe the points (bits, PSNR) of its arms with exact inputs and one kind of groups."""
    found = {}
    series = {recipe: (recipe, PLANES if recipe == "bpdq" else WEIGHTS) for recipe in RECIPES}
    series["gptq, groups of 16"] = ("gptq", tuple(CONTROLS.values()))
    for name, (recipe, formats) in series.items():
        mine = [each for each in arms.values() if each["recipe"] == recipe and each["format"] in formats]
        points = sorted((each["bits"], each["psnr"]["value"]) for each in mine)
        if points:
            found[name] = points
    return found


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _axes(
    pen: Any, box: tuple[int, int, int, int], x: tuple[float, float], ticks: Sequence[float], title: str, under: str
) -> None:
    left, top, right, bottom = box
    pen.rectangle(box, outline=(200, 200, 200))
    pen.text((left, 8), title, "black", _font(15))
    for tick in ticks:
        place = left + (right - left) * (tick - x[0]) / (x[1] - x[0])
        pen.line([(place, top), (place, bottom)], fill=(235, 235, 235))
        pen.text((place - 8, bottom + 4), f"{tick:g}", _GREY, _font(12))
    pen.text((left, bottom + 20), under, _GREY, _font(12))


def _curves(pen: Any, box: tuple[int, int, int, int], lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    left, top, right, bottom = box
    every = [point for line in lines.values() for point in line]
    x = math.floor(min(each[0] for each in every)), math.floor(max(each[0] for each in every)) + 1
    low, high = min(each[1] for each in every) - 1, max(each[1] for each in every) + 1
    ticks = range(x[0], x[1] + 1)
    _axes(pen, box, x, ticks, "PSNR to the exact clips, dB, inputs exact", "stored bits per weight, with scales")

    def at(point: tuple[float, float]) -> tuple[float, float]:
        share = (point[1] - low) / (high - low)
        return left + (right - left) * (point[0] - x[0]) / (x[1] - x[0]), bottom - (bottom - top) * share

    for value in range(math.ceil(low / 5) * 5, math.floor(high) + 1, 5):
        pen.text((left - 26, at((x[0], value))[1] - 7), str(value), _GREY, _font(12))
    for number, (recipe, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        pen.text((left + number % 5 * 105, 30 + number // 5 * 18), recipe, colour, _font(13))
        places = [at(point) for point in line]
        if len(places) > 1:
            pen.line(places, fill=colour, width=2)
        for across, down in places:
            pen.ellipse((across - 3, down - 3, across + 3, down + 3), fill=colour)


def _advice(pen: Any, box: tuple[int, int, int, int], layers: Sequence[Mapping[str, Any]]) -> None:
    left, top, right, bottom = box
    kinds = list(dict.fromkeys(kind_of(each["layer"]) for each in layers))
    every = [each["crest"]["inputs"] for each in layers]
    x = math.floor(2 * min(every)) / 2, math.floor(2 * max(every) + 1) / 2
    ticks = [x[0] + 0.5 * step for step in range(int(2 * (x[1] - x[0])) + 1)]
    _axes(pen, box, x, ticks, "Inputs of the layers, and the format the advisor chooses", "median crest factor of 32")
    for number, name in enumerate(FOUR_BITS):
        pen.text((left + number * 90, 32), name, COLOURS[number], _font(13))
    pen.text((left, 50), "a ring: rotated", _GREY, _font(13))
    high = (bottom - top) / len(kinds)
    for each in layers:
        down = top + high * (kinds.index(kind_of(each["layer"])) + 0.5)
        across = left + (right - left) * (each["crest"]["inputs"] - x[0]) / (x[1] - x[0])
        name, rotate, _ = each["choice"]
        spot = (across - 4, down - 4, across + 4, down + 4)
        colour = COLOURS[FOUR_BITS.index(name)]
        pen.ellipse(spot, outline=colour, fill=None if rotate else colour, width=2)
    for number, kind in enumerate(kinds):
        pen.text((left - 104, top + high * (number + 0.5) - 8), kind, "black", _font(12))


def kind_of(layer: str) -> str:
    """Return the name of a layer inside its block.

    >>> kind_of("blocks.3.attn1.to_q")
    'attn1.to_q'
    """
    return re.sub(r"^.*?\.\d+\.", "", layer)
