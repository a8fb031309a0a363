"""Converted blocks use the right token grid when they run outside the transformer's forward pass: under gradient
checkpointing, where blocks run again in the backward pass, and in compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.lit import ChunkOptions, LitConfig, LitOptions, MhlaOptions, WindowOptions, convert, layers_of
from postgen.lit.options import LINEAR_TYPES
from tests.families.tiny_models import TinyModel, tiny_model


@pytest.mark.parametrize("kind", LINEAR_TYPES)
def test_every_layer_type(kind: str) -> None:
    tiny = converted(kind)
    check(tiny, [tiny.arguments["hidden_states"]])


def test_two_grids() -> None:
    """Two calls with different grids of equal size before one backward pass: blocks run again on their own grids."""
    tiny = converted("lit")
    wide = tiny.arguments["hidden_states"]
    check(tiny, [wide, wide.transpose(3, 4)])


def test_compiled_on_several_grids() -> None:
    """A compiled model uses the grid of the current call, not of the previous call or of the compilation."""
    tiny = converted("lit", layers=1, first_block=True)
    assert layers_of(tiny.transformer)
    model: Any = tiny.transformer
    x = tiny.arguments["hidden_states"]
    sizes = [x, x.transpose(3, 4)]
    expected = [tiny(hidden_states=each) for each in sizes]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for each, out in zip([*sizes, x], [*expected, expected[0]], strict=True):
            made: Any = compiled(**{**tiny.arguments, "hidden_states": each}, return_dict=False)
            assert torch.equal(made[0], out)
    torch.compiler.reset()


def converted(kind: str, *, layers: int = 2, **more: Any) -> TinyModel:
    tiny = tiny_model("Wan", batch=2, layers=layers)
    config = LitConfig(
        layers=f"all:{kind}", grid=(4, 2, 3), lit=LitOptions(conv_init="default"), mhla=MhlaOptions(blocks=(1, 2, 1)),
        chunk=ChunkOptions(frames=1), window=WindowOptions(radius=0), **more,
    )  # fmt: skip
    convert(tiny.transformer, config)
    return tiny


def check(tiny: TinyModel, calls: list[Tensor]) -> None:
    """Check that one backward pass through the calls has the same gradients with and without checkpointing."""
    model: Any = tiny.transformer.train()
    grads = []
    for _ in range(2):
        losses = [model(**{**tiny.arguments, "hidden_states": x})[0].square().mean() for x in calls]
        torch.stack(losses).sum().backward()
        grads.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
        model.zero_grad()
        model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
