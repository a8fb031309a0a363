"""Sharding of parameters, gradients and moments over processes with torch's `fully_shard` (FSDP2), on GPUs and CPUs.

Either the recipe enables sharding, or `accelerate launch` does with its FSDP plug-in, which then shards the model. On
CPUs accelerate's plug-in silently falls back to data parallelism; this module never does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from postgen.compat import block_classes
from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.own_format import empty_noted

from .block_offload import ONE_PROCESS, offload_in

Blocks = Callable[[], Sequence[nn.Module]]
"""Returns the modules inside a model that are sharded one by one; called only if the model is sharded."""


def repeated_blocks(module: nn.Module, name: str) -> list[nn.Module]:
    """Return the repeated blocks of all networks inside a module.

    The blocks are those of the network's row in `postgen.families`, or those that its own class names.

    Args:
        module: a network, or a module that contains one or several networks.
        name: name of the module in messages.

    Raises:
        UserError: no repeated blocks are known inside the module.
    """
    if found := blocks_inside(module):
        return found
    raise UserError(
        f"{name}, a {type(module).__name__}, cannot be sharded: no repeated blocks are known inside. Train without "
        "fully_shard and FSDP; a trainer of your own can name the modules in its shard_blocks"
    )


def blocks_inside(module: nn.Module) -> list[nn.Module]:
    """Return the same blocks as `repeated_blocks`; an empty list if no blocks are known."""
    try:
        return [block.module for block in blocks_of(module)]
    except UserError:
        classes = block_classes(module)
    own = [part for part in module.modules() if type(part).__name__ in classes]
    return own or [block for child in module.children() for block in blocks_inside(child)]


def prepare(module: nn.Module, accelerator: Accelerator, *, fully: bool, blocks: Blocks) -> nn.Module:
    """Move a module to its device, and wrap or shard it so that processes average its gradients.

    Args:
        module: the module, in training mode.
        accelerator: has the number of processes, and whether the launcher enabled FSDP2.
        fully: shard the module in place: each of its blocks, then the rest. Otherwise each process has all weights.
            Not used if the launcher enabled FSDP2, which then shards.
        blocks: returns the blocks of the module.

    Raises:
        UserError: the module is to be sharded, but there is only one process, or no blocks are known; or several
            processes train a module whose blocks are offloaded.
    """
    if (accelerator.num_processes > 1 or accelerator.is_fsdp2) and offload_in(module) is not None:
        raise UserError(ONE_PROCESS)
    if accelerator.is_fsdp2:
        return _prepare_fsdp2(module, accelerator, blocks)
    if not fully:
        averaged: nn.Module = accelerator.prepare_model(module)
        return averaged
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        raise UserError(
            "fully_shard shards the model over processes, but there is only one: start several with accelerate launch"
        )
    # accelerate only moves the model and enters autocast. With evaluation_mode it adds no DDP wrapper.
    prepared: nn.Module = accelerator.prepare_model(module, evaluation_mode=True)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    chosen = set(blocks()) - {prepared}
    # From the innermost modules outwards: FSDP leaves weights that are already sharded out of the enclosing module.
    for part in reversed(list(prepared.modules())):
        if part in chosen:
            fully_shard(part, mesh=mesh)
    fully_shard(prepared, mesh=mesh)
    return prepared


def _prepare_fsdp2(module: nn.Module, accelerator: Accelerator, blocks: Blocks) -> nn.Module:
    """Shard a module with accelerate's FSDP2 plug-in, at our blocks unless the plug-in names the classes of blocks."""
    plugin = accelerator.state.fsdp_plugin
    # autocast handles bfloat16. FSDP's mixed precision would also round timesteps.
    plugin.mixed_precision_policy = None
    named = plugin.transformer_cls_names_to_wrap
    if named is None and plugin.auto_wrap_policy is not None:
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks()})
    try:
        cut: nn.Module = fsdp2_prepare_model(accelerator, accelerator.prepare_model(module, evaluation_mode=True))
    finally:
        plugin.transformer_cls_names_to_wrap = named
    return cut


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a sharded tensor; every process must call this. Other tensors are returned as is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather whole tensors from all processes; every process must call this.

    Sharded tensors are gathered one after another and moved to the CPU. Other tensors are not copied.

    Args:
        tensors: tensors by name, sharded or not.
        keep: whether this process keeps the result; otherwise it only sends its shards, and the result is empty.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def uncut(module: Any, weights: Mapping[str, Tensor], prefix: str = "") -> Any:
    """Return a sharded diffusers or transformers model as a whole model on the CPU; return other models as is.

    Args:
        module: the model, which may be a submodule of a trained module. `fully_shard` replaces the classes of modules;
            the result has the original class.
        weights: state dict of the trained module, with whole tensors.
        prefix: prefix of this model's names in `weights`, with a dot at the end; empty for the trained module itself.
    """
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    from torch.distributed.fsdp import FSDPModule

    kinds: Iterable[Any] = type(module).__mro__
    kind = next(parent for parent in kinds if not issubclass(parent, FSDPModule))
    # The config of a network whose structure postgen has changed does not describe it; `empty_noted` builds these.
    made = empty_noted({**module.config, "_class_name": kind.__name__}) if isinstance(module.config, dict) else None
    if made is None:
        with torch.device("meta"):
            made = (kind.from_config if hasattr(kind, "from_config") else kind)(module.config)
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    made.load_state_dict(own, assign=True)
    for name, buffer in module.named_buffers():
        # State dicts leave out some buffers. FSDP does not shard buffers, so they are copied from the module.
        owner, _, key = name.rpartition(".")
        setattr(made.get_submodule(owner), key, buffer.cpu())
    return made


def local(tensor: Tensor) -> Tensor:
    """Return the shard of this process, or a tensor that is not sharded, detached and without a copy."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def drop_gathered(models: Iterable[nn.Module]) -> None:
    """Free the weights that FSDP has gathered for the next forward pass, so that FSDP gathers them again.

    Afterwards `parameters()` of these models returns the sharded parameters. Models without FSDP do not change.
    """
    if torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for part in (part for model in models for part in model.modules()):
            if isinstance(part, FSDPModule):
                part.reshard()


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor like the tensor `like`. If `like` is not sharded, the tensor is returned as is."""
    if not isinstance(like, DTensor) or tensor.dim() == 0:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextmanager
def no_sync(models: Mapping[str, nn.Module], accelerator: Accelerator) -> Iterator[None]:
    """Skip the averaging of gradients over processes in enclosed backward passes, with their forward passes.

    The next backward pass outside averages the accumulated gradients. DDP averages a backward pass whose forward pass
    was outside, wherever the backward pass is.
    """
    sharded = [model for model in models.values() if hasattr(model, "set_requires_gradient_sync")]
    with ExitStack() as stack:
        for model in models.values():
            if model not in sharded:
                stack.enter_context(accelerator.no_sync(model))
        for model in sharded:
            model.set_requires_gradient_sync(False)  # type: ignore[operator]
            stack.callback(model.set_requires_gradient_sync, True)  # type: ignore[arg-type]
        yield
