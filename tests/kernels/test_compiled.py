"""The kernels compile for GPUs that need not be present: the compiler refuses code that the interpreter accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.launches import HOPPER, compile_for, spilled_bytes

SHARED_MEMORY = 99 * 1024
"""The shared memory in bytes that a program may take on the smallest tested GPUs (compute capability 8.6 and 8.9)."""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("frames", "channels", "dtype"), [(13, 64, "bf16"), (21, 128, "bf16"), (33, 112, "fp16"), (64, 128, "bf16")]
)
def test_temporal_cfi(frames: int, channels: int, dtype: str, capability: int) -> None:
    from postgen.kernels.temporal_cfi import triton

    block_t, block_d = triton.blocks(frames, channels)
    launch = triton.launch_options(block_t, block_d, 4 if dtype == "fp32" else 2)
    compiled = compile_for(
        triton._diagonal_share,
        {"query": dtype, "key": dtype, "partial": "fp32"},
        {
            "query_d": 1,
            "key_d": 1,
            "HEADS": 12,
            "GROUP": 1,
            "FRAMES": frames,
            "CHANNELS": channels,
            "CAUSAL_BLOCK": 2,
            "BLOCK_T": block_t,
            "BLOCK_D": block_d,
        },
        floats=("logit_scale", "inverse_count"),
        integers=("tiles",),
        capability=capability,
        **launch,
    )
    assert compiled.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["norm", "norm, rms", "residual and norm", "residual"])
@pytest.mark.parametrize("channels", [1536, 5120])
def test_adaln(channels: int, kind: str, capability: int) -> None:
    from postgen.kernels.adaln import triton

    size, warps = triton.block(channels)
    pointers = {"x": "bf16"}
    if "norm" in kind:
        pointers |= {"scale": "fp32", "shift": "fp32", "out": "bf16"}
    if "residual" in kind:
        pointers |= {"y": "bf16", "gate": "fp32", "total": "bf16"}
    optional = ("y", "gate", "scale", "shift", "weight", "bias", "total", "out")
    constants = {name: None for name in optional if name not in pointers}
    constants |= {"CHANNELS": channels, "BLOCK": size, "RMS": "rms" in kind}
    compiled = compile_for(
        triton._norm_modulate, pointers, constants, floats=("eps",), capability=capability, num_warps=warps
    )
    # Loads have 16 bytes, so the compiler has detected that the elements are adjacent.
    assert "v4.b32" in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["sums", "scans", "reads"])
def test_frame_memory(name: str, capability: int, tmp_path: Path) -> None:
    from postgen.kernels.frame_memory import triton

    shared = triton.constants(name, 128)
    launch = {key: shared.pop(key) for key in ("num_warps", "num_stages")}
    if name == "sums":
        kernel: Any = triton._sum_frames
        integers: tuple[str, ...] = ("places",)
        floats: tuple[str, ...] = ()
        pointers = {"key": "bf16", "value": "bf16", "strength": "bf16", "grams": "fp32", "contents": "fp32"}
    elif name == "scans":
        kernel, integers, floats = triton._scan_frames, ("frames",), ()
        pointers = dict.fromkeys(("inverse", "content", "log_decay", "states"), "fp32")
    else:
        kernel, integers, floats = triton._read_frames, ("places", "tiles"), ("eps",)
        pointers = {"query": "bf16", "memory": "fp32", "weight": "fp32", "gate": "bf16", "out": "bf16"}
        shared["SPLITS"] = triton.SPLITS
    compiled = compile_for(
        kernel,
        pointers,
        {**shared, "HEADS": 40},
        floats=floats,
        integers=integers,
        capability=capability,
        **launch,
    )
    assert compiled.metadata.shared <= SHARED_MEMORY
    if capability == HOPPER:
        assert spilled_bytes(compiled.asm["ptx"], tmp_path) == 0


@pytest.mark.parametrize("capability", [80, 90])
def test_gated_sum(capability: int) -> None:
    from postgen.kernels.frame_memory import triton

    compiled = compile_for(
        triton._gated_sum,
        {"near": "bf16", "far": "bf16", "gate": "bf16", "out": "bf16"},
        {"HEADS": 40, "CHANNELS": 128, "BLOCK_N": 16, "BLOCK_D": 128},
        integers=("rows", "tokens"),
        capability=capability,
        num_warps=4,
    )
    assert "v4.b32" in compiled.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize(("space", "time"), [(5, 0), (1, 5)])
def test_grid_convolution(space: int, time: int, tmp_path: Path) -> None:
    """Window layers convolve only in space or only along time, without queries."""
    from postgen.kernels.linear_attention import triton_convolution, triton_launch
    from postgen.kernels.linear_attention.naive import Terms

    like = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
    how = triton_launch.launch("convolution", like)
    shared = triton_launch.constants(like, how, Terms(grid=(21, 45, 80)))
    launch = {key: shared.pop(key) for key in ("num_warps", "num_stages")}
    absent = ["query", "rstd", "weight", "table", "lengths", "terms", "key_sums", "space" if time else "time"]
    shared |= {"SPACE": space, "TIME": time, "SIGN": -1, "TAPS": 5120, "HEADS": 40, "STRIP": how.strip, "X_D": 1}
    shared |= {"STACKED": how.stacked, "BLOCK_E": min(how.channels, shared["BLOCK_E"]), "X_N": 5120, "query_d": 1}
    compiled = compile_for(
        triton_convolution.convolve_rows,
        {"x": "bf16", "out": "bf16", "time" if time else "space": "fp32"},
        {**{name: value for name, value in shared.items() if name != "TEXT"}, **dict.fromkeys(absent)},
        floats=("norm_eps", "eps"),
        integers=("weight_h", "taps_h", "blocks", "whole", "bands", "band"),
        **launch,
    )
    assert spilled_bytes(compiled.asm["ptx"], tmp_path) == 0
