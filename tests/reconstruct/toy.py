"""A small user of the engine: it replaces one feed-forward layer of each block by a product of two matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from postgen.families import blocks_of, denoiser_for
from postgen.reconstruct import ReconstructConfig, ReconstructTask, Records, RecordsConfig, block_task, collect
from tests.families.tiny_pipelines import drawn, tiny_pipeline
from tests.tiny_wan import wan_components

PROMPTS = ["a red ball", "a blue cube falls", "two green cones", "a ball rolls left", "a grey day"]
LAYERS = {"Wan": "ffn.net.0.proj", "CogVideoX": "ff.net.0.proj"}
RANK = 4


class LowRank(nn.Module):
    """The best low-rank approximation of a linear layer, with its bias."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        root = values[:rank].sqrt()
        self.up, self.down = nn.Parameter(left[:, :rank] * root), nn.Parameter(root[:, None] * right[:rank])
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.dropout = nn.Dropout(0.02)  # makes results depend on RNG states

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x @ self.down.T) @ self.up.T + self.bias


def low_rank(block: nn.Module, name: str, rank: int = RANK) -> nn.Module:
    """Replace a layer of a block by a `LowRank`, whose weights alone are trained."""
    block.requires_grad_(False)
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, LowRank(block.get_submodule(name), rank))
    return block


def tasks(transformer: nn.Module, name: str, rank: int = RANK) -> list[ReconstructTask]:
    """Return a task for each block."""
    return [
        block_task(
            block,
            lambda copy: low_rank(copy, LAYERS[name], rank),
            is_new=lambda parameter: parameter.endswith((".up", ".down")),
            settings={"rank": rank},
        )
        for block in blocks_of(transformer)
    ]


def pipeline(name: str) -> tuple[Any, dict[str, int]]:
    if name == "Wan":
        return drawn(WanPipeline(**wan_components())), {"num_frames": 9, "height": 32, "width": 48}
    pipe, size = tiny_pipeline(name)
    return pipe, {**size, "height": 32}


def records_of(pipe: Any, size: dict[str, int], *modules: str, where: str | Path = "cpu", **values: Any) -> Records:
    """Record the given modules or all blocks, for 4 prompts and a held-out one, at 2 of 4 levels each."""
    settings = {"num_inference_steps": 4, "levels_per_prompt": 2, "batch_size": 2, **size, **values}
    names = modules or tuple(block.name for block in blocks_of(pipe.transformer))
    return collect(
        denoiser_for(pipe), names, PROMPTS, RecordsConfig(**settings), where=where, progress=False
    )  # fmt: skip


def settings(folder: Path, **values: Any) -> ReconstructConfig:
    kept = {"max_steps": 12, "learning_rate": 1e-3, "learning_rate_new": 1e-2, "warmup_steps": 2, "ema_decay": 0.9}
    kept |= {"save_steps": 5, "logging_steps": 4, "device": "cpu", "disable_tqdm": True}
    return ReconstructConfig(output_dir=str(folder), **{**kept, "gradient_accumulation_steps": 2, **values})
