"""Where a picture has marks that look like text, without reading them (no OCR, no weights).

Text is a row of strokes: along a line the luma jumps up and down about equally often and many times, across a line it
jumps too, and most pixels are near one of two levels, ink and ground. The measure counts such windows at three sizes
of letters. It cannot tell text from other rows of strokes (fences, bricks, keyboards, blinds with noise), it misses
single large letters, handwriting with weak contrast, and letters below about 8 or above about 60 pixels of height. Use
it to find subtitles, logos and slides; read the contact sheet of what it removed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from postgen.metrics.colour import luma

_JUMP, _OF_SPAN = 0.12, 0.5
"""Least jump over two pixels at the edge of a stroke: in luma, and as a share of the range of luma in the window."""
_WINDOW = (9, 35)
"""Height and width in pixels of a window: about one letter high and four letters wide."""
LEAST = 80
"""Smallest side in pixels that is examined. In a smaller picture, two objects are as wide as a row of letters."""
_ACROSS, _ALONG, _ALIKE = 0.04, 0.015, 0.5
"""Least share of pixels with a jump of either sign along the line, the same across the line, and least ratio of the
shares of both signs along the line."""


def text_mask(frames: Tensor, sizes: tuple[float, ...] = (1.0, 0.5, 0.25)) -> Tensor:
    """Return the pixels (F, H, W), bool, that lie in a window that looks like text.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        sizes: the scales at which windows are examined; at scale 1 letters are about 7 to 16 pixels high.
    """
    grey = luma(frames)[:, None]
    shape = grey.shape[-2:]
    found = torch.zeros(len(frames), *shape, dtype=torch.bool, device=frames.device)
    for size in sizes:
        small = tuple(round(n * size) for n in shape)
        if min(small) < LEAST:
            continue
        scaled = grey if size == 1 else functional.interpolate(grey, small, mode="area")
        mask = _windows(scaled).float()[:, None]
        found |= functional.interpolate(mask, shape, mode="nearest")[:, 0] > 0
    return found


def _windows(grey_F1HW: Tensor) -> Tensor:
    span = (_largest(grey_F1HW) + _largest(-grey_F1HW)).clamp_min(_JUMP / _OF_SPAN) * _OF_SPAN
    right = functional.pad(grey_F1HW[..., 2:] - grey_F1HW[..., :-2], (1, 1))
    down = functional.pad(grey_F1HW[..., 2:, :] - grey_F1HW[..., :-2, :], (0, 0, 1, 1))
    # A stroke is longer than one row, the edges of noise are not.
    rise, fall = (_share(_repeated(jump >= span)) for jump in (right, -right))
    over, under = (_share(jump >= span) for jump in (down, -down))
    few, many = torch.minimum(rise, fall), torch.maximum(rise, fall)
    found = (few >= _ACROSS) & (few >= _ALIKE * many) & (torch.minimum(over, under) >= _ALONG)
    # Every pixel of a window that looks like text counts, not only its centre.
    return _largest(found.float())[:, 0] > 0


def _repeated(mask: Tensor) -> Tensor:
    above = functional.pad(mask[..., :-1, :], (0, 0, 1, 0))
    below = functional.pad(mask[..., 1:, :], (0, 0, 0, 1))
    return mask & above & below


def _share(mask: Tensor) -> Tensor:
    pad = (_WINDOW[0] // 2, _WINDOW[1] // 2)
    return functional.avg_pool2d(mask.float(), _WINDOW, 1, pad, count_include_pad=False)


def _largest(values: Tensor) -> Tensor:
    # Separable: the maximum of a window is the maximum over its columns of the maxima over its rows.
    rows = functional.max_pool2d(values, (_WINDOW[0], 1), 1, (_WINDOW[0] // 2, 0))
    return functional.max_pool2d(rows, (1, _WINDOW[1]), 1, (0, _WINDOW[1] // 2))
