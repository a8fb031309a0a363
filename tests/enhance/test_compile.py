"""Compiled code: as many graphs as without Enhance-A-Video, and the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import postgen
from tests.families.tiny_models import TinyModel, tiny_model

CONFIG = postgen.EnhanceAVideoConfig(relative_weight=0.4)
# More than the eight recompilations that Dynamo allows a code object.
LAYERS = 9


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_blocks(tiny: TinyModel, backend: str = "aot_eager") -> Any:
    """Compile block by block, without a graph break, and count the graphs, whose number no backend changes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    if tiny.transformer._repeated_blocks:
        tiny.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    else:
        for block in tiny.transformer.transformer_blocks:
            block.compile(fullgraph=True, backend=counter)
    return counter


@pytest.mark.parametrize("name", ["CogVideoX 1.0", "HunyuanVideo", "LTX", "Wan"])
def test_no_graph_more_than_without(name: str) -> None:
    plain = tiny_model(name, batch=2, layers=LAYERS)
    enhanced = copy.deepcopy(plain)
    handle = postgen.apply_enhance_a_video(enhanced.transformer, CONFIG)
    expected = enhanced()
    gains = handle.stats()
    without = compile_blocks(plain, "eager")
    off = plain()
    torch._dynamo.reset()
    counter = compile_blocks(enhanced)
    assert torch.allclose(enhanced(), expected, atol=1e-5)
    assert counter.frame_count == without.frame_count > 0
    assert handle.stats().keys() == gains.keys()
    handle.disable()
    assert torch.allclose(enhanced(), off, atol=1e-5)
    assert (off - expected).abs().max() > 1e-3


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models_can_be_enhanced_afterwards(whole: bool) -> None:
    tiny = tiny_model("Wan", layers=LAYERS)
    enhanced = copy.deepcopy(tiny)
    postgen.apply_enhance_a_video(enhanced.transformer, CONFIG)
    if whole:
        tiny.transformer.compile(fullgraph=True, backend="eager")
    else:
        compile_blocks(tiny, "eager")
    off = tiny()
    handle = postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
    assert torch.allclose(tiny(), enhanced(), atol=1e-5)
    handle.remove()
    assert torch.allclose(tiny(), off, atol=1e-6)


def test_new_weights_are_not_compiled_again_and_again() -> None:
    tiny = tiny_model("Wan", layers=LAYERS)
    handle = postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
    counter = compile_blocks(tiny)
    tiny()
    handle.update(relative_weight=0.3)
    tiny()
    graphs = counter.frame_count
    for weight in (0.1, 0.2, 0.35):
        handle.update(relative_weight=weight)
        tiny()
        assert max(handle.stats()["blocks.0.attn1"]) > 1
    assert counter.frame_count == graphs


def test_whole_models_in_one_graph_each() -> None:
    for name in ("Wan", "LTX"):
        tiny = tiny_model(name)
        postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
        expected = tiny()
        tiny.transformer.compile(fullgraph=True, backend="aot_eager")
        assert torch.allclose(tiny(), expected, atol=1e-5)


@pytest.mark.filterwarnings("error:Enhance-A-Video")
def test_a_whole_model_keeps_its_warnings_for_the_summary() -> None:
    tiny = tiny_model("Wan")
    handle = postgen.apply_enhance_a_video(tiny.transformer, postgen.EnhanceAVideoConfig(weight=9.0))
    tiny.transformer.compile(fullgraph=True, backend="eager")
    tiny()
    assert "note: weight 9 is strong for 4 latent frames" in str(postgen.summary(tiny.transformer))
    handle.update(weight=0.5)
    assert "note" not in str(postgen.summary(tiny.transformer))
