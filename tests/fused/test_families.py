"""Fused blocks compared with the stock blocks of diffusers, on tiny models of every family."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention

import postgen
from postgen.families.attention import attention_of
from postgen.families.installed import installed
from postgen.fused.known import fused_blocks_of
from tests.families.tiny_models import TinyModel, tiny_model
from tests.fused.counted import count_operations

NAMES = (
    "CogVideoX 1.0",
    "CogVideoX 1.5",
    "HunyuanVideo",
    "LTX",
    "Wan",
    "Wan image-to-video",
    "Wan 2.2 text-and-image-to-video",
)
CONFIGS = (
    postgen.FusedOpsConfig(),
    postgen.FusedOpsConfig(adaln=False, attention=None),
    postgen.FusedOpsConfig(norm_rope=False, attention=None),
    postgen.FusedOpsConfig(norm_rope=False, adaln=False),
    postgen.FusedOpsConfig(adaln=False, attention="math"),
)


@pytest.fixture(scope="module", params=NAMES)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param, batch=2)


def test_predicts_the_same(tiny: TinyModel) -> None:
    expected, keys = tiny(), list(tiny.transformer.state_dict())
    for config in CONFIGS:
        handle = postgen.apply_fused_ops(tiny.transformer, config)
        with count_operations() as run:
            found = tiny()
        assert (found - expected).abs().max() < 1e-5
        assert list(tiny.transformer.state_dict()) == keys
        counts = handle.stats()[""]
        assert counts.keys() == {name for name in ("norm_rope", "adaln", "attention") if getattr(config, name)}
        assert set(counts.values()) == {tiny.attention_layers}
        assert run.counts["attention"] == counts.get("attention", 0)
        assert bool(run.counts["qk_norm_rope"]) == config.norm_rope
        assert bool(run.counts["norm_modulate"]) == bool(run.counts["gate_residual"]) == config.adaln
        handle.remove()
        assert torch.equal(tiny(), expected)


def test_removal_leaves_nothing(tiny: TinyModel) -> None:
    def everything() -> list[Any]:
        modules = dict(tiny.transformer.named_modules())
        return [(name, type(m), vars(m).keys(), id(getattr(m, "processor", None))) for name, m in modules.items()]

    installed(tiny.transformer)
    before = everything()
    postgen.apply_fused_ops(tiny.transformer)
    assert everything() != before
    postgen.remove_fused_ops(tiny.transformer)
    assert everything() == before
    assert not postgen.summary(tiny.transformer).transformers[0].plug_ins


def test_half_precision_stays_close(tiny: TinyModel) -> None:
    exact = tiny()
    rounded = copy.deepcopy(tiny)
    rounded.transformer.to(torch.bfloat16)
    rounded.arguments = {key: _to_bfloat16(value) for key, value in tiny.arguments.items()}
    stock = rounded()
    postgen.apply_fused_ops(rounded.transformer)
    fused = rounded()
    assert fused.dtype == torch.bfloat16
    # Fused operations round less often, so the error against float32 is not larger than that of diffusers.
    assert (fused - exact).norm() < 1.25 * (stock - exact).norm()


def _to_bfloat16(value: Any) -> Any:
    floats = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
    return value.to(torch.bfloat16) if floats else value


def test_gradients_are_the_same(tiny: TinyModel) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        tiny.transformer.zero_grad()
        tiny.transformer(**tiny.arguments, return_dict=False)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in tiny.transformer.named_parameters() if p.grad is not None}

    expected = gradients()
    handle = postgen.apply_fused_ops(tiny.transformer)
    found = gradients()
    handle.remove()
    tiny.transformer.zero_grad()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name


def test_fused_forms_take_the_arguments_of_what_they_stand_for(tiny: TinyModel) -> None:
    blocks, readers = fused_blocks_of(tiny.transformer), attention_of(tiny.transformer).readers
    for module in tiny.transformer.modules():
        known = blocks.get(type(module).__name__)
        if known is not None:
            assert _parameters(known.forward) == _parameters(type(module).forward)
        processor = getattr(module, "processor", None)
        if type(processor).__name__ in readers:
            own = _parameters(type(processor).__call__)
            bound = _parameters(readers[type(processor).__name__].bind)
            # `bind` has (attention, ...), and `__call__` has (self, attention, ...)
            assert bound[1:] == own[2:]


def _parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", ["Wan", "CogVideoX 1.5"])
def test_with_fused_projections(name: str) -> None:
    tiny = tiny_model(name, batch=2)
    tiny.transformer.fuse_qkv_projections()
    assert any(getattr(m, "fused_projections", False) for m in tiny.transformer.modules() if _attends(m))
    expected = tiny()
    postgen.apply_fused_ops(tiny.transformer)
    with count_operations() as run:
        assert (tiny() - expected).abs().max() < 1e-5
    assert run.counts["qk_norm_rope"] == 2


def _attends(module: Any) -> bool:
    return isinstance(module, Attention) or hasattr(module, "to_qkv")
