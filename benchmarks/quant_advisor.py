"""The advisor of number formats on the embedded model: the picture of docs/quantization_formats.md.

    python -m benchmarks.quant_advisor          # minutes on a CPU; then python -m benchmarks.quant_tables
    python -m benchmarks.quant_advisor --draw   # the picture again, from the result

Crest factors of the weights, and of the inputs of the layers on the model's own trajectories, in small clips. Left:
the signal-to-noise ratio that the formulas give for a crest factor, pale where no group can have it. Right: those of
the model.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.gates import RESULTS, write_result
from benchmarks.quant_advice import PAIRS, advice_of
from postgen.files import replacing
from postgen.quant.advisor import crossover, expected_qsnr
from postgen.quant.formats import format_of

PICTURE = RESULTS.parent.parent / "docs" / "images" / "quantization_advisor.png"
RESULT = RESULTS / "quant_advisor.json"
PROMPTS = ("a red ball rolls left", "a blue cube slides right, a green ball bounces", "a yellow cone spins")
"""The last one is held out."""
CLIP = {"points": 16, "bins": 8, "num_frames": 9, "height": 96, "width": 96, "num_inference_steps": 20}
SIZE, LEFT, RIGHT = (1200, 440), (60, 60, 620, 390), (800, 60, 1180, 390)
LOW, HIGH = 10, 50
"""Decibels of the left side."""
FIRST, LAST = 1.5, 12.0
"""Crest factors."""
COLOURS = ((90, 90, 90), (30, 110, 60), (70, 110, 200), (200, 80, 60))
"""Of the pairs."""
_GREY, _PALE = (110, 110, 110), (230, 230, 230)


def measured() -> dict[str, Any]:
    """Return the crest factors and crossovers of the embedded model."""
    from diffusers import WanPipeline

    from postgen.assets import embedded_model
    from postgen.quant.calibration import Calibration, CalibrationConfig

    pipe = WanPipeline.from_pretrained(embedded_model())
    pairs = advice_of(pipe.transformer, Calibration(pipe, PROMPTS, CalibrationConfig(**CLIP)))["pairs"]
    return {"prompts": PROMPTS, "clip": CLIP, "pairs": pairs}


def draw(pairs: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Draw the picture as a PNG.

    Args:
        pairs: `pairs` of the result.
        target: path of the PNG.
    """
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture)
    _formulas(pen)
    _model(pen, pairs)
    with replacing(target) as part:
        picture.quantize(32).save(part, "PNG", optimize=True)


def across(crest: float, box: tuple[int, int, int, int]) -> float:
    """Return the place of a crest factor in a box; the axis is logarithmic."""
    return box[0] + (box[2] - box[0]) * math.log(crest / FIRST) / math.log(LAST / FIRST)


def paler(colour: tuple[int, int, int]) -> tuple[int, ...]:
    """Return a colour between the given one and white."""
    return tuple((3 * 255 + each) // 4 for each in colour)


def _axes(pen: Any, box: tuple[int, int, int, int], title: str) -> None:
    pen.rectangle(box, outline=(200, 200, 200))
    pen.text((box[0], 8), title, "black", ImageFont.load_default(15))
    for crest in (1.5, 2, 3, 4, 6, 8, 12):
        place = across(crest, box)
        pen.line([(place, box[1]), (place, box[3])], fill=_PALE)
        pen.text((place - 7, box[3] + 4), f"{crest:g}", _GREY, ImageFont.load_default(12))
    pen.text((box[0], box[3] + 22), "crest factor of a group", _GREY, ImageFont.load_default(12))


def _formulas(pen: Any) -> None:
    """Draw the signal-to-noise ratios of the pairs over the crest factor, and where they cross."""
    left, top, _, bottom = LEFT
    small = ImageFont.load_default(12)
    _axes(pen, LEFT, "Expected QSNR in dB: integers (lines), floating point (dots)")

    def down(decibels: float) -> float:
        return bottom - (bottom - top) * (decibels - LOW) / (HIGH - LOW)

    for decibels in range(LOW, HIGH + 1, 10):
        pen.text((left - 24, down(decibels) - 7), str(decibels), _GREY, small)
    steps = [FIRST * (LAST / FIRST) ** (step / 120) for step in range(121)]
    for number, (pair, colour) in enumerate(zip(PAIRS, COLOURS, strict=True)):
        integers, floating = map(format_of, pair)
        pen.text((left + number * 140, 34), f"{pair[0]}, {pair[1]}", colour, small)
        most = math.sqrt(integers.group(32))  # one number that is not 0: no group has a larger crest factor
        for k, after in pairwise(steps):
            ends = [(across(each, LEFT), down(expected_qsnr(integers, each))) for each in (k, after)]
            if ends[1][1] <= bottom:
                pen.line(ends, fill=colour if k <= most else paler(colour), width=2)
        for k in [each for each in steps[::3] if each <= most]:
            x, y = across(k, LEFT), down(expected_qsnr(floating, k))
            pen.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=colour)
        at = crossover(integers, floating)
        x, y = across(at, LEFT), down(expected_qsnr(integers, at))
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), outline="black", width=2)
        pen.text((x + 8, y - 16), f"{at:.2f}", "black", small)


def _model(pen: Any, pairs: Sequence[Mapping[str, Any]]) -> None:
    """Draw the quartiles of the model's crest factors, one line for each tensor, rotation and pair."""
    _, top, _, bottom = RIGHT
    small = ImageFont.load_default(12)
    _axes(pen, RIGHT, "Embedded model: quartiles of its crest factors")
    pen.text((RIGHT[0], 34), "a ring: where the formulas cross", _GREY, small)
    high = (bottom - top) / len(pairs)
    for number, each in enumerate(pairs):
        y = top + high * (number + 0.5)
        colour = COLOURS[[list(pair) for pair in PAIRS].index([*each["pair"]])]
        low, middle, most = (across(min(value, LAST), RIGHT) for value in each["crest_quartiles"])
        pen.line([(low, y), (most, y)], fill=colour, width=5)
        pen.line([(middle, y - 6), (middle, y + 6)], fill="black", width=2)
        at = across(min(each["predicted"], LAST), RIGHT)
        pen.ellipse((at - 4, y - 4, at + 4, y + 4), outline="black", width=2)
        turned = ", rotated" if each["rotate"] else ""
        pen.text((RIGHT[0] - 150, y - 8), f"{each['pair'][0]} {each['of']}{turned}", "black", small)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the result and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant_advisor")
    parser.add_argument("--draw", action="store_true", help="use the present result")
    if not parser.parse_args(argv).draw:
        print(write_result("quant_advisor", {**measured(), "gates": []}))
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    draw(found["pairs"], PICTURE)
    print(PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
