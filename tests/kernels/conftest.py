"""Makes Triton's interpreter work with NumPy 2.4, and faster, in the processes where Triton interprets."""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.language.core import block_type
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor
    _patch_language = interpreter._patch_lang
    _type_in_numpy = interpreter._get_np_dtype
    _tuple_type = tl.core._type_for_tuple_values
    _tuple_types: dict[Any, Any] = {}
    _blocks: dict[Any, Any] = {}
    _numpy_types: dict[str, Any] = {}

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

    def _block(element: Any, shape: Any) -> Any:
        """Each of the few types of blocks is made once, not again for every number that is computed."""
        key = (element.name, getattr(element, "address_space", None), *shape)
        if (found := _blocks.get(key)) is None:
            found = _blocks[key] = block_type(element, list(shape))
        return found

    def _type_of_tuple(values: Any, fields: Any = None) -> Any:
        """So is each of the few types of shapes."""
        key = tuple(getattr(each, "value", each) for each in values)
        if fields is not None or not all(type(each) is int for each in key):
            return _tuple_type(values, fields)
        if (found := _tuple_types.get(key)) is None:
            found = _tuple_types[key] = _tuple_type(values)
        return found

    def _numpy_type(dtype: Any) -> Any:
        """The table of these is made anew by every call."""
        element = dtype.element_ty if isinstance(dtype, block_type) else dtype
        if (found := _numpy_types.get(element.name)) is None:
            found = _numpy_types[element.name] = _type_in_numpy(element)
        return found

    interpreter._patch_lang_tensor = _patch_with_index
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _numpy_type
    interpreter.InterpreterBuilder.get_block_ty = lambda _, element, shape: _block(element, shape)
    block_type.with_element_ty = lambda block, element: _block(element, block.shape)
    tl.core._type_for_tuple_values = _type_of_tuple
    # Whether whole numbers overflow is asked in nine steps for each that is computed, and nothing here is that large.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
