"""Access to private symbols of diffusers, accelerate, peft, typer and other libraries; no other package uses them.

The import is cheap, because each function imports the library that it needs. `compat.attention` covers attention.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """Return the diffusers model inside any wrappers of DDP, FSDP, DeepSpeed, `torch.compile` and peft."""
    inner = module
    # Every wrapper has one of these attributes. Without the check, accelerate would walk over all submodules of the
    # model at every call of a plug-in.
    if hasattr(module, "module") or hasattr(module, "_orig_mod"):
        from accelerate.utils import extract_model_from_parallel

        inner = extract_model_from_parallel(module, keep_fp32_wrapper=True)
    inner = getattr(inner, "_orig_mod", inner)
    get_base = getattr(inner, "get_base_model", None)
    return get_base() if callable(get_base) else inner


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is the result of `torch.compile`, or was compiled in place (`module.compile()`)."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def block_classes(module: nn.Module) -> set[str]:
    """Return the class names of blocks that a diffusers or transformers model declares as repeated or unsplittable."""
    return {*(getattr(module, "_no_split_modules", None) or ()), *(getattr(module, "_repeated_blocks", None) or ())}


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """Return the names of modules that a diffusers model keeps in float32 when it is loaded in another dtype."""
    return tuple(model._keep_in_fp32_modules or ())


def recomputes(model: Any) -> bool:
    """Return whether a diffusers model supports gradient checkpointing."""
    return bool(getattr(model, "_supports_gradient_checkpointing", False))


def command_error(error: BaseException) -> tuple[str, int, str] | None:
    """Return message, exit code and command of a usage error of the command line (unknown option, bad value).

    Returns None for any other error. The command is the one that raised the error, such as `postgen generate`; it is
    empty if unknown. Newer versions of typer contain a copy of click and older ones use the click package; the usage
    errors of both have the same attributes.
    """
    text, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if not callable(text) or not isinstance(code, int):
        return None
    return str(text()), code, str(getattr(getattr(error, "ctx", None), "command_path", ""))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress progress bars and log messages of diffusers and transformers inside a `with` block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers: list[Any] = [diffusers_logging, transformers_logging]
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggers]
    for logging in loggers:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, (verbosity, bars) in zip(loggers, before, strict=True):
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def execution_device(pipe: Any) -> torch.device:
    """Return the device on which a pipeline computes, also when offloading keeps its modules on another device."""
    place: torch.device = pipe._execution_device
    return place


def interrupt(pipe: Any) -> bool:
    """Make a running pipeline skip its remaining denoising steps and decode the current latents.

    Returns:
        Whether the pipeline supports this; a pipeline that does not continues normally.
    """
    if not isinstance(getattr(type(pipe), "interrupt", None), property):
        return False
    pipe._interrupt = True
    return True


def pack_latents(pipe: Any, latents: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Pack latents into tokens of a FLUX or LTX transformer; `sizes` are the size arguments of the pipeline class."""
    tokens: torch.Tensor = pipe._pack_latents(latents, *sizes)
    return tokens


