"""Stable Diffusion 3 and 3.5: text-to-image."""

from __future__ import annotations

from torch import Tensor

from postgen.families.pipeline_denoiser import PipelineDenoiser


class StableDiffusion3Denoiser(PipelineDenoiser):
    """`Denoiser` of `StableDiffusion3Pipeline`."""

    per_row = ("pooled",)

    @property
    def multiples(self) -> tuple[int, int, int]:
        """What height and width must divide by; one frame."""
        side = self.pipe.vae_scale_factor * self.model.config.patch_size
        return side, side, 0

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one sample's latents."""
        space = self.pipe.vae_scale_factor
        return self.model.config.in_channels, height // space, width // space

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode texts: the encoding and the pooled one."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.model.device,
        )
        return embeds, pooled

    def forward(self, x: Tensor, timestep: Tensor, texts: dict[str, Tensor]) -> Tensor:
        """Call the network."""
        output: Tensor = self.transformers["transformer"](
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=texts["prompt"],
            pooled_projections=texts["pooled"],
            return_dict=False,
        )[0]
        return output

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into clips of one frame."""
        vae = self.pipe.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return self.to_pictures(vae.decode(latents, return_dict=False)[0])
