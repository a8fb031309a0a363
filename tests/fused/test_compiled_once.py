"""Blocks that are compiled separately share their code: plug-ins must not cause a compilation for every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import postgen
from postgen.families import layout_of
from tests.families.tiny_models import tiny_model

PLUG_INS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "fused": (postgen.apply_fused_ops, 1),
    "enhance": (postgen.apply_enhance_a_video, 1),
    "fp8_linears": (lambda model: postgen.apply_fp8_linears(model, postgen.FP8LinearConfig(simulate=True)), 1),
    "fp8_attention": (
        lambda model: postgen.apply_fp8_attention(
            model,
            postgen.FP8AttentionConfig(
                first_exact_steps=0, last_exact_steps=0, exact_layers=("blocks.1.attn1",), simulate=True
            ),
        ),
        2,
    ),
}
"""Plug-in -> a function that applies it, and the number of different kinds of layers that result."""


@pytest.mark.parametrize("name", PLUG_INS)
def test_a_kind_of_layer_is_compiled_once(name: str) -> None:
    put, kinds = PLUG_INS[name]
    model = tiny_model("Wan", layers=3)
    put(model.transformer)
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    try:
        for block in model.transformer.blocks:  # type: ignore[union-attr]
            block.compile(fullgraph=True, backend=backend)
        with torch.no_grad():
            model()
    finally:
        torch.compiler.reset()
    assert len(compiled) == kinds


def test_fp8_attention_is_traced_where_processors_call_torch_themselves() -> None:
    """Fused operations split heads by `Tensor.unflatten`, which torch.compile cannot trace in a function mode."""
    model = tiny_model("CogVideoX 1.0", layers=1)
    postgen.apply_fused_ops(model.transformer)
    config = postgen.FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True)
    postgen.apply_fp8_attention(model.transformer, config)
    torch.compiler.reset()
    try:
        with torch.no_grad():
            plain = model()
            for block in layout_of(model.transformer).block_modules(model.transformer).values():
                block.compile(fullgraph=True, backend="eager")
            torch.testing.assert_close(model(), plain)
    finally:
        torch.compiler.reset()


def test_each_class_of_blocks_has_its_own_limit_of_recompilations() -> None:
    """torch counts by code object. HunyuanVideo has two classes of blocks, and the first block gets other strides."""
    model = tiny_model("HunyuanVideo", layers=2)
    blocks = layout_of(model.transformer).block_modules(model.transformer).values()
    config = postgen.FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True)
    fused, linears = postgen.apply_fused_ops, PLUG_INS["fp8_linears"][0]
    attention = partial(postgen.apply_fp8_attention, config=config)
    torch.compiler.reset()
    try:
        for block in blocks:
            block.compile(fullgraph=True, backend="eager")
        for form in ((), (fused,), (fused, linears), (fused, attention), (fused, attention, linears)):
            handles = [apply(model.transformer) for apply in form]
            with torch.no_grad():
                model()
            for handle in reversed(handles):
                handle.remove()
    finally:
        torch.compiler.reset()
    assert len({type(block) for block in blocks}) == 2


def test_settings_of_attention_that_come_back_are_not_compiled_again() -> None:
    """Otherwise, switching between settings would reach torch's limit of recompilations."""
    from postgen.fused.fp8_attention import fp8_attention_for_call

    model, compiled = tiny_model("Wan", layers=2), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    for block in model.transformer.blocks:  # type: ignore[union-attr]
        block.compile(fullgraph=True, backend=backend)
    counts = []
    for _ in range(2):
        for preparation in ("plain", "key_mean", "key_mean+rotation"):
            config = postgen.FP8AttentionConfig(
                first_exact_steps=0, last_exact_steps=0, simulate=True, preparation=preparation
            )
            with fp8_attention_for_call(model.transformer, config):
                model()
            counts.append(len(compiled))
    assert counts == [1, 2, 3, 3, 3, 3]
    torch.compiler.reset()
