"""Sizes that a model can make. The module does not import torch, so that the command line can check sizes quickly."""

import math
from collections.abc import Sequence

from postgen.errors import UserError

# Wan's pipelines refuse other sizes, even if the autoencoder and the patch size would allow them.
PIXEL_MULTIPLE = 16


def multiples(space: int, time: int, patch: Sequence[int], pixels: int = PIXEL_MULTIPLE) -> tuple[int, int, int]:
    """Return the numbers of which height, width and frames - 1 must be multiples.

    Args:
        space: pixels per latent pixel along each side.
        time: frames per latent frame.
        patch: latent frames, rows and columns of a patch.
        pixels: number of which the pipeline itself requires height and width to be multiples.
    """
    return math.lcm(pixels, space * patch[1]), math.lcm(pixels, space * patch[2]), time * patch[0]


def check_size(
    num_frames: int | None, height: int | None, width: int | None, rows: int, columns: int, time: int
) -> None:
    """Check a size; pipelines would refuse a wrong size or change it silently.

    Args:
        num_frames: frames of the clip; None is the pipeline's default and is not checked.
        height: height in pixels, or None.
        width: width in pixels, or None.
        rows: number of which the height must be a multiple.
        columns: number of which the width must be a multiple.
        time: number of which frames - 1 must be a multiple.

    Raises:
        UserError: a size is not allowed. The message names the nearest allowed sizes.
    """
    for what, value, step in (("height", height, rows), ("width", width, columns)):
        if value is not None and (value < step or value % step):
            raise UserError(f"{what} must be a multiple of {step}, got {value}: use {_nearest(value, step, step)}")
    if num_frames is not None and (num_frames < 1 or (num_frames - 1) % time):
        nearest = _nearest(num_frames - 1, time, 0, add=1)
        raise UserError(f"the number of frames must be {time}n+1, got {num_frames}: use {nearest}")


def _nearest(value: int, step: int, least: int, add: int = 0) -> str:
    below = max(least, value // step * step)
    both = dict.fromkeys((below + add, max(least, -(-value // step) * step) + add))
    return " or ".join(map(str, both))
