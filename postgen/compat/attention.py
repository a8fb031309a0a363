"""The attention of diffusers: its dispatcher, whose calls can be watched, and its processors."""

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
    """Who looks at the attention calls of this thread."""

    # Set in every thread rather than on the class: compiled code guards on the attribute being there.
    def __init__(self) -> None:
        self.sink: Callable[..., None] | None = None
        self.attend: Callable[..., torch.Tensor | None] | None = None


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


class divert_dispatched:
    """While open, let a function compute the attention calls of this thread that go through diffusers' dispatcher.

    `attend(query, key, value, attn_mask, scale, key_lengths)` gets (B, L, heads, D) tensors and returns the same, or
    None for calls that it leaves to the backend. Calls with dropout, causal ones, those of grouped heads and of
    context parallelism are never shown to it. `key_lengths` is None but where `attend_otherwise` was given them.
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
    """Return what `divert_dispatched` makes of an attention call that does not go through the dispatcher, or None."""
    attend = _tap.attend
    return None if attend is None else attend(query, key, value, None, None, key_lengths)


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
        sink, attend = _tap.sink, _tap.attend
        if args or (sink is None and attend is None):
            return backend(*args, **kwargs)
        _tap.sink = _tap.attend = None  # a backend may hand over to another one: a call is seen once
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
    special = call.get("dropout_p") or call.get("is_causal") or call.get("enable_gqa") or call.get("_parallel_config")
    if special:
        return None
    return attend(call["query"], call["key"], call["value"], call.get("attn_mask"), call.get("scale"), None)


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


def computes_natively(processor: Any) -> bool:
    """Whether a processor's attention is torch's own, which takes masks of numbers, and nothing stands on it."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if getattr(processor, "postgen_wrappers", ()) or not takes_attention_backend(processor):
        return False
    backend = attention_settings(processor)[0] or _AttentionBackendRegistry.get_active_backend()[0]
    return AttentionBackendName(backend) is AttentionBackendName.NATIVE


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


def mesh_group(config: Any) -> dist.ProcessGroup:
    """Return the processes among which a `ContextParallelConfig` of diffusers makes Ulysses attention trade heads."""
    group: dist.ProcessGroup = config._ulysses_mesh.get_group()
    return group
