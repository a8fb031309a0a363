"""Stable Diffusion 3 and 3.5: text-to-image."""

from __future__ import annotations

from torch import Tensor, nn

from postgen.families.pipeline_denoiser import PipelineDenoiser


class StableDiffusion3Denoiser(PipelineDenoiser):
    """`Denoiser` of `StableDiffusion3Pipeline`."""

    frame_axis = None
    per_row = ("pooled",)

    @property
    def multiples(self) -> tuple[int, int, int]:
        """What height and width must divide by; one frame."""
        side = self.pipe.vae_scale_factor * self.model.config.patch_size
        return side, side, 0

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
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

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network."""
        output: Tensor = network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=told["prompt"],
            pooled_projections=told["pooled"],
            return_dict=False,
        )[0]
        return output
