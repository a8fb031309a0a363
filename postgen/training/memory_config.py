"""Settings that reduce the memory of a training on the device, and their application to a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from postgen.families import blocks_of, denoiser_for
from postgen.settings import Part

from .base_quant import BaseQuant, check_base_quant
from .block_offload import BlockOffload, offload_in, spread
from .lora import AdapterConfig
from .parking import Parking, parking_of
from .policy_config import ModelConfig


@dataclass(kw_only=True)
class MemoryConfig(AdapterConfig, ModelConfig, Part):
    """Settings of a policy whose frozen weights are quantised, or in main memory.

    Raises:
        UserError: a value is outside its range, or two settings exclude each other.
    """

    part: ClassVar[str] = "memory"
    may_change: ClassVar[tuple[str, ...]] = ("offload_frozen", "offload_blocks")

    base_quant: BaseQuant = "none"
    """Format of the frozen linear layers of the denoiser under a LoRA: int8, fp8 or int4 (postgen's quantised layers),
    or nf4 (needs bitsandbytes). Needs a LoRA, and a model in diffusers' format."""

    offload_frozen: bool = False
    """Keep text encoders, image encoders and the autoencoder in main memory, and move each to the device only while it
    is used. Without effect on the CPU."""

    offload_blocks: int = 0
    """Number of blocks of the denoiser whose frozen weights stay in main memory; each is copied to the device before
    it runs. Two blocks are on the device at a time. Needs a LoRA and `gradient_checkpointing`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.offload_blocks >= 0, "offload_blocks", "at least 0")
        adapts = self.use_peft or self.lora_path is not None
        frozen = "with use_peft: false, because it changes frozen weights only"
        self.require(adapts or self.base_quant == "none", "base_quant", f"none {frozen}")
        self.require(adapts or not self.offload_blocks, "offload_blocks", f"0 {frozen}")
        if self.offload_blocks:
            self.require(
                self.base_quant != "nf4", "offload_blocks", "0 with base_quant: nf4 (int4, int8 and fp8 allow it)"
            )
            self.require(self.gradient_checkpointing, "gradient_checkpointing", "true with offload_blocks")
            for name in ("torch_compile", "fully_shard"):
                self.require(not getattr(self, name, False), name, "false with offload_blocks")
        check_base_quant(self.base_quant)


def place_frozen(pipe: Any, memory: MemoryConfig, device: torch.device) -> None:
    """Arrange that frozen weights stay in main memory as configured, before the pipeline is moved to its device.

    Placements of an earlier training with the same pipeline are undone first.

    Args:
        pipe: the pipeline, whose weights are all frozen here.
        memory: the settings.
        device: device of the training.

    Raises:
        UserError: the network has fewer blocks, or its weights cannot be moved.
    """
    if not (memory.offload_frozen or memory.offload_blocks):
        return
    networks = denoiser_for(pipe).transformers
    if memory.offload_frozen:
        others = [
            part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name not in networks
        ]
        for part in others:
            if (earlier := parking_of(part)) is not None:
                earlier.remove()
            part.requires_grad_(False).eval()
        Parking(others, networks.values(), device)
    for network in networks.values() if memory.offload_blocks else ():
        if (before := offload_in(network)) is not None:
            before.remove()
        network.requires_grad_(False)
        blocks = [block.module for block in blocks_of(network)]
        BlockOffload(network, spread(blocks, memory.offload_blocks), device)
