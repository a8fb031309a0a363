"""Colours that belong to no body: where a part of a body changes its hue, or a body melts into its neighbour.

Light is white, so a body has one hue. Hues mix only at edges, within the two pixels of antialiasing and
`segment.smooth`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from postgen.world.spec import COLOURS

#: Largest distance between a pixel's hue and the hue of its colour, on a circle of length 6; the two nearest colours
#: are 0.42 apart.
_APART = 0.2
#: Share of the picture from which a colour counts as present in the picture.
_PRESENT = 0.004


def stained(hue_MHW: Tensor, named_MHW: Tensor, body_MHW: Tensor, own_8: Tensor) -> Tensor:
    """Return the stained pixels (M,H,W), bool.

    A body pixel is stained if no pixel of its 3x3 neighbourhood has the hue of a body in the picture.

    Args:
        hue_MHW: hue in [0,6).
        named_MHW: index of the colour with the nearest hue.
        body_MHW: True for the pixels of coloured bodies.
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
