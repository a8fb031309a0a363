"""Attention calls that go through diffusers' dispatcher: who looks at them, and which backend computes them.

What of it is private to diffusers is in `postgen.compat.attention`; methods take it from here.
"""

from __future__ import annotations

from postgen.compat.attention import (
    attend_otherwise,
    attention_settings,
    computes_natively,
    divert_dispatched,
    install_attention_tap,
    mesh_group,
    register_attention_backend,
    set_attention_backend,
    show_attention_call,
    takes_attention_backend,
    tap_dispatched,
)

__all__ = [
    "attend_otherwise",
    "attention_settings",
    "computes_natively",
    "divert_dispatched",
    "install_attention_tap",
    "mesh_group",
    "register_attention_backend",
    "set_attention_backend",
    "show_attention_call",
    "takes_attention_backend",
    "tap_dispatched",
]