def unpack_latents(pipe: Any, tokens: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Unpack tokens into latents; the inverse of `pack_latents`."""
    latents: torch.Tensor = pipe._unpack_latents(tokens, *sizes)
    return latents


def token_places(pipe: Any, batch: int, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return the position ids of FLUX's tokens, (rows * columns, 3), with the device and dtype of `like`."""
    places: torch.Tensor = pipe._prepare_latent_image_ids(batch, rows, columns, like.device, like.dtype)
    return places


def rotary_table(pipe: Any, height: int, width: int, frames: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return rotary cosines and sines of CogVideoX's tokens, from height and width in pixels and latent frames."""
    table: tuple[torch.Tensor, ...] = pipe._prepare_rotary_positional_embeddings(height, width, frames, device)
    return table


def size_ids(pipe: Any, size: tuple[int, int], dtype: torch.dtype, text_width: int) -> torch.Tensor:
    """Return the size conditioning (1, 6) of the UNet of Stable Diffusion XL for a picture that is not cropped."""
    ids: torch.Tensor = pipe._get_add_time_ids(size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=text_width)
    return ids


def register_block_class(kind: type, parent: type) -> None:
    """Register a block class with diffusers' caches, with the metadata of its parent class.

    The caches look blocks up by their exact class, so they do not find subclasses. Nothing is registered if the parent
    class is unknown to them.
    """
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        metadata = TransformerBlockRegistry.get(parent)
    except ValueError:
        return
    TransformerBlockRegistry.register(kind, dataclasses.replace(metadata, _cls=kind))


def rebind_forward(module: nn.Module, old: Callable[..., Any], new: Callable[..., Any]) -> bool:
    """Replace the forward function in the references that hooks of diffusers and accelerate hold for a module.

    Args:
        module: the module; the forward of its class is already `new`.
        old: the previous forward function, to whose bound methods the hooks refer.
        new: the function that replaces `old` in these references.

    Returns:
        Whether a call of the module reaches `new`; False if other code has replaced the forward of the module.
    """
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
    places: list[tuple[Any, str]] = [(each, name) for each in references for name in ("forward", "original_forward")]
    places += [(module, name) for name in ("forward", "_old_forward") if name in vars(module)]
    reached = "forward" not in vars(module)
    for holder, name in places:
        method = getattr(holder, name)
        if getattr(method, "__self__", None) is not module:
            continue
        if method.__func__ is old:
            setattr(holder, name, types.MethodType(new, module))
        reached = reached or method.__func__ in (old, new)
    return reached


def module_hooks(module: nn.Module, *, itself: bool) -> str | None:
    """Describe a hook of accelerate or diffusers on a module that depends on the weights inside; None without one.

    Args:
        module: the module.
        itself: True considers every hook; False only hooks that move or cast the weights of submodules.
    """
    from accelerate.hooks import AlignDevicesHook

    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if each is not None and (itself or (isinstance(each, AlignDevicesHook) and each.offload)):
            return f"accelerate's {type(each).__name__}"
    names = list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}))
    moving = names if itself else [name for name in names if "offload" in name or "casting" in name]
    return f"the diffusers hook {moving[0]}" if moving else None


def hooked_device(module: nn.Module) -> torch.device | None:
    """Return the device to which a hook of accelerate moves a module for a call (offloading); None without a hook."""
    import torch

    hook = getattr(module, "_hf_hook", None)
    places = (getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,)))
    place = next((place for place in places if place is not None), None)
    return None if place is None else torch.device(place)


def lora_base_problem(module: nn.Module) -> str | None:
    """Return why the layer inside a peft wrapper cannot be replaced; None if it can, or if there is no wrapper."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer: Any = module
    if not isinstance(layer, BaseTunerLayer):
        return None
    if not isinstance(layer, LoraLayer) or any(layer.use_dora.values()):
        return f"peft's {type(layer).__name__} (or DoRA in it) reads its weight"
    return "LoRA is merged into its weight: unmerge or unload it first" if layer.merged else None


def put_lora(pipe: Any, network: Any, state: dict[str, torch.Tensor], name: str, settings: dict[str, Any]) -> None:
    """Load a LoRA adapter into a network or text encoder of a pipeline.

    Hooks of offloading on a diffusers network are removed for the load and installed again afterwards.

    Args:
        pipe: the pipeline.
        network: the diffusers model, or transformers model, of the pipeline.
        state: state dict of the adapter, with the names of the layers in `network`.
        name: name of the adapter.
        settings: arguments of `peft.LoraConfig`.
    """
    if hasattr(network, "load_lora_adapter"):
        network.load_lora_adapter(state, prefix=None, adapter_name=name, metadata=settings, _pipeline=pipe)
    else:  # a transformers model
        from peft import LoraConfig

        network.load_adapter(adapter_name=name, adapter_state_dict=state, peft_config=LoraConfig(**settings))


def loaded_from(model: Any) -> str:
    """Return the folder or Hub id from which a diffusers model was loaded; empty if it was not loaded."""
    return str(model.config.get("_name_or_path") or "")


def forget_config(model: Any, name: str) -> None:
    """Remove an entry from the config of a diffusers model; diffusers itself can only add entries."""
    model._internal_dict = type(model.config)({key: value for key, value in model.config.items() if key != name})
