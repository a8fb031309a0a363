"""Stable Diffusion 3 and 3.5: text-to-image."""

from __future__ import annotations

from torch import Tensor, nn

from postgen.families.pictures import PictureDenoiser


class StableDiffusion3Denoiser(PictureDenoiser):
    """`Denoiser` of `StableDiffusion3Pipeline`."""

    per_row = ("pooled",)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts: the encoding and the pooled encoding."""
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
        """Call the network; see `PipelineDenoiser.forward`."""
        output: Tensor = network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=told["prompt"],
            pooled_projections=told["pooled"],
            return_dict=False,
        )[0]
        return output
