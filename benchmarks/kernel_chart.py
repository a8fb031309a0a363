"""A chart of `results/kernels.json`: the times of every operation at one shape on a logarithmic scale.

`python -m benchmarks.kernel_chart` draws Wan 14B at 720p to `docs/images/kernels.png`. It needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.gates import RESULTS
from postgen.files import replacing

SHAPE = "Wan 14B 720p 81f"
PER_SAMPLE = ", modulation per sample"
TARGET = RESULTS.parent.parent / "docs" / "images" / "kernels.png"
NAMES = {
    "temporal_cfi": "temporal_self_share",
    "norm_rope": "qk_norm_rope",
    "adaln norm + modulate": "norm_modulate",
    "adaln gate + residual + norm + modulate": "gate_residual_norm_modulate",
    "linear_attention": "linear_attention",
    "linear_attention + rope": "linear_attention, RoPE",
    "linear_attention + convolution": "linear_attention, convolution",
    "linear_attention backward": "linear_attention, backward",
    "attention": "attention (exact)",
}
"""The operation of a row -> its name on the page."""
LABELS = {"sana": "diffusers' SANA", "liger": "liger", "eager": "eager", "compiled": "torch.compile", "ours": "ours"}
COLOURS = {"floor": (190, 190, 190), "ours": (30, 110, 60), "compiled": (110, 150, 210), "eager": (200, 110, 90)}
OTHER = (170, 140, 60)
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 1100, 250, 210, 16, 12, 58


def bars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the pairs (name, milliseconds) of a row: the floor, ours, then the others from fast to slow."""
    times = {
        name.removesuffix("_ms"): ms for name, ms in row.items() if name.endswith("_ms") and name != "backends_ms"
    }
    times |= row.get("backends_ms", {})
    if "default" in times:
        # Rename the times of the router and of torch; the backend that the router chose would be a second bar.
        times.pop(row["chosen"])
        times["torch's default"] = times.pop("default")
        times[f"ours: {row['chosen']}"] = times.pop("ours")
    # Ours comes before the others even if another kernel is faster.
    return sorted(times.items(), key=lambda item: (item[0] != "floor", not item[0].startswith("ours"), item[1]))


def draw(rows: Sequence[dict[str, Any]], shape: str, target: Path) -> None:
    """Draw the rows of one shape as a PNG.

    Raises:
        ValueError: there is no row of that shape; the message lists the known shapes.
    """
    by_op = {row["op"]: bars(row) for row in rows if row["shape"].removesuffix(PER_SAMPLE) == shape}
    groups = [(name, by_op[op]) for op, name in NAMES.items() if op in by_op]
    if not groups:
        known = sorted({row["shape"].removesuffix(PER_SAMPLE) for row in rows if row["op"] in NAMES})
        raise ValueError(f"no rows of shape {shape!r}: choose from {', '.join(known)}")
    every = [ms for _, group in groups for _, ms in group]
    low = 10 ** math.floor(math.log10(min(every)))
    high = max(*every, 10 * low)
    height = TOP + sum(BAR * len(group) + GAP for _, group in groups)
    image = Image.new("RGB", (WIDTH, height), "white")
    canvas = ImageDraw.Draw(image)
    canvas.fontmode = "L"
    font, title = ImageFont.load_default(13), ImageFont.load_default(16)
    canvas.text((8, 12), f"{shape}: milliseconds, on a logarithmic scale", "black", title)

    def across(ms: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log10(ms / low) / math.log10(high / low)

    for decade in range(math.ceil(math.log10(high / low))):
        x = across(low * 10**decade)
        canvas.line([(x, TOP - 6), (x, height - GAP)], fill=(225, 225, 225))
        canvas.text((x + 3, TOP - 18), f"{low * 10**decade:g}", (150, 150, 150), font)
    y = TOP
    for name, group in groups:
        canvas.text((8, y + 1), name, "black", font)
        for whose, ms in group:
            canvas.rectangle([LEFT, y + 2, across(ms), y + BAR - 2], fill=COLOURS.get(whose.split(":")[0], OTHER))
            canvas.text((across(ms) + 6, y), f"{ms:.3g}  {LABELS.get(whose, whose)}", "black", font)
            y += BAR
        y += GAP
    with replacing(target) as part:
        image.save(part, format="PNG")


def main(argv: list[str] | None = None) -> int:
    """Draw the chart of the docs page or of another shape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_chart", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default=SHAPE, help="the `shape` of the rows to draw")
    parser.add_argument("-o", "--output", type=Path, default=TARGET, help="path of the PNG file")
    options = parser.parse_args(argv)
    try:
        draw(json.loads((RESULTS / "kernels.json").read_text(encoding="utf-8"))["rows"], options.shape, options.output)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
