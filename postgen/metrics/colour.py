"""Colour and contrast of frames: CIELAB, colour distances and the appearance measures of long-video papers.

Shapes: F frames. Values are in [0, 1] as displayed (sRGB).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError

#: Matrix from linear sRGB to XYZ, divided by the white point D65 (IEC 61966-2-1).
_TO_XYZ = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)


def lab(rgb: Tensor, dim: int = -3) -> Tensor:
    """Convert sRGB colours in [0, 1] to CIELAB (L in [0, 100], a, b). The axis `dim` of size 3 keeps its position.

    >>> lab(torch.ones(3), dim=0).round().abs().tolist()
    [100.0, 0.0, 0.0]
    """
    colour = rgb.movedim(dim, -1)
    linear = torch.where(colour <= 0.04045, colour / 12.92, ((colour.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
    xyz = linear @ linear.new_tensor(_TO_XYZ).T
    root = torch.where(xyz > 216 / 24389, xyz.clamp_min(216 / 24389) ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root.unbind(-1)
    colours = torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)
    return torch.movedim(colours, -1, dim)


def delta_e(a: Tensor, b: Tensor, dim: int = -3) -> Tensor:
    """Return the colour distance (CIE 1976) between two tensors of CIELAB colours; axis `dim` is removed."""
    distance: Tensor = torch.linalg.vector_norm(a - b, dim=dim)
    return distance


def luma(frames: Tensor) -> Tensor:
    """Return the displayed brightness (ITU-R BT.601) of frames (F, 3, H, W) as (F, H, W)."""
    red, green, blue = frames.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def appearance(frames: Tensor) -> dict[str, Tensor]:
    """Return four appearance measures of frames, each of shape (F,).

    `sharpness`: variance of the Laplacian of luma. `colourfulness`: the measure of Hasler and Suesstrunk 2003, on
    values in [0, 1]. `saturation`: mean over pixels of (max - min) / max of the channels. `luma_std`: standard
    deviation of luma.

    Args:
        frames: (F, 3, H, W) in [0, 1], at least 3 pixels high and wide.

    Raises:
        UserError: frames of another shape or dtype, or values that are not finite.
    """
    check_frames(frames, 1, "frames")
    if min(frames.shape[-2:]) < 3:
        raise UserError(f"frames must be at least 3 pixels high and wide, got {tuple(frames.shape[-2:])}")
    red, green, blue = frames.unbind(1)
    grey = luma(frames)
    kernel = frames.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    edges = functional.conv2d(grey[:, None], kernel)
    first, second = red - green, (red + green) / 2 - blue
    spread = (_variance(first) + _variance(second)).sqrt()
    mean = (first.mean((1, 2)).square() + second.mean((1, 2)).square()).sqrt()
    high, low = frames.amax(1), frames.amin(1)
    return {
        "sharpness": _variance(edges[:, 0]),
        "colourfulness": spread + 0.3 * mean,
        "saturation": ((high - low) / high.clamp_min(1e-6)).mean((1, 2)),
        "luma_std": _variance(grey).sqrt(),
    }


def _variance(values_FHW: Tensor) -> Tensor:
    return values_FHW.flatten(1).var(dim=1, correction=0)


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Return the exact Wasserstein-1 distance of two samples of numbers.

    The distance is the area between the two distribution functions.

    >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0, 3.0, 3.0]))
    2.0

    Raises:
        UserError: an empty sample.
    """
    a, b = a.flatten().double().sort().values, b.flatten().double().sort().values
    if not len(a) or not len(b):
        raise UserError(f"both samples must hold at least one number, got samples of {len(a)} and {len(b)} numbers")
    places = torch.cat((a, b)).sort().values
    below = [torch.searchsorted(sample, places[:-1], right=True) / len(sample) for sample in (a, b)]
    return float(((below[0] - below[1]).abs() * places.diff()).sum())


def check_frames(frames: Tensor, least: int, name: str) -> None:
    """Check that frames are floating point, finite, of shape (F, 3, H, W), with F >= `least`.

    Args:
        frames: the tensor to check.
        least: smallest number of frames.
        name: name of the argument for error messages.

    Raises:
        UserError: any of these conditions does not hold.
    """
    if frames.dim() != 4 or frames.shape[1] != 3 or len(frames) < least or not frames.is_floating_point():
        raise UserError(
            f"{name} must be floating point (F, 3, H, W) with at least {least} frames, got {frames.dtype}"
            f" {tuple(frames.shape)}"
        )
    if not frames.isfinite().all():
        raise UserError(f"{name} must hold finite numbers, got NaN or infinity: check the model that made the clip")
