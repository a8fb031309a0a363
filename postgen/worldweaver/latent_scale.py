"""Scale factors that give the latents of all modalities a similar size.

An autoencoder that was trained on colour may produce depth and flow latents that are much larger than RGB latents. At
the same noise level they then keep more of their signal. Therefore the latents of each modality are multiplied by a
factor before they enter the network, and divided by it afterwards. The factor of RGB is 1. The default is 1 for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, is_number, shown
from postgen.worldweaver.levels import Modality

Scale = tuple[float, ...]
"""One factor for each modality, RGB first."""
_AT_ONCE = 64
"""Number of clips per batch when sums of squares are computed."""


def checked_scale(given: Any, count: int, name: str = "latent_scale") -> Scale:
    """Check a latent scale and return it as a tuple of floats.

    Raises:
        UserError: the value is not a list of `count` finite numbers above 0 with 1 as the first (RGB).
    """
    numbers = list(given) if isinstance(given, list | tuple) else []
    fits = len(numbers) == count and all(is_number(each) and 0 < each < float("inf") for each in numbers)
    if not fits or numbers[0] != 1:
        raise UserError(f"{name} is {shown(given)}: give {count} numbers above 0; the first is for RGB and must be 1")
    return tuple(float(each) for each in numbers)


def measured_scale(latents: Mapping[Modality, Tensor], total: Callable[[Tensor], Tensor] | None = None) -> Scale:
    """Return the standard deviation of the RGB latents divided by that of each modality, rounded to two digits.

    The deviation is computed over all channels together, each about its own mean, because the scale concerns the
    variation of the latents and not their offset. Rounding makes different sets of clips return the same scale.

    Args:
        latents: (N, C, T, h, w) of each modality, RGB first, as the autoencoder returns them.
        total: sums a tensor over all processes, each of which holds different clips; None: there is one process.

    Raises:
        UserError: the latents of a modality are all equal, or not finite.
    """
    sums = torch.stack([_sums(each) for each in latents.values()])
    count, first, second = (sums if total is None else total(sums)).unbind(1)
    variance = (second / count - (first / count).square()).mean(1)
    if not bool((variance.isfinite() & (variance > 0)).all()):
        raise UserError("latents of the clips are all equal or not finite: give latent_scale, or check the clips")
    ratios: list[float] = (variance[0] / variance).sqrt().tolist()
    return tuple(float(f"{ratio:.2g}") for ratio in ratios)


def scale_words(modalities: Sequence[Modality], scale: Scale) -> list[str]:
    """Return the name of each modality, followed by its scale factor if that is not 1."""
    return [name if each == 1 else f"{name} x {each}" for name, each in zip(modalities, scale, strict=True)]


def _sums(latents: Tensor) -> Tensor:
    """Return the count, the sum and the sum of squares of each channel, (3, C) float64 on the CPU."""
    found = torch.zeros(3, latents.shape[1], dtype=torch.float64)
    for part in latents.split(_AT_ONCE):
        flat = part.transpose(0, 1).flatten(1).float()
        count = torch.full_like(flat[:, 0], flat.shape[1])
        found += torch.stack([count, flat.sum(1), flat.square().sum(1)]).cpu().double()
    return found
