"""Noise level of each modality and role of each latent frame in a window."""

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
"""Order of the modalities on the channel axis. RGB comes first, so that pretrained weights keep their channels."""


class Role(IntEnum):
    """Role of a latent frame. The roles are in the order in which their frames stand in a window."""

    LONG = 0
    """Long memory: selected frames of the past, with RGB at a low noise level and clean depth."""
    SHORT = 1
    """Short memory: the clean frames just before the frames in flight."""
    PREDICT = 2
    """A frame in flight, which the model predicts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameLevels:
    """Noise levels and roles of the T latent frames of a window.

    Raises:
        UserError: the shapes do not match, or the number of modalities is not 1 to 3.
    """

    sigma: Tensor
    """(B, T, M) float32 in [0, 1]: noise level of each frame and modality, modalities in the order of `MODALITIES`."""
    role: Tensor
    """(T,) int64, values of `Role`."""

    def __post_init__(self) -> None:
        if self.sigma.dim() != 3 or not 1 <= self.sigma.shape[2] <= len(MODALITIES):
            raise UserError(
                f"levels have shape {tuple(self.sigma.shape)}: give (batch, latent frames, modalities), with"
                f" 1 to {len(MODALITIES)} modalities"
            )
        if self.role.shape != self.sigma.shape[1:2]:
            raise UserError(
                f"role has shape {tuple(self.role.shape)} for {self.sigma.shape[1]} latent frames: give one role per"
                " frame"
            )

    @property
    def rgb(self) -> Tensor:
        """(B, T) noise level of RGB, which is also the transformer's timestep."""
        return self.sigma[..., 0]

    @property
    def predicted(self) -> Tensor:
        """(T,) bool: True for frames in flight, False for memory frames."""
        return self.role == Role.PREDICT

    @staticmethod
    def join(parts: Sequence[FrameLevels]) -> FrameLevels:
        """Concatenate several windows along the frame axis."""
        return FrameLevels(
            sigma=torch.cat([part.sigma for part in parts], dim=1), role=torch.cat([part.role for part in parts])
        )
