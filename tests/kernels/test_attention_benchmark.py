"""The attention benchmark compares functions with equal results, and its gates take the worst shape."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import kernel_attention as benchmark
from benchmarks.kernel_attention import AttentionShape, attention_gates, default, relative_error, row
from postgen.kernels.attention.backends import Call
from postgen.kernels.attention.ops import attention
from postgen.kernels.attention.router import Router

SHAPE = AttentionShape(name="Wan tiny", tokens=1000, heads=2, channels=64)


def call_of(dtype: torch.dtype) -> Call:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 300, 2, 64, dtype=dtype) for _ in range(3))
    return Call(query, key, value, 0.125, None, False)


def test_the_peer_computes_the_same() -> None:
    call = call_of(torch.float32)
    torch.testing.assert_close(default(*call[:3]), attention(*call[:3]))


def test_errors_are_those_of_the_number_format() -> None:
    call = call_of(torch.bfloat16)
    out = attention(*call[:3])
    assert 1e-4 < relative_error(out, call) < 4e-3
    assert relative_error(out * 1.1, call) > 0.05


def test_a_row_holds_what_was_measured() -> None:
    times = {"router": 1.01, "default": 1.3, "fa4": 1.0, "cudnn": 1.25, "flash": 2.0}
    found = row(SHAPE, times, {"xformers": "no"}, 1e-3, "", "fa4")
    assert (found["op"], found["chosen"], found["ours_ms"]) == ("attention", "fa4", 1.01)
    assert found["router_vs_best"] == 1.01
    assert found["router_vs_default"] == 1.3 / 1.01
    assert found["refused"] == {"xformers": "no"}
    # Attention takes 4 N^2 d H operations, here in 1.01 ms.
    assert found["tflop_per_s"] == 4 * 1000**2 * 64 * 2 / 1.01e-3 / 1e12


def test_the_row_without_a_backend_leaves_it_out() -> None:
    times = {"router": 1.01, "default": 1.3, "fa4": 1.0, "cudnn": 1.25, "flash": 2.0}
    found = row(SHAPE, times, {}, 1e-3, "fa4", "cudnn")
    assert found["op"] == "attention without fa4"
    assert found["backends_ms"] == {"cudnn": 1.25, "flash": 2.0}
    assert found["router_vs_best"] == 1.0
    assert found["ours_ms"] == 1.25
    assert row(SHAPE, {"router": 1.0, "default": 1.3}, {}, 1e-3, "fa4", "sdpa")["ours_ms"] == 1.3


def test_without_a_backend_the_router_takes_another() -> None:
    assert benchmark.without(Router(), "fa4", call_of(torch.float32)) == "sdpa"


def test_gates_take_the_worst_shape() -> None:
    good: dict[str, Any] = {
        "op": "attention", "router_vs_best": 1.0, "router_vs_default": 1.2, "relative_error": 3e-3, "shape": "Wan 14B"
    }  # fmt: skip
    rows = [good, {**good, "shape": "LTX x", "router_vs_default": 1.1}, {**good, "shape": "CogVideoX-5B"}]
    rows += [{**good, "op": "attention without fa4", "router_vs_default": 1.0}]
    assert all(each["ok"] for each in attention_gates(rows))
    slow = [*rows, {**good, "shape": "CogVideoX-5B", "router_vs_default": 1.1, "router_vs_best": 1.05}]
    assert [each["name"] for each in attention_gates(slow) if not each["ok"]] == [
        "router_vs_best",
        "router_vs_default",
    ]
    assert [each["name"] for each in attention_gates([good]) if not each["ok"]] == ["router_vs_default_ltx"]


def test_the_shapes_are_those_of_the_models() -> None:
    tokens = {shape.name: shape.tokens for shape in benchmark.SHAPES}
    assert tokens["Wan 14B 720p 81f"] == 21 * (720 // 16) * (1280 // 16)
    assert tokens["Wan 1.3B 480p 81f"] == 21 * (480 // 16) * (832 // 16)
    assert tokens["CogVideoX-5B 49f"] == 13 * (480 // 16) * (720 // 16) + 226
    assert tokens["HunyuanVideo 720p 129f"] == 33 * (720 // 16) * (1280 // 16) + 256
    assert tokens["LTX 97f 512x768"] == 13 * (512 // 32) * (768 // 32)
