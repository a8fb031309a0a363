"""Pictures of the report as SVG text: the funnel, and a histogram of each measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from .config import Band, CurationConfig
from .funnel import Step, worded

_FONT = 'font-family="sans-serif" font-size="13"'
_KEPT, _GONE, _INK, _LIMIT = "#3b6ea5", "#d98c4a", "#222", "#b3261e"
_ROW, _LEFT, _WIDE, _RIGHT = 26, 160, 420, 260
_CELL, _HIGH, _BINS, _COLUMNS = 230, 90, 40, 3


def funnel_chart(steps: Sequence[Step]) -> str:
    """Return the funnel as SVG: one bar per step, what is left in blue and what was removed in orange."""
    most = max([1, *(max(step.before, step.after) for step in steps)])
    parts = []
    for number, step in enumerate(steps):
        y = 10 + number * _ROW
        kept, before = step.after / most * _WIDE, step.before / most * _WIDE
        told = f"{step.after:,} left" + (f", {step.removed:,} removed" if step.removed > 0 else "")
        parts += [
            _text(_LEFT - 8, y + 15, step.name, "end"),
            _box(_LEFT, y, kept, 20, _KEPT),
            _box(_LEFT + kept, y, max(0.0, before - kept), 20, _GONE),
            _text(_LEFT + max(kept, before) + 8, y + 15, told),
        ]
    return _page(_LEFT + _WIDE + _RIGHT, 20 + len(steps) * _ROW, parts)


def histogram_chart(values: Mapping[str, Sequence[float]], config: CurationConfig) -> str:
    """Return a histogram of each measurement as SVG; orange bins lie outside the band, red lines are its ends.

    The axis is logarithmic if all values are above 0 and the largest is more than 50 times the smallest.
    """
    parts = []
    for number, (name, found) in enumerate(values.items()):
        row, column = divmod(number, _COLUMNS)
        x, y = 15 + column * (_CELL + 20), 10 + row * (_HIGH + 62)
        parts += _histogram(x, y, name, found, getattr(config, name))
    rows = -(-len(values) // _COLUMNS)
    return _page(30 + _COLUMNS * (_CELL + 20), 20 + rows * (_HIGH + 62), parts)


def _histogram(x: float, y: float, name: str, values: Sequence[float], band: Band) -> list[str]:
    least, most = min(values), max(values)
    logarithmic = least > 0 and most > 50 * least
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    low, high = scale(least), scale(most)
    width = (high - low) / _BINS or 1.0
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((scale(value) - low) / width))] += 1
    step, floor = _CELL / _BINS, y + 20 + _HIGH
    parts = [_text(x, y + 13, f"{name}{'' if band == (None, None) else ', allowed ' + worded(band)}")]
    for number, count in enumerate(counts):
        middle = low + (number + 0.5) * width
        middle = 10**middle if logarithmic else middle
        outside = (band[0] is not None and middle < band[0]) or (band[1] is not None and middle > band[1])
        tall = count / max(counts) * _HIGH
        parts.append(_box(x + number * step, floor - tall, step * 0.9, tall, _GONE if outside else _KEPT))
    for end in band:
        if end is not None and least <= end <= most:
            place = x + (scale(end) - low) / (width * _BINS) * _CELL
            parts.append(f'<path d="M{place:.1f} {y + 20}V{floor}" stroke="{_LIMIT}" stroke-width="1.5"/>')
    parts += [_text(x, floor + 15, f"{least:.3g}"), _text(x + _CELL, floor + 15, f"{most:.3g}", "end")]
    return parts


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_INK}" {_FONT}>{escape(text)}</text>'


def _page(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', ground, *parts, "</svg>"]) + "\n"
