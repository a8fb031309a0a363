"""Access to the attention of diffusers: observing and replacing dispatcher calls, backends, processors."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


class _Tap(threading.local):
    """Functions that observe (`sink`) or compute (`attend`) the attention calls of the current thread."""

    # Instance attributes in every thread, not class attributes: compiled code guards on their presence.
    def __init__(self) -> None:
        self.sink: Callable[..., None] | None = None
        self.attend: Callable[..., torch.Tensor | None] | None = None


_tap = _Tap()


class tap_dispatched:
    """Context manager that passes the inputs of every call of diffusers' attention dispatcher to a function.

    The function is called as `sink(query, key, scale, parallel_config)` with tensors (B, L, heads, D), as the backend
    receives them: under context parallelism, the shard of this rank. The function must not keep the tensors. If
    several of these context managers are open, only the innermost one receives the calls. Only calls of the current
    thread are passed on.
    """

    def __init__(self, sink: Callable[..., None]) -> None:
        self.sink = sink

    def __enter__(self) -> None:
        self.before, _tap.sink = _tap.sink, self.sink

    def __exit__(self, *failure: object) -> None:
        _tap.sink = self.before


class divert_dispatched:
    """Context manager in which a function computes the calls of diffusers' attention dispatcher in this thread.

    The function is called as `attend(query, key, value, attn_mask, scale, key_lengths)` with tensors (B, L, heads, D).
    It returns a tensor of this shape, or None to leave a call to the backend. Calls with dropout, causal attention,
    grouped heads or context parallelism always go to the backend. `key_lengths` is None, except for calls through
    `attend_otherwise` that have key lengths.
    """

    def __init__(self, attend: Callable[..., torch.Tensor | None]) -> None:
        self.attend = attend

    def __enter__(self) -> None:
        self.before, _tap.attend = _tap.attend, self.attend

    def __exit__(self, *failure: object) -> None:
        _tap.attend = self.before


def attend_otherwise(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_lengths: torch.Tensor | None
) -> torch.Tensor | None:
    """Compute an attention call outside the dispatcher with the function of `divert_dispatched`.

    Returns:
        The output (B, L, heads, D); None if no function is set, or if the function leaves the call to the caller.
    """
    attend = _tap.attend
    return None if attend is None else attend(query, key, value, None, None, key_lengths)


def install_attention_tap() -> None:
    """Wrap every backend of diffusers' dispatcher, also those registered later, for `tap_dispatched`.

    Calls outside `tap_dispatched` and `divert_dispatched` do not change. The wrappers are never removed, because deep
    copies of a model may rely on them.
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
    """Pass an attention call outside the dispatcher to `tap_dispatched`; the tensors are (B, L, heads, D)."""
    if (sink := _tap.sink) is not None:
        sink(query, key, scale, None)


def _tapped(backend: Callable[..., Any]) -> Callable[..., Any]:
    # The dispatcher passes every argument by name, so a call with positional arguments does not come from it.
    @functools.wraps(backend)
    def call(*args: Any, **kwargs: Any) -> Any:
        sink, attend = _tap.sink, _tap.attend
        if args or (sink is None and attend is None):
            return backend(*args, **kwargs)
        _tap.sink = _tap.attend = None  # a backend may call another backend: observe once
        try:
            if sink is not None:
                sink(kwargs["query"], kwargs["key"], kwargs.get("scale"), kwargs.get("_parallel_config"))
            out = None if attend is None else _diverted(attend, kwargs)
            return backend(**kwargs) if out is None else out
        finally:
            _tap.sink, _tap.attend = sink, attend

    call.postgen_untapped = backend  # type: ignore[attr-defined]
    return call


def _diverted(attend: Callable[..., torch.Tensor | None], call: dict[str, Any]) -> torch.Tensor | None:
    """Return the output of `attend`; None for calls that always go to the backend."""
    special = call.get("dropout_p") or call.get("is_causal") or call.get("enable_gqa") or call.get("_parallel_config")
    if special:
        return None
    return attend(call["query"], call["key"], call["value"], call.get("attn_mask"), call.get("scale"), None)


