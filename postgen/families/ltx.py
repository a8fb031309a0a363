"""LTX-Video: text-to-video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postgen.families.pipeline_denoiser import PipelineDenoiser


class LTXDenoiser(PipelineDenoiser):
    """`Denoiser` of `LTXPipeline`.

    Args:
        pipe: the pipeline.
        max_sequence_length: tokens of a prompt.
        frame_rate: frames per second that the positions in time are told in.
    """

    default_length = 128
    per_row = ("mask",)

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None, frame_rate: float = 25.0) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        self.frame_rate = frame_rate

    @property
    def multiples(self) -> tuple[int, int, int]:
        """What height, width and frames - 1 must divide by."""
        return 32, 32, self.pipe.vae_temporal_compression_ratio

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one sample's latents."""
        space, time = self.pipe.vae_spatial_compression_ratio, self.pipe.vae_temporal_compression_ratio
        return self.model.config.in_channels, (num_frames - 1) // time + 1, height // space, width // space

    def start_sigmas(self, num_steps: int) -> Tensor:
        """Return the levels that the scheduler shifts."""
        return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode texts: the encoding and the mask of the tokens."""
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.model.device,
        )
        return embeds, mask

    def forward(self, x: Tensor, timestep: Tensor, texts: dict[str, Tensor]) -> Tensor:
        """Call the network, which takes tokens."""
        patches = self.pipe.transformer_spatial_patch_size, self.pipe.transformer_temporal_patch_size
        space, time = self.pipe.vae_spatial_compression_ratio, self.pipe.vae_temporal_compression_ratio
        _, _, frames, height, width = x.shape
        output: Tensor = self.transformers["transformer"](
            hidden_states=self.pipe._pack_latents(x, *patches),
            encoder_hidden_states=texts["prompt"],
            timestep=timestep,
            encoder_attention_mask=texts["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(time / self.frame_rate, space, space),
            return_dict=False,
        )[0]
        unpacked: Tensor = self.pipe._unpack_latents(output, frames, height, width, *patches)
        return unpacked

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into clips, without the noise that the pipeline can add before."""
        vae = self.pipe.vae
        latents = latents.to(vae.device)
        latents = self.pipe._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        ).to(vae.dtype)
        clean = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        return self.to_clips(vae.decode(latents, clean, return_dict=False)[0])
