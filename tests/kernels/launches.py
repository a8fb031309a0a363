"""Checks that every kernel must pass on a GPU, and compilation for a GPU that need not be present."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HOPPER = 90


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_repeats(call: Callable[[], Any], times: int = 20) -> None:
    """Check that repeated launches return equal bits."""
    first = [x.clone() for x in as_tuple(call())]
    for _ in range(times):
        for expected, found in zip(first, as_tuple(call()), strict=True):
            assert torch.equal(expected, found)


def assert_records(call: Callable[[], Any]) -> None:
    """Check that a CUDA graph can record the call, so nothing waits for the GPU, and that a replay has equal bits."""
    expected = [x.clone() for x in as_tuple(call())]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        static = as_tuple(call())
    for x in static:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for x, found in zip(expected, static, strict=True):
        assert torch.equal(x, found)


def assert_compiles_whole(function: Callable[..., Any], *args: Any) -> None:
    """Check that torch.compile compiles the function without a graph break and that the result has equal bits."""
    expected = as_tuple(function(*args))
    torch.compiler.reset()
    found = as_tuple(torch.compile(function, fullgraph=True)(*args))
    for x, y in zip(expected, found, strict=True):
        assert torch.equal(x, y)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of the difference divided by the L2 norm of `expected`, computed in float64."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def compile_for(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    floats: Sequence[str] = (),
    integers: Sequence[str] = (),
    capability: int = HOPPER,
    **options: int,
) -> Any:
    """Compile a kernel for a GPU that need not be present.

    Args:
        kernel: a function decorated with `triton.jit`.
        pointers: argument -> dtype of its elements, or a whole type `tensordesc<..>` for a tensor descriptor.
        constants: argument -> constant value.
        floats: the arguments of type float32.
        integers: the arguments of type int32. All remaining arguments are 64-bit strides, divisible by 16.
        capability: the compute capability of the GPU, 90 for Hopper.
        options: options of Triton's compiler.

    Returns:
        Triton's compiled kernel; `metadata.shared` is the shared memory of a program in bytes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {
        **dict.fromkeys(names, "i64"),
        **dict.fromkeys(floats, "fp32"),
        **dict.fromkeys(integers, "i32"),
        **{name: dtype if dtype.startswith("tensordesc") else f"*{dtype}" for name, dtype in pointers.items()},
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = [name for name, dtype in types.items() if dtype == "i64" or dtype.startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, dict(constants), attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(ptx: str, folder: Path, kinds: str = "stores|loads") -> int:
    """Return how many bytes a thread spills to memory, as reported by the assembler that Triton uses for Hopper."""
    from triton.backends.nvidia.compiler import get_ptxas

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    said = subprocess.run(
        [get_ptxas(HOPPER).path, "-v", f"--gpu-name=sm_{HOPPER}a", source, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    return sum(map(int, re.findall(rf"(\d+) bytes spill (?:{kinds})", said)))
