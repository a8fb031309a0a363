"""Estimate the depth of given frames with a trained model: RGB is clean, depth is sampled from noise.

Training includes windows with clean RGB and noisy depth, so the model can predict the depth of a video that it did not
generate. A given picture then needs no separate depth estimator.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from postgen.errors import UserError, check_number
from postgen.sampling.schedule import Schedule, linspace_schedule
from postgen.sampling.seeds import normal, seed_of

from .levels import FrameLevels, Role
from .model import WorldWeaverModel

_LONGEST = 64
"""Largest number of video frames of a latent frame."""


class SelfDepth:
    """A `DepthSource` that predicts depth with a trained model.

    Long clips are processed in consecutive windows. The newest frames of each window are the short memory of the next
    window, so that the scale stays the same. The result has the range of the model's pictures: [0, 1], near is large.

    Args:
        model: trained model with depth.
        prompt: prompt of the clip. Training includes the empty prompt.
        window: largest number of latent frames of a window. Use the number of frames in flight during training.
        memory: number of frames of the preceding window that the next window sees.
        steps: forward passes per window.
        shift: shift of the noise levels.
        seed: seed of the noise.

    Raises:
        UserError: a model without depth, or numbers out of range.
    """

    def __init__(
        self,
        model: WorldWeaverModel,
        *,
        prompt: str = "",
        window: int = 3,
        memory: int = 2,
        steps: int = 8,
        shift: float = 3.0,
        seed: int = 0,
    ) -> None:
        if "depth" not in model.modalities:
            raise UserError(f"the model has no depth, only {', '.join(model.modalities)}: give a model with depth")
        check_number("window", window, 1, whole=True)
        check_number("memory", memory, 0, whole=True)
        check_number("steps", steps, 2, whole=True)
        check_number("shift", shift, 1e-3)
        self.model, self.prompt, self.window, self.memory, self.seed = model, prompt, window, memory, seed
        self.schedule: Schedule = linspace_schedule(model.denoiser, steps, shift, torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Return the disparity of a clip, (T, H, W) float32 in [0, 1].

        Args:
            frames: (T, H, W, 3) in [0, 1]. The last frame is repeated up to a length that the autoencoder takes.

        Raises:
            UserError: a wrong shape, or a size that the model does not support.
        """
        if frames.dim() != 4 or frames.shape[3] != 3 or not len(frames):
            raise UserError(f"frames have shape {tuple(frames.shape)}: give (frames, height, width, 3)")
        clip = self._whole(frames.movedim(-1, 1))
        depth = self.latents(self.model.encode(clip[None]))
        return self.model.decode(depth, "depth")[0, : len(frames)].mean(1).to(frames.device)

    @torch.no_grad()
    def latents(self, rgb: Tensor) -> Tensor:
        """Return the scaled depth latents (B, C, T, h, w) for clean RGB latents of the same shape."""
        condition = self.model.denoiser.encode_prompt([self.prompt] * len(rgb), guidance=False)
        depth = torch.zeros_like(rgb)
        for number, start in enumerate(range(0, rgb.shape[2], self.window)):
            stop = min(start + self.window, rgb.shape[2])
            first = max(0, start - self.memory)
            noise = self._noise(rgb[:, :, first:stop], number)
            made = self._walk(rgb[:, :, first:stop], depth[:, :, first:start], noise, condition)
            depth[:, :, start:stop] = made
        return depth

    def _walk(self, rgb: Tensor, before: Tensor, noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Sample the depth of a window from noise, with memory frames of known depth in front."""
        known, count, channels = before.shape[2], rgb.shape[2], rgb.shape[1]
        role = torch.tensor([int(Role.SHORT)] * known + [int(Role.PREDICT)] * (count - known), device=rgb.device)
        x = noise[:, :channels, known:]
        # Flow is pure noise in every step, as in training windows without flow.
        more = noise[:, channels:]
        for now, after in pairwise(self.schedule.sigmas.tolist()):
            sigma = torch.zeros(len(rgb), count, len(self.model.modalities), device=rgb.device)
            sigma[:, known:, 1], sigma[..., 2:] = now, 1
            z = torch.cat([rgb, torch.cat([before, x], 2), more], 1)
            velocity = self.model.predict(z, FrameLevels(sigma=sigma, role=role), condition)
            x = x + (after - now) * velocity[:, channels : 2 * channels, known:]
        return x

    def _noise(self, rgb: Tensor, window: int) -> Tensor:
        """Return noise for all modalities but RGB in a window."""
        shape = ((len(self.model.modalities) - 1) * rgb.shape[1], *rgb.shape[2:])
        seeds = [seed_of(self.seed, "initial", row, window) for row in range(len(rgb))]
        return normal(shape, seeds, rgb.device)

    def _whole(self, clip: Tensor) -> Tensor:
        """Repeat the last frame until the model takes the number of frames (F, 3, H, W)."""
        more = next((more for more in range(_LONGEST) if self._takes(len(clip) + more, clip)), 0)
        return torch.cat([clip, clip[-1:].expand(more, -1, -1, -1)])

    def _takes(self, count: int, clip: Tensor) -> bool:
        try:
            self.model.latent_shape(count, *clip.shape[-2:])
        except UserError:
            return False
        return True
