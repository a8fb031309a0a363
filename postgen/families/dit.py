"""DiT: pictures of a class (arXiv:2212.09748)."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, shown
from postgen.families.fixed_length import FixedLength
from postgen.families.learned_variance import LearnedVarianceDenoiser
from postgen.families.pictures import PictureDenoiser


class DiTDenoiser(FixedLength, PictureDenoiser, LearnedVarianceDenoiser):
    """`Denoiser` of `DiTPipeline`. A prompt is a class: one of `pipe.labels`, or its number; the empty one is none.

    In train mode the network forgets some classes, and every block of diffusers draws by itself which: that is
    switched off, in the network that is here. Who trains without a class now and then replaces `prompt` by `negative`.

    Raises:
        UserError: as `PipelineDenoiser`, or another number of tokens than 1.
    """

    default_length = 1

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        for block in self.model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def space(self) -> int:
        """Pixels a side in a latent."""
        return int(2 ** (len(self.pipe.vae.config.block_out_channels) - 1))

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one sample's latents.

        Raises:
            UserError: the picture is no square; the network makes nothing else.
        """
        if height != width:
            raise UserError(f"{type(self.pipe).__name__} makes squares: height and width are {height} and {width}")
        return super().shape_of(num_frames, height, width)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Return the numbers of classes, (B,)."""
        return (torch.tensor([self.class_of(prompt) for prompt in prompts], device=self.model.device),)

    def class_of(self, prompt: str) -> int:
        """Return the number of a class; that of none where the text is empty.

        Raises:
            UserError: no label and no number of a class.
        """
        labels: dict[str, int] = self.pipe.labels
        known: int = self.model.config.num_embeds_ada_norm
        text = prompt.strip()
        if not text:
            return known
        if text in labels:
            return labels[text]
        if text.isdecimal() and int(text) < known:
            return int(text)
        near = difflib.get_close_matches(text, labels, 1)
        raise UserError(
            f"{shown(prompt)} is no class of this {type(self.pipe).__name__}: give a number from 0 to {known - 1}"
            f"{' or one of its labels' if labels else ''}{f', perhaps {near[0]!r}' if near else ''}"
        )

    def forward(self, network: nn.Module, x: Tensor, timestep: Tensor, told: dict[str, Tensor]) -> Tensor:
        """Call the network; all its channels."""
        output: Tensor = network(x, timestep=timestep, class_labels=told["prompt"], return_dict=False)[0]
        return output
