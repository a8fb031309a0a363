"""Loss of windows: weighted flow matching for each modality on the frames in flight. Memory frames have no loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from postgen.families import Condition, Denoiser
from postgen.training.transfer import to_device

from .embedding import LevelEmbedder
from .levels import MODALITIES, FrameLevels
from .model import WorldWeaverModel


def window_loss(
    prediction: Tensor, target: Tensor, counted: Tensor, weights: Sequence[float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss sum_m lambda_m mean |v_m - v*_m|^2 and its means by modality.

    A modality that counts in no frame adds 0.

    Args:
        prediction: (B, M * C, T, h, w); only the last P of the T frames are used.
        target: (B, M * C, P, h, w) velocities.
        counted: (B, P, M) bool.
        weights: lambda, at least M values.
    """
    modalities, frames = counted.shape[2], target.shape[2]
    difference = prediction[:, :, -frames:].float() - target
    error = difference.square().unflatten(1, (modalities, -1)).mean((2, 4, 5))  # (B, M, P)
    counts = counted.movedim(2, 1)
    means = torch.where(counts, error, 0).sum((0, 2)) / counts.sum((0, 2)).clamp_min(1)
    loss = (means * to_device(torch.tensor(weights[:modalities], dtype=means.dtype), means.device)).sum()
    return loss, {f"{name}_loss": mean.detach() for name, mean in zip(MODALITIES, means, strict=False)}


class WindowLoss(nn.Module):
    """A widened transformer with its level embedder; `forward` is one forward pass with loss.

    Args:
        denoiser: of a pipeline with one transformer.
        embedder: the level embedder.
        weights: loss weights of RGB, depth and flow.
    """

    def __init__(self, denoiser: Denoiser, embedder: LevelEmbedder, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = list(weights)
        # In a dict, so that it is not a submodule: its parts are registered below, under the names of an adapter.
        self._model = {"model": WorldWeaverModel(denoiser, embedder, mean_level=not denoiser.per_frame)}
        self.transformer: nn.Module = self._model["model"].transformer
        self.level_embedder = embedder

    @property
    def model(self) -> WorldWeaverModel:
        """The model for rollouts."""
        return self._model["model"]

    def forward(
        self,
        z: Tensor,
        levels: FrameLevels,
        condition: Condition,
        target: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms; without a target return the prediction and an empty dictionary.

        Args:
            z: (B, M * C, T, h, w) noisy latents.
            levels: noise levels and roles of the T frames.
            condition: condition of the B rows.
            target, counted: as in `window_loss`.
        """
        prediction = self.model.predict(z, levels, condition)
        if target is None or counted is None:
            return prediction, {}
        return window_loss(prediction, target, counted, self.weights)
