"""The embedded model makes the same clip with fused operations."""

from __future__ import annotations

import math

import torch

import postgen
from postgen.fused import fused_for_call


def test_fused_psnr() -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(postgen.embedded_model())
    pipe.set_progress_bar_config(disable=True)

    def clip() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"height": 48, "width": 48, "num_frames": 5, "num_inference_steps": 2}
        frames: torch.Tensor = pipe("a red ball rolls left", **size, generator=generator, output_type="pt").frames
        return frames.double()

    stock = clip()
    with fused_for_call(pipe, True):
        error = (clip() - stock).square().mean().item()
    assert error == 0 or -10 * math.log10(error) >= 50
