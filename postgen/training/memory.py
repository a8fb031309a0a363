"""Estimate of the device memory of a training step, for the configured settings and for settings that save memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from postgen.compat import recomputes
from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.activations import training_memory
from postgen.families.call_extras import Size
from postgen.families.calls import call_arguments, registered_name

from .base_quant import BITS, BaseQuant
from .block_offload import offload_in
from .memory_config import MemoryConfig
from .optimizers import state_bytes
from .updates import Optim, UpdatesConfig

GIGA = 2**30
CARDS = (8, 12, 16, 24)
"""Memory of the cards in the table, in GiB."""
RESERVE = GIGA
"""Bytes of a card that a training cannot use: the CUDA context, workspaces of kernels, gaps between tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """Settings that determine the memory of a step; the fields of `MemoryConfig` and `UpdatesConfig`."""

    gradient_checkpointing: bool = False
    offload_frozen: bool = False
    optim: Optim = "adamw"
    base_quant: BaseQuant = "none"
    offload_blocks: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Sizes of a training, in bytes unless said otherwise."""

    now: Saving
    """The configured settings."""
    networks: int
    """Number of trained networks, 2 with experts."""
    network: int
    """Weights and buffers of the trained networks, offloaded or not."""
    linear: int
    """Weights of exact frozen linear layers in blocks, which `base_quant` can quantise."""
    linear_values: int
    """Number of these weights."""
    blocks: tuple[int, ...]
    """Frozen weights of each block of one network."""
    others: Mapping[str, int]
    """Other components of the pipeline."""
    unused: frozenset[str]
    """Names of the components among them that a step does not use, and that are in main memory then."""
    shapes: tuple[torch.Tensor, ...]
    """Trained parameters on the meta device."""
    copies: int
    """Number of copies of the trained parameters (average, reference)."""
    activations: Mapping[bool, int] = field(default_factory=dict)
    """Activations of a micro-batch without gradient checkpointing, and with it if the network supports it; empty if
    they are not known."""
    reason: str = ""
    """Why the activations are not known."""
    extra: int = 0
    """Data on the device, such as the latents and clips of a rollout."""
    excluded: frozenset[str] = frozenset()
    """Names of the savings that other settings of the run exclude."""

    @property
    def gradients(self) -> int:
        """Gradients of the trained parameters, float32."""
        return sum(4 * each.numel() for each in self.shapes)

    def training(self, saving: Saving) -> int:
        """Gradients, moments and copies."""
        return self.gradients * (1 + self.copies) + state_bytes(saving.optim, list(self.shapes))

    def weights(self, saving: Saving) -> int:
        """Return the bytes of the networks' weights on the device."""
        saved = 0.0
        if saving.base_quant != self.now.base_quant and self.now.base_quant == "none":
            saved = self.linear - self.linear_values * BITS[saving.base_quant] / 8
        kept = self.network - saved
        if saving.offload_blocks and self.blocks:  # two of them are in the buffers
            block = max(self.blocks) * (1 - saved / (self.networks * sum(self.blocks)))
            kept -= self.networks * max(0, saving.offload_blocks - 2) * block
        return int(kept)

    def step(self, saving: Saving) -> int:
        """Return the largest number of bytes during a step."""
        used = 0 if saving.offload_frozen else sum(n for name, n in self.others.items() if name not in self.unused)
        activations = self.activations.get(saving.gradient_checkpointing, 0)
        return self.weights(saving) + self.training(saving) + used + activations + self.extra

    def encoding(self, saving: Saving) -> int:
        """Return the bytes of weights during the encoding of prompts and clips, before the first step.

        With `offload_frozen` a component for which a card has too little memory runs in main memory.
        """
        sizes = self.others.values()
        return self.weights(saving) + (max(sizes, default=0) if saving.offload_frozen else sum(sizes))

    def needed(self, saving: Saving) -> int:
        """Return the bytes that a card must have."""
        return self.step(saving) if saving.offload_frozen else max(self.step(saving), self.encoding(saving))

    def ladder(self) -> dict[str, Saving]:
        """Return the configured settings, and then each further saving together with the ones before, by name."""
        found, saving = {"as configured": self.now}, self.now
        wanted: dict[str, Any] = {"gradient_checkpointing": True, "offload_frozen": True, "optim": "adamw_8bit"}
        if self.linear:
            wanted["base_quant"] = "int8"
        wanted["offload_blocks"] = len(self.blocks) if self.linear or self.now.base_quant != "none" else 0
        for name, value in wanted.items():
            plain = getattr(self.now, name) in (False, 0, "none", "adamw")
            if plain and value and name not in self.excluded:
                saving = replace(saving, **{name: value})
                found[f"+ {name}: {str(value).lower()}"] = saving
        return found


def bytes_of(components: Iterable[Any]) -> int:
    """Return the number of bytes of all parameters and buffers in the components that are modules."""
    modules = [component for component in components if isinstance(component, nn.Module)]
    return sum(each.nbytes for part in modules for each in (*part.parameters(), *part.buffers()))


def trained_in(modules: Iterable[nn.Module]) -> int:
    """Return the number of trained parameters (`requires_grad`) in some modules."""
    return sum(parameter.numel() for part in modules for parameter in part.parameters() if parameter.requires_grad)


