"""Curves of runs as a picture, drawn with what is installed anyway."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from postgen.files import replacing

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _MARGIN, _LEGEND = 640, 230, 40, 180
_COLOURS = ((30, 90, 200), (210, 80, 30), (30, 140, 70), (140, 60, 170))


def draw_curves(metrics: Path, target: Path) -> list[str]:
    """Draw rewards over steps from `metrics.jsonl`, a plot each; return the names of those drawn."""
    rows = read_metrics(metrics)
    wanted = [
        name
        for name in dict.fromkeys(key for row in rows for key in row)
        if name in ("reward", "eval_reward", "ratio/mean", "diversity/latent_pairwise")
        or (name.startswith(("eval_rewards/", "eval_gold/")) and name.endswith("/mean"))
    ]
    found = {name: {"": [(row["step"], row[name]) for row in rows if row.get(name) is not None]} for name in wanted}
    found = {name: lines for name, lines in found.items() if len(lines[""]) > 1}
    if found:
        draw_plots({name: ("step", lines) for name, lines in found.items()}, target)
    return list(found)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`; none when there is no such file.

    The last line may be half written: the run goes on, or was killed.
    """
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_plots(plots: Mapping[str, tuple[str, Mapping[str, Points]]], target: Path) -> None:
    """Draw plots in two columns as a PNG.

    Args:
        plots: title -> what stands across, and lines by label, each a list of (x, y) with rising x.
        target: the file.
    """
    columns = min(2, len(plots))
    sheet = Image.new("RGB", (columns * _WIDTH, -(-len(plots) // columns) * _HEIGHT), "white")
    for number, (title, (across, lines)) in enumerate(plots.items()):
        _plot(ImageDraw.Draw(sheet), title, across, lines, number % columns * _WIDTH, number // columns * _HEIGHT)
    with replacing(target) as part:
        sheet.save(part, format="PNG")


def _plot(
    draw: ImageDraw.ImageDraw, title: str, across: str, lines: Mapping[str, Points], left: int, top: int
) -> None:
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    width, height = _WIDTH - 2 * _MARGIN - _LEGEND, _HEIGHT - 2 * _MARGIN
    corner = left + _MARGIN, top + _MARGIN
    draw.rectangle([*corner, corner[0] + width, corner[1] + height], outline=(200, 200, 200))
    for number, (label, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = [
            (
                corner[0] + width * (x - x0) / ((x1 - x0) or 1.0),
                corner[1] + height * (1 - (y - y0) / ((y1 - y0) or 1.0)),
            )
            for x, y in points
        ]
        draw.line(line, fill=colour, width=2)
        text = f"{label} {points[0][1]:.4g} -> {points[-1][1]:.4g}".strip()
        draw.text((corner[0] + width + 8, corner[1] + 14 * number), text, fill=colour)
    draw.text((corner[0], top + 8), title, fill="black")
    draw.text((left + 2, corner[1] - 4), f"{y1:.3g}", fill="grey")
    draw.text((left + 2, corner[1] + height - 8), f"{y0:.3g}", fill="grey")
    draw.text((corner[0], corner[1] + height + 4), f"{x0:.4g} .. {x1:.4g} {across}", fill="grey")
