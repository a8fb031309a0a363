"""The denoiser of HunyuanVideo: text-to-video; the network receives its distilled guidance scale as an input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from postgen.families.pipeline_denoiser import PipelineDenoiser


class HunyuanVideoDenoiser(PipelineDenoiser):
    """`Denoiser` of `HunyuanVideoPipeline`.

    Args:
        pipe: the pipeline.
        max_sequence_length: number of tokens of a prompt, without the tokens of the prompt template.
        embedded_guidance: scale of the distilled guidance, an input of the network. The `guidance` of `predict` is
            classifier-free guidance in addition.
    """

    per_row = ("pooled", "mask")

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None, embedded_guidance: float = 6.0) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        self.embedded_guidance = embedded_guidance

    @property
    def multiples(self) -> tuple[int, int, int]:
        """Numbers of which height, width and frames - 1 must be multiples."""
        side = math.lcm(16, self.pipe.vae_scale_factor_spatial * self.model.config.patch_size)
        return side, side, self.pipe.vae_scale_factor_temporal

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape (C, T, H, W) of the latents of one sample."""
        space, frames = self.pipe.vae_scale_factor_spatial, (num_frames - 1) // self.pipe.vae_scale_factor_temporal
        return self.model.config.in_channels, frames + 1, height // space, width // space

    def start_sigmas(self, num_steps: int) -> Tensor:
        """Return the (num_steps,) noise levels that the pipeline passes to the scheduler, float64, before shifting."""
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts: returns token embeddings, the pooled CLIP embedding, and the mask of the tokens."""
        encoded: tuple[Tensor, ...] = self.pipe.encode_prompt(
            prompt=prompts, max_sequence_length=self.max_sequence_length, device=self.model.device
        )
        return encoded

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network; see `PipelineDenoiser.forward`."""
        guidance = torch.full((len(x),), self.embedded_guidance * 1000.0, dtype=x.dtype, device=x.device)
        output: Tensor = network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=told["prompt"],
            encoder_attention_mask=told["mask"].to(x.dtype),
            pooled_projections=told["pooled"],
            guidance=guidance,
            return_dict=False,
        )[0]
        return output
