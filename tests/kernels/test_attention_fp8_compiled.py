"""The kernels around FP8 attention compile for Hopper, including their casts to and from E4M3."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from tests.kernels.launches import compile_for

INTEGERS = ("tokens", "heads")


@pytest.mark.parametrize("channels", [112])
def test_statistics(channels: int) -> None:
    from postgen.kernels.attention_fp8 import triton

    sizes = {"CHANNELS": channels, "BLOCK_N": 64, "BLOCK_D": 128 if channels > 64 else 64, "x_d": 1}
    for dtype in ("bf16", "fp8e4nv"):
        compile_for(triton._channel_sums, {"x": dtype, "out": "fp32"}, sizes, integers=(*INTEGERS, "splits", "share"))


@pytest.mark.parametrize(("channels", "rotates"), [(64, True), (112, True), (128, False)])
def test_changes(channels: int, rotates: bool) -> None:
    from postgen.kernels.attention_fp8 import triton

    sizes: dict[str, Any] = {"CHANNELS": channels, "BLOCK_N": 64, "BLOCK_D": 128 if channels > 64 else 64, "x_d": 1}
    pointers = {"x": "bf16", "minus": "fp32", "times": "fp32", "out": "fp8e4nv"}
    constants = {**sizes, "plus": None, "matrix": None, "BOUND": 448}
    if rotates:
        pointers["matrix"] = constants.pop("matrix") or "bf16"
    compiled = compile_for(triton._change, pointers, constants, integers=INTEGERS, floats=("length",))
    assert "cvt.rn.satfinite.e4m3x2" in compiled.asm["ptx"]
    # The output of attention is in E4M3 or in bfloat16.
    constants = {**sizes, "minus": None, "matrix": None, "BOUND": 0}
    for dtype in ("fp8e4nv", "bf16"):
        pointers = {"x": dtype, "times": "fp32", "plus": "fp32", "out": "bf16"}
        compile_for(triton._change, pointers, constants, integers=INTEGERS, floats=("length",))
