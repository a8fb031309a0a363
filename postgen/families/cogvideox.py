"""CogVideoX 1.0 and 1.5, text-to-video. Its DDIM scheduler uses v_prediction and ends at alpha-bar 1."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from postgen.compat import rotary_table
from postgen.errors import UserError
from postgen.families.alpha_bar import AlphaBarDenoiser


class CogVideoXDenoiser(AlphaBarDenoiser):
    """`Denoiser` of `CogVideoXPipeline`. Latents are (B, T, C, H, W), as the network takes them."""

    frame_axis = 1
    default_length = 226

    def alpha_bar_scheduler(self) -> Any:
        """Return a copy of the pipeline's scheduler, because no other scheduler shifts the alpha-bars in this way.

        Raises:
            UserError: the scheduler has no alpha-bars.
        """
        scheduler = copy.deepcopy(self.pipe.scheduler)
        if not hasattr(scheduler, "final_alpha_cumprod"):
            raise UserError(f"{type(scheduler).__name__} has no alpha-bars: use CogVideoXDDIMScheduler")
        return scheduler

    @property
    def multiples(self) -> tuple[int, int, int]:
        """Numbers of which height, width and frames - 1 must be multiples.

        The autoencoder decodes the first latent frame alone and the others in pairs.
        """
        side = math.lcm(8, self.pipe.vae_scale_factor_spatial * self.model.config.patch_size)
        return side, side, 2 * self.pipe.vae_scale_factor_temporal

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one sample's latents; for CogVideoX 1.5 with the padding of its pipeline."""
        time, space = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        frames = (num_frames - 1) // time + 1
        return frames + self._padding(frames), self.model.config.in_channels, height // space, width // space

    def _padding(self, frames: int) -> int:
        """Return how many latent frames pad the beginning of a clip to a whole number of patches in time."""
        return -frames % (self.model.config.patch_size_t or 1)

    def from_raw(self, raw: Tensor) -> Tensor:
        """Convert raw latents of the autoencoder to latents of the network.

        The padding repeats the first latent frame, as the image-to-video pipeline does.
        """
        latents = super().from_raw(raw)
        return torch.cat([latents[:, :1]] * self._padding(latents.shape[1]) + [latents], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents into clips, without the padding.

        `multiples` makes the number of latent frames of a clip odd, so an even number has a padding frame.
        """
        padded = self._padding(1) and latents.shape[1] % 2 == 0
        return super().decode(latents[:, 1:] if padded else latents)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts as (B, L, C), L = `max_sequence_length`."""
        positive, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.model.device,
        )
        return (positive,)

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network; see `PipelineDenoiser.forward`."""
        output: Tensor = network(
            hidden_states=x,
            encoder_hidden_states=told["prompt"],
            timestep=timestep,
            image_rotary_emb=self._rotary(x),
            return_dict=False,
        )[0]
        return output

    def _rotary(self, x: Tensor) -> Any:
        if not self.model.config.use_rotary_positional_embeddings:
            return None
        space = self.pipe.vae_scale_factor_spatial
        return rotary_table(self.pipe, x.shape[3] * space, x.shape[4] * space, x.shape[1], x.device)

    def normalise(self, raw: Tensor) -> Tensor:
        """Convert latents of the autoencoder, (B, C, T, H, W), into latents of the network, (B, T, C, H, W)."""
        scale: float = self.pipe.vae_scaling_factor_image
        return raw.transpose(1, 2) * scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        scale: float = self.pipe.vae_scaling_factor_image
        return 1 / scale * latents.transpose(1, 2)
