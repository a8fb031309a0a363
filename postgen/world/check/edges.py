"""A small network that separates cubes from bodies with round sides: a drum, a half cylinder, a squat cylinder.

`facets` compares a blob with exact views of boxes and cylinders. The bodies that a model draws are often neither:
round on one side only, or softer than any render. The network is trained on such bodies, and on cubes of generated
clips that people judged by eye (`postgen.judges.world_edges`). Its input is the outline and the brightness, without
hue; it averages over the window and its mirror image.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgen.tensor_files import read_tensors

#: Side of the window in cells.
CELLS = 32
#: Bodies whose root of the area, in pixels, is below `_SMALL` may look round because of the autoencoder alone; below
#: `_TINY` they surely do. `_LESS` is the largest amount that is subtracted from their logit.
_SMALL, _TINY, _LESS = 15.0, 12.0, 4.0
WEIGHTS = Path(__file__).resolve().parents[2] / "assets" / "world-edges" / "model.safetensors"


class EdgeNet(nn.Module):
    """Classifier from windows (N,2,CELLS,CELLS) of soft outline and brightness to logits (N,); above 0 means round."""

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
        """Return the logits (N,) of windows (N,2,CELLS,CELLS).

        Args:
            window: soft outline and brightness.
            dropped: dropout probability of the features during training.
        """
        result: Tensor = self.say(functional.dropout(self.see(prepared(window)), dropped, dropped > 0))[:, 0]
        return result


def prepared(window: Tensor) -> Tensor:
    """Return the network's input: the outline, and the brightness within it relative to its mean."""
    mask, bright = window[:, :1], window[:, 1:]
    mean = (mask * bright).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp_min(1e-3)
    shade = mask * (bright / mean.clamp_min(1e-3) - 1)
    return torch.cat((2 * mask - 1, (3 * shade).clamp(-2, 2)), 1)


@functools.lru_cache(maxsize=4)
def network(device: str) -> EdgeNet:
    """Return the shipped network on a device, in evaluation mode."""
    net = EdgeNet()
    net.load_state_dict({name: value.float() for name, value in read_tensors(WEIGHTS).items()})
    return net.requires_grad_(False).eval().to(device)


def roundness(window_N2CC: Tensor, area_N: Tensor) -> Tensor:
    """Return the mean logit of windows and their mirror images (N,): below 0 for a cube, above 0 for round sides.

    Args:
        window_N2CC: soft outline and brightness.
        area_N: area in pixels. The logit of a small body is lowered, as the autoencoder alone makes small cubes look
            round.
    """
    net = network(str(window_N2CC.device))
    two: Tensor = net(torch.cat((window_N2CC, window_N2CC.flip(-1)))).unflatten(0, (2, -1)).mean(0)
    return two - _LESS * ((_SMALL - area_N.sqrt()) / (_SMALL - _TINY)).clamp(0, 1)
