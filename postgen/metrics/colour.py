"""Colour and contrast of frames: CIELAB, distances and the appearance measures of long-video papers.

Shapes: F frames, values in [0, 1] as displayed (sRGB).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError

#: Linear sRGB to XYZ over the white point D65 (IEC 61966-2-1).
_TO_XYZ = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)


def lab(rgb: Tensor, dim: int = -3) -> Tensor:
    """Return CIELAB (L in [0, 100], a, b) of sRGB colours in [0, 1], along the same axis of size 3.

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
    """Return the distance (CIE 1976) of two fields of CIELAB colours, without their axis of size 3."""
    distance: Tensor = torch.linalg.vector_norm(a - b, dim=dim)
    return distance


def luma(frames: Tensor) -> Tensor:
    """Return the brightness of frames (F, 3, H, W) as displayed (ITU-R BT.601), (F, H, W)."""
    red, green, blue = frames.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def appearance(frames: Tensor) -> dict[str, Tensor]:
    """Return what frames look like, each (F,).

    `sharpness`: variance of the Laplacian of luma. `colourfulness`: Hasler and Suesstrunk 2003, of values in [0, 1].
    `saturation`: mean of max - min over max of the channels. `luma_std`: standard deviation of luma.

    Args:
        frames: (F, 3, H, W) in [0, 1], at least 3 pixels high and wide.

    Raises:
        UserError: another form.
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
    """Return the Wasserstein-1 distance of two samples of numbers, exactly: the area between their distributions.

    >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0, 3.0, 3.0]))
    2.0

    Raises:
        UserError: an empty sample.
    """
    a, b = a.flatten().double().sort().values, b.flatten().double().sort().values
    if not len(a) or not len(b):
        raise UserError(f"a distance of samples needs numbers in both, got {len(a)} and {len(b)}")
    places = torch.cat((a, b)).sort().values
    below = [torch.searchsorted(sample, places[:-1], right=True) / len(sample) for sample in (a, b)]
    return float(((below[0] - below[1]).abs() * places.diff()).sum())


def check_frames(frames: Tensor, least: int, name: str) -> None:
    """Raise `UserError` unless frames are (F, 3, H, W), floating, finite, with F >= `least`."""
    if frames.dim() != 4 or frames.shape[1] != 3 or len(frames) < least or not frames.is_floating_point():
        raise UserError(
            f"{name} must be floating (F, 3, H, W) with at least {least} frames, got {frames.dtype}"
            f" {tuple(frames.shape)}"
        )
    if not frames.isfinite().all():
        raise UserError(f"{name} hold values that are no finite numbers: a clip that broke has no measures")
