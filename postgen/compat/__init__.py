"""The only package that touches private symbols of diffusers, accelerate, peft, typer and the like.

Light to import: every library is imported inside the function that needs it. `compat.attention` is about attention.
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
    """Return the diffusers model inside DDP, FSDP, DeepSpeed, `torch.compile` and peft wrappers."""
    inner = module
    # Every wrapper has one of them. accelerate looks through all submodules of a model, at every call of a plug-in.
    if hasattr(module, "module") or hasattr(module, "_orig_mod"):
        from accelerate.utils import extract_model_from_parallel

        inner = extract_model_from_parallel(module, keep_fp32_wrapper=True)
    inner = getattr(inner, "_orig_mod", inner)
    get_base = getattr(inner, "get_base_model", None)
    return get_base() if callable(get_base) else inner


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` returned, or its own calls are compiled."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def block_classes(module: nn.Module) -> set[str]:
    """Return the names of the classes of blocks that a model of diffusers or transformers says are to stay whole."""
    return {*(getattr(module, "_no_split_modules", None) or ()), *(getattr(module, "_repeated_blocks", None) or ())}


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """Return the names of parts that a model of diffusers keeps in float32 when it is loaded in another dtype."""
    return tuple(model._keep_in_fp32_modules or ())


def command_error(error: BaseException) -> tuple[str, int, str] | None:
    """Return message, exit code and command of an error of the command line itself (unknown option, bad value).

    None for any other. The command is that in which it happened, as `postgen generate`; empty where none is known.
    Newer typer carries its own copy of click, older typer uses the click package: both mark such errors alike.
    """
    text, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if not callable(text) or not isinstance(code, int):
        return None
    return str(text()), code, str(getattr(getattr(error, "ctx", None), "command_path", ""))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from writing progress bars and notices while a model is loaded."""
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
    """Return the device that a pipeline computes on, also when offloading keeps its parts elsewhere."""
    place: torch.device = pipe._execution_device
    return place


def interrupt(pipe: Any) -> bool:
    """Let a pipeline that is in its loop skip the steps that are left, and decode what it has.

    Returns:
        Whether it can: one that cannot goes on.
    """
    if not isinstance(getattr(type(pipe), "interrupt", None), property):
        return False
    pipe._interrupt = True
    return True


def pack_latents(pipe: Any, latents: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Turn latents into the tokens that FLUX's or LTX's network takes; `sizes` as the pipeline's class takes them."""
    tokens: torch.Tensor = pipe._pack_latents(latents, *sizes)
    return tokens


def unpack_latents(pipe: Any, tokens: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Undo `pack_latents`."""
    latents: torch.Tensor = pipe._unpack_latents(tokens, *sizes)
    return latents


def token_places(pipe: Any, batch: int, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return where FLUX's tokens lie, (rows * columns, 3), with the device and type of a tensor."""
    places: torch.Tensor = pipe._prepare_latent_image_ids(batch, rows, columns, like.device, like.dtype)
    return places


def rotary_table(pipe: Any, height: int, width: int, frames: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return cosines and sines of CogVideoX's tokens, from pixels and latent frames."""
    table: tuple[torch.Tensor, ...] = pipe._prepare_rotary_positional_embeddings(height, width, frames, device)
    return table


def size_ids(pipe: Any, size: tuple[int, int], dtype: torch.dtype, text_width: int) -> torch.Tensor:
    """Return the (1, 6) sizes that the UNet of Stable Diffusion XL is told for a picture that is not cropped."""
    ids: torch.Tensor = pipe._get_add_time_ids(size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=text_width)
    return ids


def register_block_class(kind: type, parent: type) -> None:
    """Tell diffusers' caches, which look blocks up by their exact class, what they know of the parent class."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        metadata = TransformerBlockRegistry.get(parent)
    except ValueError:
        return
    TransformerBlockRegistry.register(kind, dataclasses.replace(metadata, _cls=kind))


def rebind_forward(module: nn.Module, old: Callable[..., Any], new: Callable[..., Any]) -> bool:
    """Let hooks that keep a module's forward keep another one: those of diffusers and accelerate.

    Args:
        module: its class has the function `new` as forward already.
        old: function whose bound methods were kept.
        new: function to keep instead.

    Returns:
        Whether a call of the module ends in `new`: False where somebody else replaced its forward.
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
    """Name what accelerate or diffusers hooked onto a module that knows the weights inside; None: nothing.

    Args:
        module: the module.
        itself: whether any hook counts, else only those that move or cast the weights of inner modules.
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
    """Return the device that a hook of accelerate brings a module to when it is called (offloading); None: no hook."""
    import torch

    hook = getattr(module, "_hf_hook", None)
    places = (getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,)))
    place = next((place for place in places if place is not None), None)
    return None if place is None else torch.device(place)


def lora_base_problem(module: nn.Module) -> str | None:
    """Say why the layer inside a peft wrapper cannot be replaced; None: it can, or there is no wrapper."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer: Any = module
    if not isinstance(layer, BaseTunerLayer):
        return None
    if not isinstance(layer, LoraLayer) or any(layer.use_dora.values()):
        return f"peft's {type(layer).__name__} (or DoRA in it) reads its weight"
    return "LoRA is merged into its weight: unmerge or unload it first" if layer.merged else None


def put_lora(pipe: Any, network: Any, state: dict[str, torch.Tensor], name: str, settings: dict[str, Any]) -> None:
    """Put a LoRA adapter, by layer names, into a network or text encoder of a pipeline.

    Hooks that offloading has put on a network are taken off for it, and put back.
    """
    if hasattr(network, "load_lora_adapter"):
        network.load_lora_adapter(state, prefix=None, adapter_name=name, metadata=settings, _pipeline=pipe)
    else:  # a model of transformers
        from peft import LoraConfig

        network.load_adapter(adapter_name=name, adapter_state_dict=state, peft_config=LoraConfig(**settings))


def loaded_from(model: Any) -> str:
    """Return the folder or hub id that a model of diffusers was loaded from; empty for one that was not."""
    return str(model.config.get("_name_or_path") or "")


def forget_config(model: Any, name: str) -> None:
    """Take an entry out of the config of a model of diffusers, which can only add."""
    model._internal_dict = type(model.config)({key: value for key, value in model.config.items() if key != name})
