"""One size for the latents of all modalities, so that a noise level means the same for each of them.

An autoencoder that was trained on colour may make latents of depth and flow that are much larger than those of RGB. At
one noise level more of them is left then. They are multiplied by a number on their way into the network, and divided
by it on their way out; that of RGB is 1. Where nobody said another one it is 1 for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, is_number, shown
from postgen.worldweaver.levels import Modality

Scale = tuple[float, ...]
"""Of each modality, RGB first."""
_AT_ONCE = 64
"""Clips whose squares are summed together."""


def checked_scale(given: Any, count: int, name: str = "latent_scale") -> Scale:
    """Return a scale of so many modalities.

    Raises:
        UserError: it is no list of so many finite numbers above 0 of which the first, of RGB, is 1.
    """
    numbers = list(given) if isinstance(given, list | tuple) else []
    fits = len(numbers) == count and all(is_number(each) and 0 < each < float("inf") for each in numbers)
    if not fits or numbers[0] != 1:
        raise UserError(f"{name} is {shown(given)}: give {count} numbers above 0, the first of RGB and 1")
    return tuple(float(each) for each in numbers)


def measured_scale(latents: Mapping[Modality, Tensor], total: Callable[[Tensor], Tensor] | None = None) -> Scale:
    """Return the deviation of RGB latents over that of each modality, to two digits, for other clips to give the same.

    A deviation is that of all channels together, each about its own mean: what a network has to find, not where it is.

    Args:
        latents: (N, C, T, h, w) of each modality, RGB first, as the autoencoder gives them.
        total: sums a tensor over the processes, each of which has clips of its own; None: there is one.

    Raises:
        UserError: latents that are all the same, or not finite.
    """
    sums = torch.stack([_sums(each) for each in latents.values()])
    count, first, second = (sums if total is None else total(sums)).unbind(1)
    variance = (second / count - (first / count).square()).mean(1)
    if not bool((variance.isfinite() & (variance > 0)).all()):
        raise UserError("latents of the clips are all the same or not finite: give latent_scale, or look at the clips")
    ratios: list[float] = (variance[0] / variance).sqrt().tolist()
    return tuple(float(f"{ratio:.2g}") for ratio in ratios)


def scale_words(modalities: Sequence[Modality], scale: Scale) -> list[str]:
    """Return the names of modalities, and of those that are scaled by how much."""
    return [name if each == 1 else f"{name} x {each}" for name, each in zip(modalities, scale, strict=True)]


def _sums(latents: Tensor) -> Tensor:
    """Return of each channel its count, its sum and that of its squares, (3, C) float64 on the CPU."""
    found = torch.zeros(3, latents.shape[1], dtype=torch.float64)
    for part in latents.split(_AT_ONCE):
        flat = part.transpose(0, 1).flatten(1).float()
        count = torch.full_like(flat[:, 0], flat.shape[1])
        found += torch.stack([count, flat.sum(1), flat.square().sum(1)]).cpu().double()
    return found