def register_attention_backend(name: str, attend: Callable[..., torch.Tensor | None]) -> Any:
    """Register a backend with diffusers' attention dispatcher, for `set_attention_backend` and `attention_backend`.

    Args:
        name: name of the backend in lower case, because diffusers looks names up in lower case. A name that is already
            registered keeps its backend.
        attend: a function `attend(query, key, value, attn_mask, scale)` of tensors (B, L, heads, D). It returns a
            tensor of this shape, or None to leave a call to diffusers' native backend. Calls with dropout, causal
            attention or context parallelism always go to the native backend.

    Returns:
        The member of `AttentionBackendName` that diffusers stores on processors as `_attention_backend`.

    Raises:
        UserError: the dispatcher of the installed diffusers differs from the supported one.
    """
    import diffusers

    try:
        return _registered_backend(name, attend)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"the attention dispatcher of diffusers {diffusers.__version__} differs from that of 0.42, which postgen"
            f" supports ({error}): install diffusers==0.42.1 to use the backend {name!r}"
        ) from error


def _registered_backend(name: str, attend: Callable[..., torch.Tensor | None]) -> Any:
    from diffusers.models import attention_dispatch as dispatch

    names: Any = dispatch.AttentionBackendName
    registry = dispatch._AttentionBackendRegistry
    member = names._value2member_map_.get(name)
    if member is not None and member in registry._backends:
        return member
    # Access everything that another version may lack before changing anything.
    backend = _handing_over(attend, dispatch._native_attention)
    checks = [dispatch._check_device, dispatch._check_shape]
    register = registry.register
    member = member or _add_member(names, name)
    register(member, constraints=checks)(backend)
    if names(name) is not member or member not in registry._backends:
        raise ValueError("its registry ignores new names")
    return member


def _add_member(names: Any, name: str) -> Any:
    """Add a member to a string enumeration; Enum has no public way to do this."""
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    member.__objclass__, member._sort_order_ = names, len(names._member_names_)
    type.__setattr__(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[name] = member
    return member


def _handing_over(attend: Callable[..., torch.Tensor | None], native: Callable[..., torch.Tensor]) -> Any:
    # The full signature, because the dispatcher drops arguments (also masks) that the signature does not name.
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
    """Return the attention backend and the parallel configuration of a processor; each is None if not set."""
    return getattr(processor, "_attention_backend", None), getattr(processor, "_parallel_config", None)


def computes_natively(processor: Any) -> bool:
    """Return whether a processor computes attention with diffusers' native backend and has no wrappers of postgen.

    The native backend is torch's own attention, which accepts masks of floating-point numbers.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if getattr(processor, "postgen_wrappers", ()) or not takes_attention_backend(processor):
        return False
    backend = attention_settings(processor)[0] or _AttentionBackendRegistry.get_active_backend()[0]
    return AttentionBackendName(backend) is AttentionBackendName.NATIVE


def takes_attention_backend(processor: Any) -> bool:
    """Return whether a processor uses diffusers' dispatcher, so that `set_attention_backend` has an effect."""
    return hasattr(processor, "_attention_backend")


def set_attention_backend(processor: Any, backend: Any) -> None:
    """Set the attention backend of a processor, as returned by `register_attention_backend`; None is the default."""
    processor._attention_backend = backend


def hand_settings_over(old: Any, new: Any) -> None:
    """Copy the attention backend and the parallel configuration that diffusers set from one processor to another."""
    for name in ("_attention_backend", "_parallel_config"):
        if name in vars(old):
            setattr(new, name, getattr(old, name))


def register_processor_class(kind: type, parent: type) -> None:
    """Register a processor class with diffusers' hooks, with the metadata of its parent class.

    The hooks look processors up by their exact class, so they do not find subclasses. Nothing is registered if the
    parent class is unknown to them.
    """
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(parent)
    except ValueError:
        return
    AttentionProcessorRegistry.register(kind, metadata)


def mesh_group(config: Any) -> dist.ProcessGroup:
    """Return the process group over which a `ContextParallelConfig` of diffusers splits heads in Ulysses attention."""
    group: dist.ProcessGroup = config._ulysses_mesh.get_group()
    return group
