"""Encoded clips with tokenised captions, kept on the training device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postgen.training.tokenizers import tokenize
from postgen.world.scenes import Scene, render_in_batches

from .pool import to_model
from .whole_clip import WholeClip


@dataclass(slots=True)
class LatentPool:
    """Normalised latents (N,C,T,h,w) in float16, and token ids (N,V,L) int16 of V captions per clip."""

    latents: Tensor
    ids_NVL: Tensor

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw random clips, each with a random caption: float32 latents (batch,C,T,h,w) and ids (batch,L)."""
        device = self.latents.device
        index = torch.randint(len(self.latents), (batch,), generator=generator, device=device)
        wording = torch.randint(self.ids_NVL.shape[1], (batch,), generator=generator, device=device)
        return self.latents[index].float(), self.ids_NVL[index, wording]


def build_pool(
    scenes: list[Scene], vae: Any, tokenizer: Any, size: int, tokens: int, device: torch.device, *, bf16: bool
) -> LatentPool:
    """Render and encode scenes of one length; all scenes must have the same number of captions.

    Args:
        scenes: scenes of the clips.
        vae, tokenizer: components of the model.
        size: height and width of the clips in pixels.
        tokens: number of tokens per caption; longer captions are truncated.
        device: device of the pool.
        bf16: encode in bfloat16.
    """
    specs = [scene.spec for scene in scenes]
    whole = WholeClip(vae, folded=device.type == "cpu")
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    parts = []
    with torch.no_grad():
        label = f"encoding {len(specs)} clips of {specs[0].num_frames} frames, {size} px"
        for rgb, _ in render_in_batches(specs, size, device, mask=False, label=label):
            for part in rgb.split(64):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    z, _ = whole.encode(to_model(part))
                parts.append(((z - mean) / std).to(torch.float16))
    wordings = [text for scene in scenes for text in scene.captions]
    ids = tokenize(tokenizer, wordings, tokens).unflatten(0, (len(scenes), -1))
    return LatentPool(torch.cat(parts), ids.to(device))
