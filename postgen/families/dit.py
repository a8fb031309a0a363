"""DiT: class-to-image (arXiv:2212.09748)."""

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
    """`Denoiser` of `DiTPipeline`.

    A prompt is a class: a label of `pipe.labels`, or the number of a class. An empty prompt means no class.

    In train mode, the network of diffusers drops some classes, and every block draws its own random choice. The
    denoiser switches this dropout off in the network of the pipeline. To train without a class for some samples, use
    `negative` in place of `prompt` for them.

    Raises:
        UserError: `PipelineDenoiser` refuses the pipeline, or `max_sequence_length` is not 1.
    """

    default_length = 1

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe, max_sequence_length=max_sequence_length)
        for block in self.model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def space(self) -> int:
        """Pixels per side in a latent pixel."""
        return int(2 ** (len(self.pipe.vae.config.block_out_channels) - 1))

    def shape_of(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample.

        Raises:
            UserError: the picture is not square; the network makes only square pictures.
        """
        if height != width:
            raise UserError(
                f"{type(self.pipe).__name__} makes squares: height and width are {height} and {width},"
                " they must be equal"
            )
        return super().shape_of(num_frames, height, width)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Return the class numbers of B prompts, (B,)."""
        return (torch.tensor([self.class_of(prompt) for prompt in prompts], device=self.model.device),)

    def class_of(self, prompt: str) -> int:
        """Return the class number of a prompt; for an empty prompt, the number that means no class.

        Raises:
            UserError: the prompt is neither a label nor a class number.
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
        """Return the output of the network with all its channels; see `PipelineDenoiser.forward`."""
        output: Tensor = network(x, timestep=timestep, class_labels=told["prompt"], return_dict=False)[0]
        return output
