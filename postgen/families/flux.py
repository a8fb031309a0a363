"""FLUX.1, text-to-image. The network of FLUX.1-dev takes a distilled guidance scale as an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postgen.compat import pack_latents, token_places, unpack_latents
from postgen.families.pipeline_denoiser import PipelineDenoiser


class FluxDenoiser(PipelineDenoiser):
    """`Denoiser` of `FluxPipeline`.

    Args:
        pipe: the pipeline.
        max_sequence_length: number of tokens of an encoded prompt.
        embedded_guidance: distilled guidance scale. The `guidance` of `predict` is classifier-free guidance in
            addition.
    """

    frame_axis = None
    default_length = 512
    per_row = ("pooled",)

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None, embedded_guidance: float = 3.5) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        self.embedded_guidance = embedded_guidance

    @property
    def multiples(self) -> tuple[int, int, int]:
        """Numbers of which height and width must be multiples; 0, because a picture has one frame."""
        return 2 * self.pipe.vae_scale_factor, 2 * self.pipe.vae_scale_factor, 0

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample."""
        space = self.pipe.vae_scale_factor
        return self.model.config.in_channels // 4, height // space, width // space

    def tokens(self, shape: Sequence[int]) -> int:
        """Return the number of tokens; a token holds 2 x 2 latent pixels."""
        return int(shape[-1]) // 2 * (int(shape[-2]) // 2)

    def start_sigmas(self, num_steps: int) -> Tensor | None:
        """Return the noise levels that the pipeline passes to the scheduler; None if the scheduler has its own."""
        if self.pipe.scheduler.config.get("use_flow_sigmas", False):
            return None
        return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts: the encoding of T5 and the pooled encoding of CLIP."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, prompt_2=None, max_sequence_length=self.max_sequence_length, device=self.model.device
        )
        return embeds, pooled

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network, which takes packed tokens and timesteps in [0, 1]; see `PipelineDenoiser.forward`."""
        batch, channels, height, width = x.shape
        distilled = self.model.config.guidance_embeds
        output: Tensor = network(
            hidden_states=pack_latents(self.pipe, x, batch, channels, height, width),
            timestep=timestep / 1000,
            guidance=x.new_full((batch,), self.embedded_guidance, dtype=torch.float32) if distilled else None,
            pooled_projections=told["pooled"],
            encoder_hidden_states=told["prompt"],
            txt_ids=x.new_zeros(told["prompt"].shape[1], 3),
            img_ids=token_places(self.pipe, batch, height // 2, width // 2, x),
            return_dict=False,
        )[0]
        space = self.pipe.vae_scale_factor
        return unpack_latents(self.pipe, output, height * space, width * space, space)
