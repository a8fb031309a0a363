"""Fused operations with torch.compile: no more graphs than without, and equal results."""

from __future__ import annotations

import copy

import pytest
import torch

import postgen
from tests.enhance.test_compile import LAYERS, compile_blocks, fresh_compiler
from tests.families.tiny_models import tiny_model

__all__ = ["fresh_compiler"]  # a fixture for every test of this file


@pytest.mark.parametrize("name", ["CogVideoX 1.5", "HunyuanVideo", "LTX", "Wan"])
def test_no_graph_more_than_without(name: str) -> None:
    plain = tiny_model(name, layers=LAYERS)
    expected = plain()
    fused = copy.deepcopy(plain)
    handle = postgen.apply_fused_ops(fused.transformer)
    without = compile_blocks(plain, "eager")
    plain()
    torch._dynamo.reset()
    counter = compile_blocks(fused)
    assert torch.allclose(fused(), expected, atol=1e-5)
    # HunyuanVideo's first tokens are a transposed view, which fused blocks make contiguous, unlike stock blocks.
    assert counter.frame_count == without.frame_count + (name == "HunyuanVideo")
    if name != "HunyuanVideo":
        # Fused operations of compiled blocks can be removed: each form is compiled once.
        handle.remove()
        assert torch.allclose(fused(), expected, atol=1e-5)
        postgen.apply_fused_ops(fused.transformer)
        assert torch.allclose(fused(), expected, atol=1e-5)
        assert counter.frame_count == 2 * without.frame_count


def test_with_enhance_a_video_in_one_graph() -> None:
    tiny = tiny_model("CogVideoX 1.5")
    postgen.apply_enhance_a_video(tiny.transformer, postgen.EnhanceAVideoConfig(relative_weight=0.4))
    expected = tiny()
    postgen.apply_fused_ops(tiny.transformer)
    tiny.transformer.compile(fullgraph=True, backend="aot_eager")
    assert torch.allclose(tiny(), expected, atol=1e-5)
