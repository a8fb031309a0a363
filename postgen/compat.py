"""The only file that touches private symbols of diffusers, accelerate, peft, typer and the like.

Light to import: every library is imported inside the function that needs it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """Return the diffusers model inside DDP, FSDP, DeepSpeed, `torch.compile` and peft wrappers."""
    from accelerate.utils import extract_model_from_parallel

    inner: nn.Module = extract_model_from_parallel(module, keep_fp32_wrapper=True)
    inner = getattr(inner, "_orig_mod", inner)
    get_base = getattr(inner, "get_base_model", None)
    return get_base() if callable(get_base) else inner


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


class _Tap(threading.local):
    """Who looks at the attention calls of this thread."""

    # Set in every thread rather than on the class: compiled code guards on the attribute being there.
    def __init__(self) -> None:
        self.sink: Callable[..., None] | None = None


_tap = _Tap()


class tap_dispatched:
    """While open, show every attention call that goes through diffusers' dispatcher to a function.

    `sink(query, key, scale, parallel_config)` gets (B, L, heads, D) tensors, as the backend will see them: under
    context parallelism the shard of this rank. It must not keep them. Taps nest: the innermost one sees.
    """

    def __init__(self, sink: Callable[..., None]) -> None:
        self.sink = sink

    def __enter__(self) -> None:
        self.before, _tap.sink = _tap.sink, self.sink

    def __exit__(self, *failure: object) -> None:
        _tap.sink = self.before


def install_attention_tap() -> None:
    """Let `tap_dispatched` see every backend of diffusers' dispatcher, those registered later included.

    Nothing changes for calls outside `tap_dispatched`. It is never taken off: deep copies of a model may rely on it.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    registry: Any = _AttentionBackendRegistry
    backends: dict[Any, Any] = registry._backends
    for name, backend in backends.items():
        if not hasattr(backend, "postgen_untapped"):
            backends[name] = _tapped(backend)
    register = registry.register.__func__
    if hasattr(register, "postgen_untapped"):
        return

    @functools.wraps(register)
    def register_tapped(cls: Any, backend: Any, *args: Any, **kwargs: Any) -> Any:
        decorate = register(cls, backend, *args, **kwargs)

        def decorate_and_tap(function: Any) -> Any:
            decorated = decorate(function)
            cls._backends[backend] = _tapped(cls._backends[backend])
            return decorated

        return decorate_and_tap

    register_tapped.postgen_untapped = register  # type: ignore[attr-defined]
    registry.register = classmethod(register_tapped)


def show_attention_call(query: torch.Tensor, key: torch.Tensor, scale: float | None = None) -> None:
    """Show `tap_dispatched` an attention call that does not go through the dispatcher; (B, L, heads, D) tensors."""
    if (sink := _tap.sink) is not None:
        sink(query, key, scale, None)


def _tapped(backend: Callable[..., Any]) -> Callable[..., Any]:
    # The dispatcher passes everything by name.
    @functools.wraps(backend)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (sink := _tap.sink) is None or args:
            return backend(*args, **kwargs)
        _tap.sink = None  # a backend may hand over to another one: a call is seen once
        try:
            sink(kwargs["query"], kwargs["key"], kwargs.get("scale"), kwargs.get("_parallel_config"))
            return backend(**kwargs)
        finally:
            _tap.sink = sink

    call.postgen_untapped = backend  # type: ignore[attr-defined]
    return call


def register_attention_backend(name: str, attend: Callable[..., torch.Tensor | None]) -> Any:
    """Add a backend to diffusers' attention dispatcher, known to `set_attention_backend` and its context manager.

    Args:
        name: in lower case, as diffusers looks it up. A name that is registered already is left as it is.
        attend: `attend(query, key, value, attn_mask, scale)` with (B, L, heads, D) tensors -> the same, or None for
            calls that it leaves to diffusers' native backend. Calls with dropout, causal or context parallel ones
            are never shown to it.

    Returns:
        What diffusers keeps on processors as `_attention_backend`.

    Raises:
        UserError: the installed diffusers has another dispatcher.
    """
    import diffusers

    try:
        return _registered_backend(name, attend)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"diffusers {diffusers.__version__} has another attention dispatcher than 0.42, which postgen knows"
            f" ({error}): install diffusers==0.42.1 to use the backend {name!r}"
        ) from error


def _registered_backend(name: str, attend: Callable[..., torch.Tensor | None]) -> Any:
    from diffusers.models import attention_dispatch as dispatch

    names: Any = dispatch.AttentionBackendName
    registry = dispatch._AttentionBackendRegistry
    member = names._value2member_map_.get(name)
    if member is not None and member in registry._backends:
        return member
    # Everything that may be missing is asked for before anything is changed.
    backend = _handing_over(attend, dispatch._native_attention)
    checks = [dispatch._check_device, dispatch._check_shape]
    register = registry.register
    member = member or _add_member(names, name)
    register(member, constraints=checks)(backend)
    if names(name) is not member or member not in registry._backends:
        raise ValueError("its registry ignores new names")
    return member


def _add_member(names: Any, name: str) -> Any:
    """Add a member to an enumeration of strings that has no way to do so."""
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    member.__objclass__, member._sort_order_ = names, len(names._member_names_)
    type.__setattr__(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[name] = member
    return member


def _handing_over(attend: Callable[..., torch.Tensor | None], native: Callable[..., torch.Tensor]) -> Any:
    # The dispatcher drops arguments that are not in the signature, masks included.
    def backend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        ours = dropout_p == 0.0 and not is_causal and _parallel_config is None
        if ours and (out := attend(query, key, value, attn_mask, scale)) is not None:
            return out
        return native(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _parallel_config=_parallel_config
        )

    return backend


def attention_settings(processor: Any) -> tuple[Any, Any]:
    """Return the attention backend and the split among ranks that a processor was given; None where it was not."""
    return getattr(processor, "_attention_backend", None), getattr(processor, "_parallel_config", None)


def takes_attention_backend(processor: Any) -> bool:
    """Whether a processor asks diffusers' dispatcher for a backend, which `set_attention_backend` may then set."""
    return hasattr(processor, "_attention_backend")


def set_attention_backend(processor: Any, backend: Any) -> None:
    """Let a processor ask for a backend, as diffusers keeps it; None asks for the default."""
    processor._attention_backend = backend


def hand_settings_over(old: Any, new: Any) -> None:
    """Give a processor the backend and the split among ranks that diffusers set on another one."""
    for name in ("_attention_backend", "_parallel_config"):
        if name in vars(old):
            setattr(new, name, getattr(old, name))


def register_processor_class(kind: type, parent: type) -> None:
    """Tell diffusers' hooks that look processors up by their exact class what they know of the parent class."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(parent)
    except ValueError:
        return
    AttentionProcessorRegistry.register(kind, metadata)


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


def mesh_group(config: Any) -> dist.ProcessGroup:
    """Return the processes among which a `ContextParallelConfig` of diffusers makes Ulysses attention trade heads."""
    group: dist.ProcessGroup = config._ulysses_mesh.get_group()
    return group


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
