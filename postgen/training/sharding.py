"""Parameters, gradients and moments cut over the processes: torch's `fully_shard` (FSDP2), on GPUs and on CPUs alike.

Either the recipe asks for it, or `accelerate launch` does with its FSDP plug-in, which then does the cutting. On a CPU
that plug-in falls back to plain data parallelism without a word; here nothing does.
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

Blocks = Callable[[], Sequence[nn.Module]]
"""The modules inside a model that are cut one by one; asked for only where it is cut."""


def repeated_blocks(module: nn.Module, name: str) -> list[nn.Module]:
    """Return the repeated blocks of all networks inside a module, by their rows in `families` or their own classes.

    Args:
        module: a network, or a module around one or several.
        name: what messages call it.

    Raises:
        UserError: no block is known inside.
    """
    if found := blocks_inside(module):
        return found
    raise UserError(
        f"{name}, a {type(module).__name__}, cannot be cut over the processes: no repeated blocks are known inside. "
        "Train it whole in each of them, without fully_shard and FSDP; a trainer of your own can name the modules in "
        "its shard_blocks"
    )


def blocks_inside(module: nn.Module) -> list[nn.Module]:
    """Return what `repeated_blocks` does, or nothing where no block is known."""
    try:
        return [block.module for block in blocks_of(module)]
    except UserError:
        classes = block_classes(module)
    own = [part for part in module.modules() if type(part).__name__ in classes]
    return own or [block for child in module.children() for block in blocks_inside(child)]


def prepare(module: nn.Module, accelerator: Accelerator, *, fully: bool, blocks: Blocks) -> nn.Module:
    """Bring a module to its device and let processes average its gradients.

    Args:
        module: in training mode.
        accelerator: says how many processes there are, and whether FSDP2 was asked for at the launch.
        fully: cut it over them in place, each of its blocks and then the rest; else each has all of it.
        blocks: its blocks.

    Raises:
        UserError: it is to be cut, and there is one process only, or no blocks are known.
    """
    if accelerator.is_fsdp2:
        return _prepare_fsdp2(module, accelerator, blocks)
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
    chosen = set(blocks()) - {prepared}
    # From the inside out: what is cut already belongs no more to the module around it.
    for part in reversed(list(prepared.modules())):
        if part in chosen:
            fully_shard(part, mesh=mesh)
    fully_shard(prepared, mesh=mesh)
    return prepared


def _prepare_fsdp2(module: nn.Module, accelerator: Accelerator, blocks: Blocks) -> nn.Module:
    """Let accelerate cut a module as its plug-in says, at our blocks where that does not name classes itself."""
    plugin = accelerator.state.fsdp_plugin
    # bfloat16 is autocast's here; FSDP's own would round timesteps too.
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
    """Return a tensor with the parts of all processes, each of which must call this; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return tensors by name with the parts of all processes, each of which must call this.

    Those that were cut come on the CPU, one after another; plain ones share their memory with what is returned.

    Args:
        tensors: plain or cut.
        keep: whether this process wants them; the others only give their parts, and get nothing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def uncut(module: Any, weights: Mapping[str, Tensor], prefix: str = "") -> Any:
    """Return a cut diffusers or transformers model as one of its own class on the CPU; one that is whole as it is.

    Args:
        module: the model, which may be a part of what is trained; `fully_shard` gives modules classes of its own.
        weights: all weights of what is trained, whole, by their names in its `state_dict`.
        prefix: what stands before the names of this model there, with a dot at the end.
    """
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    from torch.distributed.fsdp import FSDPModule

    kinds: Iterable[Any] = type(module).__mro__
    kind = next(parent for parent in kinds if not issubclass(parent, FSDPModule))
    # A network whose structure we changed is not what its class makes of its config.
    made = empty_noted({**module.config, "_class_name": kind.__name__}) if isinstance(module.config, dict) else None
    if made is None:
        with torch.device("meta"):
            made = (kind.from_config if hasattr(kind, "from_config") else kind)(module.config)
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    made.load_state_dict(own, assign=True)
    for name, buffer in module.named_buffers():
        # Those that no file holds; FSDP cuts no buffers.
        owner, _, key = name.rpartition(".")
        setattr(made.get_submodule(owner), key, buffer.cpu())
    return made


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or a whole one, without its graph and sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def drop_gathered(models: Iterable[nn.Module]) -> None:
    """Let go of what FSDP has gathered and kept for the next pass, so that it gathers anew; others stay as they are.

    Afterwards the models show the parameters that are cut, not the gathered ones.
    """
    if torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for part in (part for model in models for part in model.modules()):
            if isinstance(part, FSDPModule):
                part.reshard()


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
