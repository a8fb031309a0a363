"""A small network that tells a cube from a body with round sides: a drum, a half cylinder, a squat cylinder.

`facets` compares a blob with exact views of boxes and cylinders. What a model draws is often neither: round on one
side only, or softer than any render. The network has seen such bodies, and cubes of generated clips that persons
looked at (`postgen.judges.world_edges`). It sees outline and brightness without hue, and the mirror image as well.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgen.tensor_files import read_tensors

#: Cells of a side of its window.
CELLS = 32
#: Root of the area, in pixels, below which the autoencoder alone makes cubes round, and below which that is sure; so
#: much is taken from the logit then.
_SMALL, _TINY, _LESS = 15.0, 12.0, 4.0
WEIGHTS = Path(__file__).resolve().parents[2] / "assets" / "world-edges" / "model.safetensors"


class EdgeNet(nn.Module):
    """Windows (N,2,CELLS,CELLS) of soft outline and brightness -> logits (N,), above 0 for round."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Sequential(
            nn.Conv2d(2, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.say = nn.Sequential(nn.Linear(48 * 16, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, window: Tensor, dropped: float = 0.0) -> Tensor:
        """See the class; `dropped` is the part of the features that is left out while it learns."""
        result: Tensor = self.say(functional.dropout(self.see(prepared(window)), dropped, dropped > 0))[:, 0]
        return result


def prepared(window: Tensor) -> Tensor:
    """Outline, and brightness within it over its mean."""
    mask, bright = window[:, :1], window[:, 1:]
    mean = (mask * bright).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp_min(1e-3)
    shade = mask * (bright / mean.clamp_min(1e-3) - 1)
    return torch.cat((2 * mask - 1, (3 * shade).clamp(-2, 2)), 1)


@functools.lru_cache(maxsize=4)
def network(device: str) -> EdgeNet:
    """The shipped network."""
    net = EdgeNet()
    net.load_state_dict({name: value.float() for name, value in read_tensors(WEIGHTS).items()})
    return net.requires_grad_(False).eval().to(device)


def roundness(window_N2CC: Tensor, area_N: Tensor) -> Tensor:
    """Mean logit of windows and of their mirror images (N,): below 0 for a cube, above it for one with round sides.

    `area_N` is in pixels: the smaller a body, the less it is held to be round.
    """
    net = network(str(window_N2CC.device))
    two: Tensor = net(torch.cat((window_N2CC, window_N2CC.flip(-1)))).unflatten(0, (2, -1)).mean(0)
    return two - _LESS * ((_SMALL - area_N.sqrt()) / (_SMALL - _TINY)).clamp(0, 1)
