"""Curves of a run's metrics as a picture, drawn with Pillow so that no plotting library is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from postgen.errors import is_number
from postgen.files import replacing

from .logging import metrics_row

Points = Sequence[tuple[float, float]]

PIECES = 512
"""Default number of pieces of a long curve, more than the width of a plot in pixels."""

_SHOWN = ("reward", "eval_reward", "ratio/mean", "diversity/latent_pairwise")
_WIDTH, _HEIGHT, _MARGIN, _LEGEND = 640, 230, 40, 180
_COLOURS = ((30, 90, 200), (210, 80, 30), (30, 140, 70), (140, 60, 170))


class Curve:
    """A curve of any length in bounded memory, for drawing.

    A curve of at most `pieces` points keeps all of them. A longer curve is divided into at most `pieces` pieces with
    equally many points. Only the lowest and the highest point of each piece are kept, and the two ends of the curve.
    The drawn curve looks the same.

    Args:
        pieces: maximum number of pieces, an even number of at least 2.
    """

    def __init__(self, pieces: int = PIECES) -> None:
        self._count, self._every, self._most = 0, 1, pieces
        self._pieces: list[list[tuple[float, float]]] = []
        self._ends: list[tuple[float, float]] = []

    def add(self, x: float, y: float) -> None:
        """Append a point; `x` must be larger than that of the point before."""
        point = x, y
        self._ends = [*self._ends[:1], point]
        if self._count % self._every:
            self._pieces[-1] = _extremes([*self._pieces[-1], point])
        else:
            # A new piece begins. If there are too many, neighbouring pieces are merged in pairs.
            if len(self._pieces) == self._most:
                self._every *= 2
                pairs = zip(self._pieces[::2], self._pieces[1::2], strict=True)
                self._pieces = [_extremes([*left, *right]) for left, right in pairs]
            self._pieces.append([point])
        self._count += 1

    def points(self) -> list[tuple[float, float]]:
        """Return the kept points, ordered by x."""
        return sorted({*self._ends, *(point for piece in self._pieces for point in piece)})


def thinned(points: Points, pieces: int) -> list[tuple[float, float]]:
    """Return the points of a curve that `Curve` keeps: at most 2 * `pieces` points and the two ends."""
    curve = Curve(pieces)
    for x, y in points:
        curve.add(x, y)
    return curve.points()


def _extremes(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return list({min(points, key=_height), max(points, key=_height)})


def _height(point: tuple[float, float]) -> float:
    return point[1]


def is_reward(name: str) -> bool:
    """Return whether the picture of a run shows this metric: rewards, the policy's ratio, diversity."""
    return name in _SHOWN or (name.startswith(("eval_rewards/", "eval_gold/")) and name.endswith("/mean"))


class Curves:
    """Metrics of a run over its steps, read from `metrics.jsonl` while the file grows.

    Each line is read once, so the cost of drawing does not grow with the length of the run.

    Args:
        metrics: path of `metrics.jsonl`; the file need not exist yet.
        wanted: predicate on the name of a metric; metrics for which it is false are dropped.
    """

    def __init__(self, metrics: Path, wanted: Callable[[str], bool] = is_reward) -> None:
        self.metrics, self._wanted = metrics, wanted
        self._clear(-1)

    def _clear(self, file: int) -> None:
        self._file, self._position = file, 0
        self._found: dict[str, Curve] = {}
        self.step = 0
        """Step of the last line that was read; 0 before any line."""
        self.newest: dict[str, float | None] = {}
        """Last value of each metric; None if that value was not a number."""

    def points(self) -> dict[str, list[tuple[float, float]]]:
        """Return the points of each curve that were read so far, ordered by step."""
        return {name: curve.points() for name, curve in self._found.items()}

    def draw(self, target: Path) -> list[str]:
        """Draw one plot for each curve with at least two points, and return the names of the drawn curves."""
        self.read_on()
        points = self.points()
        plots = {name: ("step", {"": line}) for name, line in points.items() if len(line) > 1}
        if plots:
            draw_plots(plots, target)
        return list(plots)

    def read_on(self) -> bool:
        """Read the new lines of the file, except an incomplete last line. Return whether anything changed."""
        if not self.metrics.is_file():
            return False
        before = self._file, self._position
        with self.metrics.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._position:  # a new run has replaced the file
                self._clear(found.st_ino)
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):  # incomplete: the run is still writing it, or was killed
                    break
                self._position += len(line)
                if (row := metrics_row(line)) is not None:
                    self._take(row)
        return (self._file, self._position) != before

    def _take(self, row: Mapping[str, Any]) -> None:
        self.step = row["step"]
        for name, value in row.items():
            if name == "step" or not self._wanted(name):
                continue
            curve = self._found.setdefault(name, Curve())
            self.newest[name] = value if is_number(value) else None
            if is_number(value):
                curve.add(row["step"], value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`; an empty list if the file does not exist.

    Damaged lines are skipped, and so is an incomplete last line of a run that still writes or was killed.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [row for line in lines if line.endswith(b"\n") and (row := metrics_row(line)) is not None]


def draw_plots(plots: Mapping[str, tuple[str, Mapping[str, Points]]], target: Path) -> None:
    """Draw plots in two columns and write them as a PNG.

    Args:
        plots: title -> (label of the x axis, lines by label); a line is a list of (x, y) with rising x.
        target: path of the PNG.
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
