"""The kernels pass the real compiler, for GPUs that need not be here: it refuses things that the interpreter takes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.kernels.launches import compile_for

SHARED_MEMORY = 99 * 1024
"""Bytes that a program may take on the smallest GPUs we look at (compute capability 8.6, 8.9)."""


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
    # Sixteen bytes a load: the compiler saw that neighbours are neighbours.
    assert "v4.b32" in compiled.asm["ptx"]
