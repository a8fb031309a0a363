"""Depth of given frames from a trained model itself: RGB clean, depth from noise.

Training shows the model windows whose RGB has no noise and whose depth has some, so it can be asked for the depth of a
video that it did not make, and a picture that a user gives needs no estimator.
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
"""Frames of a latent at most."""


class SelfDepth:
    """A `DepthSource`: what a model says that the depth of a clip is.

    Long clips are made in windows, one after the other; the newest frames of the one before stand in front as short
    memory, so that the scale goes on. What is returned has the range of the model's pictures, [0, 1], near is large.

    Args:
        model: trained, with depth.
        prompt: what the clip shows; the empty text is one that training knows.
        window: latent frames of a window at most, those that training had in flight.
        memory: frames of the window before that the next one sees.
        steps: calls of the network for each window.
        shift: of the noise levels.
        seed: of the noise.

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
            raise UserError(f"a model of {', '.join(model.modalities)} says nothing of depth: give one with depth")
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
            frames: (T, H, W, 3) in [0, 1]; of a length that the autoencoder does not take, the last is repeated.

        Raises:
            UserError: another shape, or a size that the model cannot make.
        """
        if frames.dim() != 4 or frames.shape[3] != 3 or not len(frames):
            raise UserError(f"frames of shape {tuple(frames.shape)}: give (frames, height, width, 3)")
        clip = self._whole(frames.movedim(-1, 1))
        depth = self.latents(self.model.encode(clip[None]))
        return self.model.decode(depth, "depth")[0, : len(frames)].mean(1).to(frames.device)

    @torch.no_grad()
    def latents(self, rgb: Tensor) -> Tensor:
        """Return the depth latents (B, C, T, h, w), scaled as the model's are, of clean RGB latents of that shape."""
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
        """Take the depth of a window from noise to clean, behind the frames of memory, whose depth is known."""
        known, count, channels = before.shape[2], rgb.shape[2], rgb.shape[1]
        role = torch.tensor([int(Role.SHORT)] * known + [int(Role.PREDICT)] * (count - known), device=rgb.device)
        x = noise[:, :channels, known:]
        # Flow is not asked for: it is noise throughout, as in windows without it.
        more = noise[:, channels:]
        for now, after in pairwise(self.schedule.sigmas.tolist()):
            sigma = torch.zeros(len(rgb), count, len(self.model.modalities), device=rgb.device)
            sigma[:, known:, 1], sigma[..., 2:] = now, 1
            z = torch.cat([rgb, torch.cat([before, x], 2), more], 1)
            velocity = self.model.predict(z, FrameLevels(sigma=sigma, role=role), condition)
            x = x + (after - now) * velocity[:, channels : 2 * channels, known:]
        return x

    def _noise(self, rgb: Tensor, window: int) -> Tensor:
        """Return noise for all that is not RGB in a window."""
        shape = ((len(self.model.modalities) - 1) * rgb.shape[1], *rgb.shape[2:])
        seeds = [seed_of(self.seed, "initial", row, window) for row in range(len(rgb))]
        return normal(shape, seeds, rgb.device)

    def _whole(self, clip: Tensor) -> Tensor:
        """Return frames (F, 3, H, W) in a number that the model takes, the last one repeated."""
        more = next((more for more in range(_LONGEST) if self._takes(len(clip) + more, clip)), 0)
        return torch.cat([clip, clip[-1:].expand(more, -1, -1, -1)])

    def _takes(self, count: int, clip: Tensor) -> bool:
        try:
            self.model.latent_shape(count, *clip.shape[-2:])
        except UserError:
            return False
        return True
