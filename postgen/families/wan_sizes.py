"""Sizes that a model can make. Apart from the denoisers: the command line checks them without importing torch."""

import math
from collections.abc import Sequence

from postgen.errors import UserError

# Wan's pipelines refuse any other size, whatever the autoencoder and the patches would allow.
PIXEL_MULTIPLE = 16


def multiples(space: int, time: int, patch: Sequence[int], pixels: int = PIXEL_MULTIPLE) -> tuple[int, int, int]:
    """Return what height, width and frames - 1 must divide by, from the latent's scale factors and the patch size.

    `pixels` is what the pipeline wants height and width to divide by, whatever the others would allow.
    """
    return math.lcm(pixels, space * patch[1]), math.lcm(pixels, space * patch[2]), time * patch[0]


def check_size(
    num_frames: int | None, height: int | None, width: int | None, rows: int, columns: int, time: int
) -> None:
    """Refuse a size that the pipelines would refuse or silently change; None is left to the pipeline.

    Args:
        num_frames: frames of the clip.
        height: pixels.
        width: pixels.
        rows: what the height must divide by.
        columns: what the width must divide by.
        time: what frames - 1 must divide by.

    Raises:
        UserError: names the nearest sizes that are allowed.
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
