"""FP8 linear layers with torch.compile: no graph breaks, one graph for all blocks, gradients, call settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import postgen
from postgen.families import layout_of
from postgen.fp8_linear import fp8_linears_for_call
from tests.families.tiny_models import TinyModel, tiny_model
from tests.kernels.launches import relative_error

QUIET = postgen.FP8LinearConfig(simulate=True)


@pytest.fixture
def wan() -> Iterator[TinyModel]:
    torch.compiler.reset()
    yield tiny_model("Wan", layers=2)
    torch.compiler.reset()


def compile_blocks(model: Any, backend: Any) -> None:
    for block in layout_of(model).block_modules(model).values():
        block.compile(fullgraph=True, backend=backend)


def test_one_graph_for_all_blocks(wan: TinyModel) -> None:
    """All blocks share one graph; guards on layer names would recompile every block, up to torch's limit."""
    stock, counter = wan(), CompileCounterWithBackend("aot_eager")
    handle = postgen.apply_fp8_linears(wan.transformer, QUIET)
    on = wan()
    compile_blocks(wan.transformer, counter)
    torch.testing.assert_close(wan(), on, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    handle.disable()
    assert relative_error(wan(), stock) < 1e-5
    # Settings of single calls do not recompile.
    for _ in range(2):
        with fp8_linears_for_call(wan.transformer, QUIET):
            assert relative_error(wan(), on) < 1e-5
        assert relative_error(wan(), stock) < 1e-5
    assert counter.frame_count == 2


@pytest.mark.slow
def test_lora_is_trained_through_compiled_blocks(wan: TinyModel) -> None:
    from peft import LoraConfig

    model: Any = wan.transformer.requires_grad_(False)
    postgen.apply_fp8_linears(model, QUIET)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "net.2"], init_lora_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[torch.Tensor]:
        loss = model(**wan.arguments, return_dict=False)[0].square().mean()
        return list(torch.autograd.grad(loss, trained))

    expected = gradients()
    model.enable_gradient_checkpointing()
    model.train()
    for one, other in zip(gradients(), expected, strict=True):
        assert torch.equal(one, other)
    compile_blocks(model, "aot_eager")
    for one, other in zip(gradients(), expected, strict=True):
        assert relative_error(one, other) < 1e-4


@pytest.mark.slow
def test_inductor(wan: TinyModel) -> None:
    postgen.apply_fp8_linears(wan.transformer, QUIET)
    on = wan()
    compile_blocks(wan.transformer, "inductor")
    assert relative_error(wan(), on) < 1e-3
