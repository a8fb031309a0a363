"""Makes Triton's interpreter work with NumPy 2.4, in the processes where Triton interprets."""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 keeps scalars as arrays of one number, which NumPy 2.4 no longer turns into an int."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_index