def memory_plan(
    pipe: Any,
    denoiser: Any,
    memory: MemoryConfig,
    updates: UpdatesConfig,
    *,
    size: Mapping[str, int],
    rows: int,
    passes: int = 1,
    copies: int = 0,
    unused: Collection[str] = (),
    extra: int = 0,
) -> MemoryPlan:
    """Measure the sizes of a training whose model is loaded, with its adapters.

    Args:
        pipe: the pipeline.
        denoiser: its denoiser.
        memory: settings of frozen weights.
        updates: settings of the optimiser and of autocast.
        size: `num_frames`, `height` and `width` of the clips.
        rows: samples of a micro-batch.
        passes: forward passes for a loss, 2 for guidance.
        copies: copies of the trained parameters that are kept.
        unused: components that a step does not use and that are in main memory then.
        extra: bytes of data on the device.
    """
    networks = dict(denoiser.transformers)
    # Of two experts, one may be frozen (`train_experts`): its pass keeps no activations.
    learns = (each for each in networks.values() if any(weight.requires_grad for weight in each.parameters()))
    first = next(learns, next(iter(networks.values())))
    blocks = _blocks(first)
    linear = [weight for network in networks.values() for block in _blocks(network) for weight in _linear(block)]
    others = {name: bytes_of([part]) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    trained = [each for network in networks.values() for each in network.parameters() if each.requires_grad]
    try:
        activations, reason = _activations(denoiser, first, memory, updates, size, rows, passes), ""
    except UserError as error:
        activations, reason = {}, str(error)
    return MemoryPlan(
        now=Saving(
            gradient_checkpointing=memory.gradient_checkpointing,
            offload_frozen=memory.offload_frozen,
            optim=updates.optim,
            base_quant=memory.base_quant,
            offload_blocks=memory.offload_blocks,
        ),
        networks=len(networks),
        network=bytes_of(networks.values()),
        linear=sum(each.nbytes for each in linear),
        linear_values=sum(each.numel() for each in linear),
        blocks=tuple(sum(each.nbytes for each in block.parameters() if not each.requires_grad) for block in blocks),
        others={name: count for name, count in others.items() if name not in networks},
        unused=frozenset(unused),
        shapes=tuple(torch.empty(each.shape, device="meta") for each in trained),
        copies=copies,
        activations=activations,
        reason=reason,
        extra=extra,
        excluded=_excluded(memory, first),
    )


def memory_numbers(plan: MemoryPlan) -> dict[str, float]:
    """Return the estimate for the configured settings, by name. `bytes/activations` is absent if it is not known."""
    found = {
        "bytes/weights_on_device": float(plan.weights(plan.now)),
        "bytes/training": float(plan.training(plan.now)),
    }
    if plan.activations:
        found["bytes/activations"] = float(plan.activations[plan.now.gradient_checkpointing])
        found["bytes/step"] = float(plan.step(plan.now))
    return found


def memory_table(plan: MemoryPlan) -> str:
    """Return a text table: the peak for the configured settings and for further savings, and the cards that have it.

    A card is large enough if `RESERVE` bytes of it are free beside the peak.
    """
    if not plan.activations:
        return f"not counted: activations ({plan.reason})"
    lines = [f"{'peak memory':32s}{'GiB':>8s}" + "".join(f"{f'{size} GB':>8s}" for size in CARDS)]
    for name, saving in plan.ladder().items():
        needed = plan.needed(saving)
        fits = "".join(f"{'yes' if needed + RESERVE <= size * GIGA else '-':>8s}" for size in CARDS)
        lines.append(f"{name:32s}{needed / GIGA:8.2f}{fits}")
    return "\n".join(lines)


def _excluded(memory: MemoryConfig, network: nn.Module) -> frozenset[str]:
    """Return the names of the savings that the network, the configuration of a run, or several processes exclude."""
    sharded = getattr(memory, "fully_shard", False)
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    alone = not (sharded or several or getattr(memory, "torch_compile", False))
    # Blocks can be moved only with gradient checkpointing.
    again = ["gradient_checkpointing", "offload_blocks"] if not recomputes(network) else []
    return frozenset((*again, *(["optim"] if sharded else []), *([] if alone else ["offload_blocks"])))


def _blocks(network: nn.Module) -> list[nn.Module]:
    try:
        return [block.module for block in blocks_of(network)]
    except UserError:  # a network without a row has no blocks that could be moved
        return []


def _linear(block: nn.Module) -> list[torch.Tensor]:
    """Return the weights of the exact frozen linear layers of a block."""
    parts = [part for name, part in block.named_modules() if isinstance(part, nn.Linear) and "lora_" not in name]
    weights = [part.weight for part in parts]
    return [each for each in weights if each.is_floating_point() and not each.requires_grad]


def _activations(
    denoiser: Any,
    network: nn.Module,
    memory: MemoryConfig,
    updates: UpdatesConfig,
    size: Mapping[str, int],
    rows: int,
    passes: int,
) -> dict[bool, int]:
    """Return the activations of a micro-batch without gradient checkpointing, and with it if the network has it."""
    model: Any = network
    kind = registered_name(type(model))
    shape = denoiser.latent_shape(**size)
    frames = shape[1] if len(shape) == 4 else 1
    length = memory.max_sequence_length or int(getattr(denoiser, "max_sequence_length", None) or 1)
    place = Size(
        batch=rows,
        num_frames=size["num_frames"],
        frames=frames,
        height=shape[-2],
        width=shape[-1],
        text_tokens=length,
        dtype=model.dtype,
    )
    arguments = {**call_arguments(kind, model.config, place), "return_dict": False}
    offload = offload_in(network)
    found: dict[bool, int] = {}
    for checkpointing in (False, True) if recomputes(network) else (False,):
        if recomputes(network):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        training = network.training
        network.train()
        try:
            options: dict[str, Any] = {} if offload is None else {"around": offload.paused}
            autocast = torch.bfloat16 if updates.bf16 else None
            found[checkpointing] = training_memory(network, arguments, passes=passes, autocast=autocast, **options)
        finally:
            network.train(training)
            if recomputes(network) and not memory.gradient_checkpointing:
                model.disable_gradient_checkpointing()
    return found
