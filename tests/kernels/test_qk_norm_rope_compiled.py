"""The kernel of norm and rotation compiles for Hopper without register spills, with wide loads and stores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from postgen.kernels.qk_norm_rope.triton import _qk_norm_rope, blocks
from tests.kernels.launches import compile_for, spilled_bytes


def compiled(heads: int, channels: int, *, int8: bool = False, step: int = 2, capability: int = 90, **changes: Any):
    """Compile for bfloat16 inputs and for tables of which every `step`-th number is read."""
    block_h, block_d, warps = blocks(heads, channels)
    pointers = dict.fromkeys(["q", "k", "q_weight", "k_weight"], "bf16") | {"cos": "fp32", "sin": "fp32"}
    pointers |= dict.fromkeys(["q_out", "k_out"], "i8" if int8 else "bf16")
    if int8:
        pointers |= dict.fromkeys(["q_scale", "k_scale", "k_shift"], "fp32")
    absent = [
        name for name in ("v", "v_out", "q_bias", "k_bias", "k_shift", "q_scale", "k_scale") if name not in pointers
    ]
    sizes = {"HEADS": heads, "KEY_HEADS": heads, "CHANNELS": channels, "BLOCK_H": block_h, "BLOCK_D": block_d}
    constants = {**dict.fromkeys(absent), **sizes, "HALF": False, "TABLE_PER_HEAD": False, "table_d": step, **changes}
    return compile_for(
        _qk_norm_rope,
        pointers,
        constants,
        floats=("eps",),
        integers=("first_token", "rotated"),
        capability=capability,
        num_warps=warps,
    )


@pytest.mark.parametrize(
    ("heads", "channels", "options"),
    [
        (40, 128, {"NORM": "rms_norm_across_heads"}),
        (12, 128, {"NORM": "rms_norm_across_heads", "step": 1}),
        (24, 128, {"NORM": "rms_norm"}),
        (48, 64, {"NORM": "layer_norm"}),
        (32, 64, {"NORM": "rms_norm_across_heads", "TABLE_PER_HEAD": True}),
        (20, 112, {"NORM": "rms_norm"}),
        (16, 96, {"NORM": "rms_norm", "HALF": True}),
        (16, 80, {"NORM": "none"}),
        (40, 128, {"NORM": "rms_norm_across_heads", "int8": True}),
    ],
)
def test_on_hopper(heads: int, channels: int, options: dict[str, Any], tmp_path: Path) -> None:
    weights = {"q_weight": None, "k_weight": None} if options["NORM"] == "none" else {}
    ptx = compiled(heads, channels, **options, **weights).asm["ptx"]
    assert spilled_bytes(ptx, tmp_path) == 0
    if not options.get("HALF"):
        # A load has 16 bytes; results other than int8 are stored with 16 bytes too.
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
        assert options.get("int8") or re.search(r"st\.global[\w.:]*\.v4\.b32", ptx)
    if options["NORM"] == "rms_norm" and not options.get("HALF") and channels in (80, 128):
        # The norm, rotation and layout of a head need no exchange through shared memory.
        assert "ld.shared" not in ptx


def test_on_older_gpus() -> None:
    assert compiled(24, 128, NORM="rms_norm", capability=80).asm["ptx"]
