"""Colour that is no body's: where a body changes its hue in a part of it, or runs into its neighbour.

Light is white, so all of a body has one hue. Hues mix only along an edge, in the two pixels that antialiasing and
`segment.smooth` give it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from postgen.world.spec import COLOURS

#: Distance from a colour's hue, of 6, up to which a pixel is of it; the nearest two colours are 0.42 apart.
_APART = 0.2
#: Part of the picture that makes a colour one of the picture's.
_PRESENT = 0.004


def stained(hue_MHW: Tensor, named_MHW: Tensor, body_MHW: Tensor, own_8: Tensor) -> Tensor:
    """Pixels of bodies whose 3x3 neighbourhood has no hue of any body of the picture: (M,H,W) bool.

    Args:
        hue_MHW: hue in [0,6).
        named_MHW: index of the colour with the nearest hue.
        body_MHW: whether a pixel is of a coloured body.
        own_8: hue of each colour.
    """
    pictures, height, width = hue_MHW.shape
    index = torch.where(body_MHW, named_MHW, len(COLOURS)).flatten(1)
    count = hue_MHW.new_zeros(pictures, len(COLOURS) + 1).scatter_add_(1, index, torch.ones_like(hue_MHW).flatten(1))
    present = count >= _PRESENT * height * width
    gap = (hue_MHW - own_8[named_MHW]).abs()
    strange = torch.minimum(gap, 6 - gap) > _APART
    strange |= ~present.gather(1, named_MHW.flatten(1)).reshape(named_MHW.shape)
    return functional.max_pool2d((~(strange & body_MHW)).float()[:, None], 3, 1, 1)[:, 0] == 0
