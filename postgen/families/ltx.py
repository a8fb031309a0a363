"""The denoiser of LTX-Video: text-to-video."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from postgen.compat import pack_latents, unpack_latents
from postgen.families.by_frame import modulated_by_frame
from postgen.families.pipeline_denoiser import PipelineDenoiser


class LTXDenoiser(PipelineDenoiser):
    """`Denoiser` of `LTXPipeline`.

    Args:
        pipe: the pipeline.
        max_sequence_length: number of tokens of a prompt.
        frame_rate: frames per second of the video; the network's positions in time are in seconds.
    """

    default_length = 128
    per_row = ("mask",)

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None, frame_rate: float = 25.0) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        self.frame_rate = frame_rate

    @property
    def multiples(self) -> tuple[int, int, int]:
        """Numbers of which height, width and frames - 1 must be multiples."""
        return 32, 32, self.pipe.vae_temporal_compression_ratio

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape (C, T, H, W) of the latents of one sample."""
        space, time = self.pipe.vae_spatial_compression_ratio, self.pipe.vae_temporal_compression_ratio
        return self.model.config.in_channels, (num_frames - 1) // time + 1, height // space, width // space

    def start_sigmas(self, num_steps: int) -> Tensor:
        """Return the (num_steps,) noise levels that the pipeline passes to the scheduler, float64, before shifting."""
        return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts: returns token embeddings and the mask of the tokens."""
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.model.device,
        )
        return embeds, mask

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network, which takes packed tokens; see `PipelineDenoiser.forward`."""
        patches = self.pipe.transformer_spatial_patch_size, self.pipe.transformer_temporal_patch_size
        space, time = self.pipe.vae_spatial_compression_ratio, self.pipe.vae_temporal_compression_ratio
        _, _, frames, height, width = x.shape
        per_frame = timestep.dim() == 2
        with modulated_by_frame(network, frames // patches[1]) if per_frame else nullcontext():
            output: Tensor = network(
                hidden_states=pack_latents(self.pipe, x, *patches),
                encoder_hidden_states=told["prompt"],
                timestep=timestep,
                encoder_attention_mask=told["mask"],
                num_frames=frames,
                height=height,
                width=width,
                rope_interpolation_scale=(time / self.frame_rate, space, space),
                return_dict=False,
            )[0]
        return unpack_latents(self.pipe, output, frames, height, width, *patches)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents into clips, without the noise that the pipeline can add to latents before decoding."""
        vae = self.pipe.vae
        raw = self.denormalise(latents.to(vae.device)).to(vae.dtype)
        clean = raw.new_zeros(len(raw)) if vae.config.timestep_conditioning else None
        return self.to_clips(vae.decode(raw, clean, return_dict=False)[0])

    def normalise(self, raw: Tensor) -> Tensor:
        """Convert latents from the autoencoder to the normalised latents of the network."""
        scale, mean, std = self._statistics(raw)
        return (raw - mean) * scale / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Convert normalised latents to those that the autoencoder decodes: the inverse of `normalise`."""
        scale, mean, std = self._statistics(latents)
        return latents * std / scale + mean

    def _statistics(self, like: Tensor) -> tuple[float, Tensor, Tensor]:
        vae = self.pipe.vae
        mean, std = vae.latents_mean.to(like), vae.latents_std.to(like)
        return vae.config.scaling_factor, mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
