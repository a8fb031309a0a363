"""What every latent frame of a window is: its noise level in each modality, and its part in the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from postgen.errors import UserError

Modality = Literal["rgb", "depth", "flow"]
MODALITIES: tuple[Modality, ...] = ("rgb", "depth", "flow")
"""In their order on the channels: RGB first, so that pretrained weights keep their place."""


class Role(IntEnum):
    """Part of a latent frame in a window, in the order of the window."""

    LONG = 0
    """Memory of long ago: RGB at a low noise level, depth clean."""
    SHORT = 1
    """Memory of just before: clean."""
    PREDICT = 2
    """A frame that is being made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameLevels:
    """Noise levels and roles of the T latent frames of a window.

    Raises:
        UserError: shapes that do not fit each other, or a number of modalities other than 1 to 3.
    """

    sigma: Tensor
    """(B, T, M) float32 in [0, 1]: level of each frame and modality, modalities in the order of `MODALITIES`."""
    role: Tensor
    """(T,) int64, values of `Role`."""

    def __post_init__(self) -> None:
        if self.sigma.dim() != 3 or not 1 <= self.sigma.shape[2] <= len(MODALITIES):
            raise UserError(
                f"levels of shape {tuple(self.sigma.shape)}: give (batch, latent frames, modalities), with"
                f" 1 to {len(MODALITIES)} modalities"
            )
        if self.role.shape != self.sigma.shape[1:2]:
            raise UserError(
                f"{tuple(self.role.shape)} roles beside {self.sigma.shape[1]} latent frames: give one for each frame"
            )

    @property
    def rgb(self) -> Tensor:
        """(B, T) level of the RGB channels: what the transformer's timestep says."""
        return self.sigma[..., 0]

    @property
    def predicted(self) -> Tensor:
        """(T,) bool: frames that are being made, not memory."""
        return self.role == Role.PREDICT

    @staticmethod
    def join(parts: Sequence[FrameLevels]) -> FrameLevels:
        """Return the frames of several, one after the other."""
        return FrameLevels(
            sigma=torch.cat([part.sigma for part in parts], dim=1), role=torch.cat([part.role for part in parts])
        )
