"""Stable Diffusion 1 and 2, and XL: text-to-image with a UNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from postgen.compat import size_ids
from postgen.errors import UserError
from postgen.families.alpha_bar import AlphaBarDenoiser
from postgen.families.fixed_length import FixedLength
from postgen.families.pictures import PictureDenoiser


class StableDiffusionDenoiser(FixedLength, PictureDenoiser, AlphaBarDenoiser):
    """`Denoiser` of `StableDiffusionPipeline`.

    Raises:
        UserError: as `PipelineDenoiser`, a UNet that is told its guidance (LCM), or another number of tokens than
            CLIP's 77.
    """

    components = ("unet",)
    default_length = 77

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise UserError("a UNet that is told its guidance (LCM) has no denoiser: use the model it was made from")
        if pipe.vae.config.force_upcast and pipe.vae.dtype == torch.float16:
            pipe.vae.float()  # it overflows

    @property
    def multiples(self) -> tuple[int, int, int]:
        """What height and width must divide by: whole latents on every level of the UNet; one frame."""
        side = self.pipe.vae_scale_factor * 2 ** (len(self.model.config.block_out_channels) - 1)
        return side, side, 0

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode texts."""
        embeds, _ = self.pipe.encode_prompt(
            prompts, self.model.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return (embeds,)

    def added(self, x: Tensor, told: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Return what the UNet is told besides the text."""
        return None

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network."""
        output: Tensor = network(
            x,
            timestep,
            encoder_hidden_states=told["prompt"],
            added_cond_kwargs=self.added(x, told),
            return_dict=False,
        )[0]
        return output


class StableDiffusionXLDenoiser(StableDiffusionDenoiser):
    """`Denoiser` of `StableDiffusionXLPipeline`. The empty text is encoded, not replaced by zeros, where a negative
    prompt is wanted: training passes and rollouts agree, which is what matters."""

    per_row = ("pooled",)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode texts: the encoding and the pooled one."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, device=self.model.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return embeds, pooled

    def added(self, x: Tensor, told: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the pooled text and the sizes."""
        height, width = (side * self.pipe.vae_scale_factor for side in x.shape[-2:])
        sizes = size_ids(self.pipe, (height, width), x.dtype, self._projection(told["pooled"]))
        return {"text_embeds": told["pooled"], "time_ids": sizes.to(x.device).repeat(len(x), 1)}

    def _projection(self, pooled: Tensor) -> int:
        second = self.pipe.text_encoder_2
        return int(pooled.shape[-1] if second is None else second.config.projection_dim)
