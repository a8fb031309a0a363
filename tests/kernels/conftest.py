"""Makes Triton's interpreter work with NumPy 2.4, and faster, in the processes where Triton interprets."""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor
    _patch_language = interpreter._patch_lang

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 keeps scalars as arrays of one number, which NumPy 2.4 no longer turns into an int."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    def _patch_once(function: Any) -> Any:
        """Every call of one kernel's function by another looks through the whole language for what is to be patched.

        It is patched from the launch on: what there is to find has been found.
        """
        used = [each for each in function.__globals__.values() if each is tl or each is tl.core]
        there = used and not any(tl.core.is_builtin(each.arange) for each in used)
        return interpreter._LangPatchScope() if there else _patch_language(function)

    interpreter._patch_lang_tensor = _patch_with_index
    interpreter._patch_lang = _patch_once
