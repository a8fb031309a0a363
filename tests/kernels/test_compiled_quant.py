"""The kernels of quantised layers compile for GPUs that need not be present, with wide loads and without spills."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.launches import HOPPER, compile_for, spilled_bytes

ROUNDING = {"LARGEST": 448.0, "SMALLEST": 1e-28}
WIDE = "v4.b32"
"""A load or store of 16 bytes."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("whole", [True, False])
def test_int8_product(whole: bool, capability: int, tmp_path: Path) -> None:
    from postgen.kernels.int8_rows import triton

    tiles = triton.LARGE if capability == HOPPER and whole else triton.USUAL
    compiled = compile_for(
        triton._product,
        {"x": "i8", "weight": "i8", "x_scale": "fp32", "weight_scale": "fp32", "bias": "bf16", "out": "bf16"},
        {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_K": tiles.terms, "TOGETHER": 8, "WHOLE": whole},
        integers=("m", "k"),
        capability=capability,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    assert compiled.metadata.shared <= (227 if capability == HOPPER else 99) * 1024
    assert "s32.s8.s8" in compiled.asm["ptx"]  # the tensor cores multiply int8
    if capability == HOPPER:
        assert spilled_bytes(compiled.asm["ptx"], tmp_path) == 0


@pytest.mark.parametrize("dtype", ["fp8e4nv", "i8"])
@pytest.mark.parametrize(("columns", "block"), [(1536, 128), (5120, 128), (13824, 64), (5120, 1024)])
def test_hadamard_rows(columns: int, block: int, dtype: str, tmp_path: Path) -> None:
    from postgen.kernels.hadamard_rows import triton

    groups, ahead = triton.groups_of(columns), triton.loads_ahead(columns, block, 2)
    pointers = {"x": "bf16", "signs": "bf16", "right": "bf16", "codes": dtype, "scale": "fp32"}
    pointers |= {"left": "bf16"} if block > triton.WIDTH else {}
    constants = {**ROUNDING, "INTEGER": dtype == "i8", "GROUPS": groups, "WIDTH": triton.WIDTH, "ROWS": 8}
    constants |= {} if "left" in pointers else {"left": None}
    compiled = compile_for(
        triton._rotate,
        pointers,
        constants,
        integers=("rows",),
        floats=("factor",),
        num_warps=triton.warps(groups),
        num_stages=2 if ahead else 1,
    )
    assert WIDE in compiled.asm["ptx"]
    assert compiled.metadata.shared <= triton.shared_bytes(columns, block, 2) <= 227 * 1024
    assert spilled_bytes(compiled.asm["ptx"], tmp_path) == 0


@pytest.mark.parametrize("planes", [0, 2])
@pytest.mark.parametrize(("bits", "out"), [(4, "bf16"), (4, "fp8e4nv"), (3, "bf16"), (8, "i8")])
def test_weight_expand(bits: int, out: str, planes: int, tmp_path: Path) -> None:
    from postgen.kernels.weight_expand import triton

    pointers = {"codes": "u8", "scale": "bf16" if planes else "fp32", "out": out}
    pointers |= {} if out == "bf16" else {"row_scale": "fp32"}
    constants = {"zero": None, "table": None, "BITS": bits, "PLANES": planes, "SIGNED": True, "LARGEST": 448.0}
    constants |= {"INTEGER": out == "i8", "PIECE": 64, "COUNT": 32}
    constants |= {} if "row_scale" in pointers else {"row_scale": None}
    compiled = compile_for(triton._expand, pointers, constants, integers=("groups", "share", "pieces"), num_warps=4)
    assert WIDE in compiled.asm["ptx"]
    assert spilled_bytes(compiled.asm["ptx"], tmp_path) == 0


def test_fp8_parts(tmp_path: Path) -> None:
    from postgen.kernels.fp8_blocks import triton

    compiled = compile_for(
        triton._quantize,
        {"x": "bf16", "codes": "fp8e4nv", "scale": "fp32"},
        {**ROUNDING, "PART": 128, "BLOCK": 32},
        integers=("tokens",),
        num_warps=4,
    )
    assert WIDE in compiled.asm["ptx"]
    assert spilled_bytes(compiled.asm["ptx"], tmp_path) == 0


@pytest.mark.parametrize("dtype", ["fp8e4nv", "i8"])
@pytest.mark.parametrize("columns", [1536, 5120, 13824])
def test_rows(columns: int, dtype: str, tmp_path: Path) -> None:
    from postgen.kernels import triton_rows

    chunk, chunks = triton_rows.chunks_of(columns)

    compiled = compile_for(
        triton_rows._quantize,
        {"x": "bf16", "codes": dtype, "scale": "fp32"},
        {**ROUNDING, "INTEGER": dtype == "i8", "CHUNK": chunk, "CHUNKS": chunks, "WHOLE": columns % chunk == 0},
        num_warps=triton_rows.warps(chunk),
    )
    # Each number is loaded once, 16 bytes at a time, and no number needs a division.
    assert len(re.findall(r"ld\.global[.\w]*v4\.b32", compiled.asm["ptx"])) == chunks
    assert compiled.asm["ptx"].count("div.") + compiled.asm["ptx"].count("rcp.") < chunks
    assert spilled_bytes(compiled.asm["ptx"], tmp_path) == 0
