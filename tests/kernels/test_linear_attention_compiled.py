"""The kernels of linear attention compile for Hopper with the launches of the table, within registers and memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from postgen.kernels.linear_attention.ops import SHARED_MEMORY
from tests.kernels.launches import compile_for, spilled_bytes

PASSES = ("keys", "queries", "grad_queries", "grad_sums", "grad_keys")
HOPPER_SHARED_MEMORY = 227 * 1024
"""The shared memory in bytes that a program may take on Hopper, where tiles are copied whole. On other GPUs the same
launch loads the tiles."""
ABSENT = ("rstd", "weight", "table", "lengths", "space", "time", "scales", "weights", "found")


def kernel(name: str) -> Any:
    from postgen.kernels.linear_attention import triton_backward, triton_convolution, triton_filters, triton_forward

    kernels = {
        "keys": triton_forward.sum_keys,
        "queries": triton_forward.read_state,
        "convolution": triton_convolution.convolve_rows,
        "grad_filters": triton_filters.sum_filters,
        "grad_sums": triton_forward.sum_keys,
        "grad_queries": triton_backward.grad_queries,
        "grad_keys": triton_backward.grad_keys,
    }
    return kernels[name]


def compiled(
    name: str, channels: int, dtype: str, *given: str, conv: int = 0, described: bool = False, **other: int
) -> Any:
    """Compile one pass with the named optional tensors; `other` replaces the launch of the table."""
    import torch

    from postgen.kernels.linear_attention import triton_launch
    from postgen.kernels.linear_attention.naive import Terms

    like = torch.empty(1, 1, 1, channels, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    terms = Terms(grid=(21, 45, 80), qk_norm="rms_norm" if "weight" in given else None)
    how = triton_launch.launch(f"turned_{name}" if "table" in given and name in PASSES else name, like)
    how = replace(how if described else how.by_threads, **other)
    given += {"grad_sums": ("scales", "weights"), "grad_queries": ("weights",)}.get(name, ())
    constants = triton_launch.constants(like, how, terms)
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
    function = kernel(name)
    streams = {"x", "query", "key", "value", "gradient", "out", "d_query", "d_key", "d_value"}
    floats = ("norm_eps", "eps")
    integers = ("weight_h", "first", "tokens", "tiles", "blocks", "whole", "bands", "band")
    sides = {"ADDS": conv > 0, "SPACE": max(conv, 1), "TIME": 3, "SIGN": 1, "TAPS": 40 * channels, "HEADS": 40}
    sides |= {
        "STACKED": how.stacked,
        "STRIP": how.strip,
        "BLOCK_E": min(how.channels, constants["BLOCK_E"]),
        "X_N": 120 * channels,
        "X_D": 1,
        "WHOLE": described,
        "CHAINED": described and how.rows_for_all_warps,
    }
    halves = {"table": "fp16", "terms": "bf16"} if dtype == "bf16" else {}
    names = [n for n in function.arg_names if not re.fullmatch("[A-Z_]+", n)]
    fixed = {**constants, **sides, **{f"{stream}_d": 1 for stream in streams}}
    fixed |= {n: None for n in ABSENT if n not in given}
    strides = [n for n in names if re.fullmatch(r"\w+_([bnh]|frame)", n)]
    present = [n for n in names if n not in (*fixed, *floats, *integers, *strides)]
    stream = f"tensordesc<{dtype}[1,{how.tokens},{channels}]>" if described else dtype
    return compile_for(
        function,
        {n: stream if n in streams else halves.get(n, "fp32") for n in present},
        {n: value for n, value in fixed.items() if n in function.arg_names},
        floats=[n for n in floats if n in names],
        integers=[n for n in integers if n in names],
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("name", PASSES)
def test_hardly_anything_is_spilled(name: str, channels: int, tmp_path: Path) -> None:
    found = compiled(name, channels, "bf16")
    # The fastest launch may spill a few bytes; a loop that spills its sums would spill thousands.
    assert spilled_bytes(found.asm["ptx"], tmp_path, "stores") <= (
        208 if (name, channels) == ("grad_queries", 64) else 128
    )
    assert found.metadata.shared <= SHARED_MEMORY[64 if channels == 64 else 256]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("table",)])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("name", PASSES)
def test_tiles_that_are_copied_whole(name: str, channels: int, more: tuple[str, ...], tmp_path: Path) -> None:
    found = compiled(name, channels, "bf16", *more, described=True)
    assert "cp.async.bulk.tensor" in found.asm["ptx"]
    # The spilled bytes are at most those of the variant in which threads load the tiles.
    loaded = spilled_bytes(compiled(name, channels, "bf16", *more).asm["ptx"], tmp_path, "stores")
    assert spilled_bytes(found.asm["ptx"], tmp_path, "stores") <= max(loaded, 64)
    assert found.metadata.shared <= HOPPER_SHARED_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "conv", "most"),
    [("keys", 0, 0), ("queries", 0, 0), ("convolution", 5, 64), ("grad_queries", 0, 64), ("grad_keys", 5, 256)],
)
def test_norm_rope_and_convolution_spill_little(name: str, conv: int, most: int, tmp_path: Path) -> None:
    more = ("space", "time") if name == "convolution" else ()
    found = compiled(name, 128, "bf16", "rstd", "weight", "table", *more, conv=conv)
    assert spilled_bytes(found.asm["ptx"], tmp_path, "stores") <= most
    assert found.metadata.shared <= SHARED_MEMORY[256]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize(("name", "filters"), [("convolution", ("space", "time")), ("grad_filters", ())])
def test_the_convolution_waits_in_registers(
    name: str, filters: tuple[str, ...], channels: int, tmp_path: Path
) -> None:
    found = compiled(name, channels, "bf16", *filters, conv=5)
    assert spilled_bytes(found.asm["ptx"], tmp_path, "stores") == 0
    assert found.metadata.shared <= SHARED_MEMORY[64 if channels == 64 else 256]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PASSES, "convolution"])
def test_wide_heads_fit(name: str, tmp_path: Path) -> None:
    more = ("space", "time") if name == "convolution" else ()
    found = compiled(name, 256, "bf16", "rstd", "weight", "table", *more, conv=5 if more else 0)
    assert spilled_bytes(found.asm["ptx"], tmp_path, "stores") <= 128
    assert found.metadata.shared <= SHARED_MEMORY[256]


@pytest.mark.slow
def test_the_largest_of_float32_fits() -> None:
    assert compiled("grad_keys", 128, "fp32").metadata.shared <= SHARED_MEMORY[256]
    assert compiled("convolution", 128, "fp32", "space", "time", conv=5).metadata.shared <= SHARED_MEMORY[256]
