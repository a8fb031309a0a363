"""Parameters, gradients and moments cut over the processes: torch's `fully_shard` (FSDP2), on GPUs and on CPUs alike.

Either the recipe asks for it, or `accelerate launch` does with its FSDP plug-in, which then does the cutting. On a CPU
that plug-in falls back to plain data parallelism without a word; here nothing does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from postgen.compat import block_classes
from postgen.errors import UserError


def check_launch(device: str) -> None:
    """Look at what `accelerate launch` asks for, before accelerate does.

    Args:
        device: of the configuration.

    Raises:
        UserError: DeepSpeed, FSDP 1, FSDP on a CPU, or activations recomputed by FSDP.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DeepSpeed (ZeRO) cannot be used: its engine owns the optimiser and the weights, which are averaged, "
            "swapped and written here. Cut them with FSDP2: recipes/accelerate/fsdp2.yaml, or --fully_shard true"
        )
    if not _asked("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 cannot be used: write fsdp_version: 2 into the file for accelerate")
    if device == "cpu" or not torch.cuda.is_available():
        raise UserError(
            "accelerate's FSDP does nothing on CPUs: use recipes/accelerate/ddp_cpu.yaml with --fully_shard true"
        )
    if _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("fsdp_activation_checkpointing is the recipe's gradient_checkpointing here: set it there")


def prepare(module: nn.Module, accelerator: Accelerator, *, fully: bool) -> nn.Module:
    """Bring a module to its device and let processes average its gradients.

    Args:
        module: in training mode.
        accelerator: says how many processes there are, and whether FSDP2 was asked for at the launch.
        fully: cut it over them in place, each of its repeated blocks and then the rest; else each has all of it.

    Raises:
        UserError: it is to be cut, and there is one process only.
    """
    if accelerator.is_fsdp2:
        # bfloat16 is autocast's here; FSDP's own would round timesteps too.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        cut: nn.Module = fsdp2_prepare_model(accelerator, accelerator.prepare_model(module, evaluation_mode=True))
        return cut
    if not fully:
        averaged: nn.Module = accelerator.prepare_model(module)
        return averaged
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        raise UserError("fully_shard cuts the model over processes, and there is one: start it with accelerate launch")
    # Only the device and bfloat16's autocast; the wrapper for evaluation averages no gradients.
    prepared: nn.Module = accelerator.prepare_model(module, evaluation_mode=True)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = block_classes(module)
    for part in prepared.modules():
        if type(part).__name__ in blocks:
            fully_shard(part, mesh=mesh)
    fully_shard(prepared, mesh=mesh)
    return prepared


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes, each of which must call this; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, sharing its memory; others are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, cut as `like` is; nothing changes where that is whole."""
    if not isinstance(like, DTensor) or tensor.dim() == 0:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextmanager
def no_sync(models: Mapping[str, nn.Module], accelerator: Accelerator) -> Iterator[None]:
    """Inside, backward passes do not average gradients over processes: the next pass outside does, for all."""
    sharded = [model for model in models.values() if hasattr(model, "set_requires_gradient_sync")]
    with ExitStack() as stack:
        for model in models.values():
            if model not in sharded:
                stack.enter_context(accelerator.no_sync(model))
        for model in sharded:
            model.set_requires_gradient_sync(False)  # type: ignore[operator]
            stack.callback(model.set_requires_gradient_sync, True)  # type: ignore[arg-type]
        yield


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
