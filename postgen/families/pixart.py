"""PixArt-Sigma: text-to-image (arXiv:2403.04692)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.learned_variance import LearnedVarianceDenoiser
from postgen.families.pictures import PictureDenoiser


class PixArtSigmaDenoiser(PictureDenoiser, LearnedVarianceDenoiser):
    """`Denoiser` of `PixArtSigmaPipeline`, without the pipeline's resolution binning: it makes the size given.

    Raises:
        UserError: see `PipelineDenoiser`; or the network takes the picture size as input (PixArt-Alpha at 1024).
    """

    default_length = 300
    per_row = ("mask",)

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        if self.model.use_additional_conditions:
            raise UserError(
                "a PixArt network that takes the picture size as input (Alpha at 1024) has no denoiser: use Sigma"
            )

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Encode prompts, cleaned as in the pipeline's default call: the encoding of T5 and its mask."""
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.model.device,
            clean_caption=True,
            max_sequence_length=self.max_sequence_length,
        )
        return embeds, mask

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network and return all its output channels; see `PipelineDenoiser.forward`."""
        output: Tensor = network(
            x,
            encoder_hidden_states=told["prompt"],
            encoder_attention_mask=told["mask"],
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output
