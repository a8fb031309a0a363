"""A tiny WorldWeaver pipeline, and arguments of a small call."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from postgen.pipelines.worldweaver import WorldWeaverPipeline
from tests.tiny_wan import wan_components

SMALL: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 6,
    "causal_block_size": 2,
    "history_sizes": (3, 2),
    "output_type": "pt",
}
TEXT = "a red ball"


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny(aux: tuple[Any, ...] = ("depth",), **settings: Any) -> Any:
    pipe = quiet(WorldWeaverPipeline.from_pipe(diffusers.WanPipeline(**wan_components()), aux=aux, **settings))
    if aux:  # change the weights, so that the embedder has an effect and depth differs from RGB
        source = torch.Generator().manual_seed(1)
        for parameter in (pipe.level_embedder.outer.weight, pipe.transformer.proj_out.weight):
            parameter.data.add_(torch.randn(parameter.shape, generator=source), alpha=0.05)
    return pipe


def seeded(*seeds: int) -> Any:
    made = [torch.Generator().manual_seed(seed) for seed in seeds or (3,)]
    return made if len(made) > 1 else made[0]
