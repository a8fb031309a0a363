"""Stable Diffusion 1, 2 and XL: text-to-image with a UNet."""

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
        UserError: see `PipelineDenoiser`; or the UNet takes the guidance scale as input (LCM), or
            `max_sequence_length` is not CLIP's 77 tokens.
    """

    components = ("unet",)
    default_length = 77

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise UserError(
                "a UNet that takes the guidance scale as input (LCM) has no denoiser: use the model it was distilled"
                " from"
            )
        if pipe.vae.config.force_upcast and pipe.vae.dtype == torch.float16:
            pipe.vae.float()  # this autoencoder overflows in float16

    @property
    def multiples(self) -> tuple[int, int, int]:
        """Numbers of which height and width must be multiples, so that every level of the UNet has whole latents.

        The last number is 0, because a picture has one frame.
        """
        side = self.pipe.vae_scale_factor * 2 ** (len(self.model.config.block_out_channels) - 1)
        return side, side, 0

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts: the encoding of CLIP."""
        embeds, _ = self.pipe.encode_prompt(
            prompts, self.model.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return (embeds,)

    def added(self, x: Tensor, told: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the argument `added_cond_kwargs` of the UNet."""
        return None

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network; see `PipelineDenoiser.forward`."""
        output: Tensor = network(
            x,
            timestep,
            encoder_hidden_states=told["prompt"],
            added_cond_kwargs=self.added(x, told),
            return_dict=False,
        )[0]
        return output


class StableDiffusionXLDenoiser(StableDiffusionDenoiser):
    """`Denoiser` of `StableDiffusionXLPipeline`.

    An empty negative prompt is encoded as text. The pipeline may use zeros instead; training and rollouts here agree
    with each other.
    """

    per_row = ("pooled",)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts: the encoding and the pooled encoding."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, device=self.model.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return embeds, pooled

    def added(self, x: Tensor, told: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the pooled encoding of the text and the size ids."""
        height, width = (side * self.pipe.vae_scale_factor for side in x.shape[-2:])
        sizes = size_ids(self.pipe, (height, width), x.dtype, self._projection(told["pooled"]))
        return {"text_embeds": told["pooled"], "time_ids": sizes.to(x.device).repeat(len(x), 1)}

    def _projection(self, pooled: Tensor) -> int:
        second = self.pipe.text_encoder_2
        return int(pooled.shape[-1] if second is None else second.config.projection_dim)
