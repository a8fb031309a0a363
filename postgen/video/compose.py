"""Views of clips: a contact sheet, and two clips side by side."""

from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from postgen.errors import is_whole
from postgen.files import replacing
from postgen.video.ffmpeg import VideoError
from postgen.video.footage import Footage
from postgen.video.pictures import Frames, pictures

# Margin between the frames of a sheet, size of its font and height of a line of text, in pixels.
_MARGIN = 6
_TEXT = 11
_LINE = 15
# An iterable is thinned out when more than this many times `limit` frames are in memory.
_HELD = 4


def contact_sheet(
    clip: Frames | Footage,
    path: str | Path,
    *,
    columns: int = 6,
    title: str | None = None,
    limit: int = 36,
    indices: Sequence[int] | Sequence[str] | None = None,
) -> Path:
    """Draw the frames of a clip in a grid, each below its index, and save the grid as a PNG.

    Args:
        clip: a clip (F, 3, H, W), an iterable as for `write_video`, or a `Footage`. For a long iterable, a few times
            `limit` frames are in memory at once, as uint8.
        path: the PNG file to write; an existing file is replaced.
        columns: frames per row, at least 1.
        title: text above the grid, wrapped to the width of the grid.
        limit: largest number of frames that are drawn, at least 2. Of a longer clip, `limit` evenly spaced frames are
            drawn, the first and the last included. Frames of an iterable with more than 4 * `limit` frames are spaced
            approximately: those nearest to even spacing among the frames still in memory are drawn.
        indices: the number or text to print above each frame, one per frame of the clip; None prints 0, 1, ...

    Returns:
        `path` as a `Path`.

    Raises:
        VideoError: the clip has no frame, `columns` or `limit` is too small, the number of `indices` is not the number
            of frames, `write_video` would refuse a frame, or `path` cannot be written.
    """
    if not (is_whole(columns, 1) and is_whole(limit, 2)):
        raise VideoError(f"columns must be a whole number >= 1 and limit one >= 2, got {columns=}, {limit=}")
    count, spread = _spread(clip, limit)
    shown: list[tuple[int | str, Tensor]] = list(spread)
    if indices is not None:
        if len(indices) != count:
            raise VideoError(
                f"indices must hold one number per frame: the clip has {count} frames, got {len(indices)} indices"
            )
        shown = [(indices[index], picture) for index, picture in spread]
    target = Path(path)
    try:
        with replacing(target) as part:
            _draw_sheet(shown, min(columns, len(shown)), title).save(part, format="PNG")
    except OSError as error:
        raise VideoError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _spread(clip: Frames | Footage, limit: int) -> tuple[int, list[tuple[int, Tensor]]]:
    """Return the number of frames, and up to `limit` evenly spaced frames with their indices."""
    frames: Frames = clip.windows() if isinstance(clip, Footage) else clip
    known = isinstance(clip, Footage) or (isinstance(clip, Tensor) and clip.dim() == 4)
    wanted = set(_even(len(clip), limit)) if known and isinstance(clip, Sized) else None
    # For a known length, hold exactly the frames to draw. Otherwise hold every `stride`-th frame, and double the
    # stride whenever too many are held.
    held: dict[int, Tensor] = {}
    stride, count = 1, 0
    last: tuple[int, Tensor] | None = None
    for index, picture in enumerate(pictures(frames)):
        count, last = index + 1, (index, picture)
        if index in wanted if wanted is not None else index % stride == 0:
            held[index] = picture
        if wanted is None and len(held) > _HELD * limit:
            stride *= 2
            held = {one: kept for one, kept in held.items() if one % stride == 0}
    if last is None:
        raise VideoError("cannot draw a contact sheet: the clip has no frame")
    held[last[0]] = last[1]
    near = [min(held, key=lambda one: abs(one - place)) for place in _even(count, limit)]
    return count, [(index, held[index]) for index in near]


def _even(count: int, limit: int) -> list[int]:
    """Return up to `limit` evenly spaced indices below `count`, the first and the last included."""
    if count <= limit:
        return list(range(count))
    places: list[int] = torch.linspace(0, count - 1, limit).round().int().tolist()
    return places


def side_by_side(a: Frames, b: Frames, *, gap: int = 8) -> Iterator[Tensor]:
    """Yield frames (3, H, W) with `a` on the left and `b` on the right, separated by a white bar of `gap` pixels.

    Frames are not resized: the clip of smaller height gets black rows at the bottom, and the clip with fewer frames
    repeats its last frame. Pass the result to `write_video`; one frame of each clip is in memory at a time.

    Raises:
        VideoError: a clip has no frame, or `write_video` would refuse a frame.
    """
    left = right = None
    for new_left, new_right in zip_longest(pictures(a), pictures(b)):
        left = new_left if new_left is not None else left
        right = new_right if new_right is not None else right
        if left is None or right is None:
            raise VideoError("cannot put two clips side by side: one of them has no frame")
        height = max(left.shape[0], right.shape[0])
        bar = torch.full((height, gap, 3), 255, dtype=torch.uint8)
        joined = torch.cat([_padded(left, height), bar, _padded(right, height)], dim=1)
        yield joined.permute(2, 0, 1).float().div(255)


def _padded(picture: Tensor, height: int) -> Tensor:
    return torch.nn.functional.pad(picture, (0, 0, 0, 0, 0, height - picture.shape[0]))


def _draw_sheet(shown: list[tuple[int | str, Tensor]], columns: int, title: str | None) -> Image.Image:
    height, width, _ = shown[0][1].shape
    rows = -(-len(shown) // columns)
    sheet_width = columns * (width + _MARGIN) + _MARGIN
    font = ImageFont.load_default(_TEXT)
    heading = _wrapped(title or "", font.getlength, sheet_width - 2 * _MARGIN)
    top = _MARGIN + len(heading) * _LINE
    sheet = Image.new("RGB", (sheet_width, top + rows * (height + _LINE + _MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        draw.text((_MARGIN, _MARGIN + number * _LINE), line, fill="black", font=font)
    for place, (index, picture) in enumerate(shown):
        row, column = divmod(place, columns)
        x, y = _MARGIN + column * (width + _MARGIN), top + row * (height + _LINE + _MARGIN)
        draw.text((x, y), str(index), fill="gray", font=font)
        sheet.paste(Image.fromarray(picture.numpy()), (x, y + _LINE))
    return sheet


def _wrapped(text: str, measure: Callable[[str], float], width: float) -> list[str]:
    """Break a text into lines that fit a width; the edge of the sheet cuts a word that is wider than a line."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and measure(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
