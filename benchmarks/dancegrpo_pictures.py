"""Curves with intervals and contact sheets of `python -m benchmarks.dancegrpo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.dancegrpo_arms import GROUPS, SHIPPED
from postgen.files import replacing

PLOTS = {
    "right": "wholly right",
    "judge": "held-out judge",
    "motion_ratio": "motion / base",
    "diversity_ratio": "diversity within prompts / base",
    "floor_diversity_ratio": "floor colours / base",
    "sharpness_ratio": "sharpness / base",
}
"""Measure -> title of its plot."""
ACROSS = {"forward_equivalents": "forward-equivalents, k", "step": "updates"}
COLOURS = ((30, 110, 60), (200, 80, 60), (70, 110, 200), (170, 130, 30), (130, 80, 170), (90, 90, 90), (20, 150, 160))
_SIZE, _COLUMNS, _TOP = (470, 220), 2, 40
_SHEET_WIDTH = 640


def draw(arms: Mapping[str, Any], target: Path, names: Sequence[str], across: str = "forward_equivalents") -> bool:
    """Draw the curves of some arms: a plot for each measure, with the mean over seeds and its interval.

    Args:
        arms: the numbers of the report.
        target: path of the PNG.
        names: the arms; those that are not measured are left out.
        across: the number on the horizontal axis, a key of `ACROSS`.

    Returns:
        Whether there was anything to draw.
    """
    shown = [name for name in names if name in arms]
    if not shown:
        return False
    height = -(-len(PLOTS) // _COLUMNS) * _SIZE[1] + _TOP
    picture = Image.new("RGB", (_COLUMNS * _SIZE[0], height), "white")
    pen = ImageDraw.Draw(picture, "RGBA")
    for number, name in enumerate(shown):
        place = 10 + number % 7 * 130, 4 + number // 7 * 16
        pen.text(place, name, COLOURS[number % len(COLOURS)], ImageFont.load_default(13))
    for place, (measure, title) in enumerate(PLOTS.items()):
        row, column = divmod(place, _COLUMNS)
        left, top = column * _SIZE[0] + 50, _TOP + row * _SIZE[1] + 22
        box = left, top, (column + 1) * _SIZE[0] - 14, _TOP + (row + 1) * _SIZE[1] - 18
        lines = [[(each[across], each[measure]) for each in arms[name]["curve"]] for name in shown]
        _plot(pen, box, lines, title, across)
    _save(picture, target, "PNG")
    return True


def _plot(
    pen: Any, box: tuple[int, int, int, int], lines: Sequence[Sequence[tuple[float, Any]]], title: str, across: str
) -> None:
    left, top, right, bottom = box
    farthest = max(x for line in lines for x, _ in line) or 1.0
    values = [each[key] for line in lines for _, each in line for key in ("low", "high")]
    low, high = min(values), max(values)
    spread, font = (high - low) or 1.0, ImageFont.load_default(11)

    def at(x: float, value: float) -> tuple[float, float]:
        return left + (right - left) * x / farthest, bottom - (bottom - top) * (value - low) / spread

    pen.rectangle(box, outline=(200, 200, 200))
    for value in (low, (low + high) / 2, high):
        pen.text((left - 46, at(0, value)[1] - 6), f"{value:.3g}", (110, 110, 110), font)
    scale = 1000 if across == "forward_equivalents" else 1
    pen.text((right - 150, bottom + 2), f"0 .. {farthest / scale:.0f} {ACROSS[across]}", (110, 110, 110), font)
    pen.text((left, top - 16), title, "black", ImageFont.load_default(12))
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        if len(line) > 1:
            band = [at(x, each["high"]) for x, each in line] + [at(x, each["low"]) for x, each in reversed(line)]
            pen.polygon(band, fill=(*colour, 45))
            pen.line([at(x, each["value"]) for x, each in line], fill=(*colour, 255), width=2)


def write(out: Path, payload: Mapping[str, Any], where: Path) -> list[Path]:
    """Draw the curves, and copy a contact sheet of each shipped recipe and hacked run to the folder of the result."""
    arms, made = payload["arms"], []
    for names, suffix in ((SHIPPED, ""), (("nft", *GROUPS["counter"], *GROUPS["losses"]), "_counter")):
        target = where.with_name(f"{where.stem}{suffix}.png")
        made += [target] if draw(arms, target, [*names]) else []
    target = where.with_name(f"{where.stem}_hack.png")
    made += [target] if draw(arms, target, [*GROUPS["hack"]], "step") else []
    for name in (*SHIPPED, *GROUPS["hack"]):
        if name in arms:
            made += [*_sheet(out, name, arms[name], where)]
    return made


def _sheet(out: Path, name: str, arm: Mapping[str, Any], where: Path) -> Sequence[Path]:
    # The chosen checkpoint of the first seed, or the last one if the base model was chosen.
    folder, begin = out / "measured", f"{name}.{arm['seeds'][0]}"
    found = [folder / f"{begin}.{arm['chosen_points'][0]}.png", *sorted(folder.glob(f"{begin}.[0-9]*.png"))[::-1]]
    found = [path for path in found if path.is_file()][:1]
    if not found:
        return ()
    title = f"{arm['recipe']}_after" if name in SHIPPED else name
    target = where.with_name(f"{where.stem}_{title}.png")
    with Image.open(found[0]) as picture:
        small = picture.copy()
    small.thumbnail((_SHEET_WIDTH, 10 * _SHEET_WIDTH))
    _save(small.quantize(128), target, "PNG")
    return (target,)


def clear(where: Path) -> None:
    """Remove the pictures of an earlier result."""
    for path in where.parent.glob(f"{where.stem}_*.png"):
        path.unlink()


def _save(picture: Image.Image, target: Path, kind: str) -> None:
    with replacing(target) as part:
        picture.save(part, kind, optimize=True)
