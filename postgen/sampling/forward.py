"""The forward process: clean latents with noise, and what the network should predict for them."""

from __future__ import annotations

from torch import Tensor

from postgen.families import PredictionType

from .schedule import Levels
from .transition import wide


def noised(clean: Tensor, noise: Tensor, levels: Levels) -> Tensor:
    """Return clean latents mixed with noise at the given noise levels, (B, ...)."""
    (a, b), _ = levels.mix()
    return wide(a, clean, levels.frame_axis) * clean + wide(b, noise, levels.frame_axis) * noise


def wanted_of(clean: Tensor, noise: Tensor, levels: Levels, kind: PredictionType) -> Tensor:
    """Return the training target for noised latents, (B, ...).

    Args:
        clean: clean latents, (B, ...).
        noise: the noise that was added, (B, ...).
        levels: noise levels, (B,), or (B, T) for T latent frames.
        kind: prediction type of the model.
    """
    if kind == "flow":
        return noise - clean
    if kind == "v_prediction":
        (a, b), _ = levels.mix()
        return wide(a, noise, levels.frame_axis) * noise - wide(b, clean, levels.frame_axis) * clean
    return noise if kind == "epsilon" else clean
