"""Patches that let Triton's interpreter run with NumPy 2.4, and faster, in processes with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import torch
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
        """Convert scalars to int: Triton 3.6 keeps them as arrays of one number, which NumPy 2.4 does not convert."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    def _patch_once(function: Any) -> Any:
        """Patch the language only if it is not patched yet.

        Without this, every call from one Triton function to another searches the whole language for functions to
        patch, although the launch of the kernel has already patched them.
        """
        used = [each for each in function.__globals__.values() if each is tl or each is tl.core]
        there = used and not any(tl.core.is_builtin(each.arange) for each in used)
        return interpreter._LangPatchScope() if there else _patch_language(function)

    def _block(element: Any, shape: Any) -> Any:
        """Return the type of a block from a cache, instead of creating it for every computed value."""
        key = (element.name, getattr(element, "address_space", None), *shape)
        if (found := _blocks.get(key)) is None:
            found = _blocks[key] = block_type(element, list(shape))
        return found

    def _type_of_tuple(values: Any, fields: Any = None) -> Any:
        """Return the type of a tuple of integers, such as a shape, from a cache."""
        key = tuple(getattr(each, "value", each) for each in values)
        if fields is not None or not all(type(each) is int for each in key):
            return _tuple_type(values, fields)
        if (found := _tuple_types.get(key)) is None:
            found = _tuple_types[key] = _tuple_type(values)
        return found

    def _numpy_type(dtype: Any) -> Any:
        """Return the NumPy dtype from a cache; Triton's own function builds its table in every call."""
        element = dtype.element_ty if isinstance(dtype, block_type) else dtype
        if (found := _numpy_types.get(element.name)) is None:
            found = _numpy_types[element.name] = _type_in_numpy(element)
        return found

    _convert = interpreter._convert_float

    def _convert_float(numbers: Any, source: Any, target: Any, mode: Any) -> Any:
        """Cast to E4M3 by torch: the interpreter rounds ties up and loses the carry into the exponent."""
        if (source, target) != (tl.float32, tl.float8e4nv):
            return _convert(numbers, source, target, mode)
        given = torch.from_numpy(np.ascontiguousarray(numbers))
        return given.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
        """Round once, as a fused multiply-add does: products of float32 numbers are exact in float64."""
        with np.errstate(all="ignore"):
            total = x.data.astype(np.float64) * y.data + z.data
            return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_fma = _fma
    interpreter._patch_lang_tensor = _patch_with_index
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _numpy_type
    interpreter.InterpreterBuilder.get_block_ty = lambda _, element, shape: _block(element, shape)
    block_type.with_element_ty = lambda block, element: _block(element, block.shape)
    tl.core._type_for_tuple_values = _type_of_tuple
    # The overflow check takes nine steps for each computed integer, and no integer here is large enough to overflow.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
