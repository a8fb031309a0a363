"""CogVideoX: text-to-video, 1.0 and 1.5. Its DDIM tells the network a v-prediction and ends at alpha-bar 1."""

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
    """`Denoiser` of `CogVideoXPipeline`. Latents are (B, T, C, H, W), as the network has them."""

    frame_axis = 1
    default_length = 226

    def alpha_bar_scheduler(self) -> Any:
        """Return the pipeline's own scheduler: its alpha-bars are shifted in a way that no other knows."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        if not hasattr(scheduler, "final_alpha_cumprod"):
            raise UserError(f"{type(scheduler).__name__} has no alpha-bars: use CogVideoXDDIMScheduler")
        return scheduler

    @property
    def multiples(self) -> tuple[int, int, int]:
        """What height, width and frames - 1 must divide by: the autoencoder decodes pairs, and a single one first."""
        side = math.lcm(8, self.pipe.vae_scale_factor_spatial * self.model.config.patch_size)
        return side, side, 2 * self.pipe.vae_scale_factor_temporal

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one sample's latents; for CogVideoX 1.5 as its pipeline pads them."""
        time, space = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        frames = (num_frames - 1) // time + 1
        return frames + self._padding(frames), self.model.config.in_channels, height // space, width // space

    def _padding(self, frames: int) -> int:
        """Latent frames that stand before those of a clip, so that patches of several frames come out even."""
        return -frames % (self.model.config.patch_size_t or 1)

    def encode_video(self, clips: Tensor, *, sample: bool = False, generator: Any = None) -> Tensor:
        """Turn clips into latents, padded with the first one as the pipeline for first frames does. See `Denoiser`."""
        latents = super().encode_video(clips, sample=sample, generator=generator)
        return torch.cat([latents[:, :1]] * self._padding(latents.shape[1]) + [latents], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into clips, without those that pad: those of a clip are odd in number, as `multiples` says."""
        padded = self._padding(1) and latents.shape[1] % 2 == 0
        return super().decode(latents[:, 1:] if padded else latents)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode texts."""
        positive, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.model.device,
        )
        return (positive,)

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network."""
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
        """Turn what the autoencoder gave into what the network sees."""
        scale: float = self.pipe.vae_scaling_factor_image
        return raw.transpose(1, 2) * scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`."""
        scale: float = self.pipe.vae_scaling_factor_image
        return 1 / scale * latents.transpose(1, 2)
