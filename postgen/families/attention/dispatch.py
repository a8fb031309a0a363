"""Functions for attention calls of diffusers' dispatcher: observe them, replace them, and set the backend.

They use private symbols of diffusers and are therefore in `postgen.compat.attention`. Methods import them from here.
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
