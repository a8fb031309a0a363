"""Fused operations and other methods that compute attention exclude each other; a refusal changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import postgen
from postgen.families import video_tokens_of
from postgen.families.installed import installed, processor_stack
from postgen.fused import fused_for_call
from postgen.fused.blocks import is_fused
from tests.families.tiny_models import TinyModel, tiny_model
from tests.fused.counted import count_operations

REFUSED = r"fused_ops cannot compute the attention of blocks\.1\.attn1: toy computes it already\. Remove toy"


@pytest.fixture(scope="module")
def shared() -> TinyModel:
    return tiny_model("Wan")


@pytest.fixture
def wan(shared: TinyModel) -> TinyModel:
    return copy.deepcopy(shared)


def toy(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return -inner(*args, **kwargs)


def state(model: Any) -> tuple[Any, ...]:
    """Return what is applied to a model: processors, blocks, plug-ins."""
    modules = video_tokens_of(model).attention_modules(model)
    processors = [(id(m.processor), getattr(m.processor, "postgen_wrappers", None)) for m in modules.values()]
    stack = processor_stack(model)
    return stack.claims, stack.names, processors, [*map(type, model.blocks)], dict(installed(model).plug_ins)


def test_they_do_not_go_where_somebody_computes(wan: TinyModel) -> None:
    first, second = copy.deepcopy(wan.transformer), wan.transformer
    processor_stack(second).claim("toy", {"blocks.1.attn1": toy})
    before, prediction = [state(each) for each in (first, second)], wan()
    pipe = SimpleNamespace(components={"transformer": first, "transformer_2": second})
    with pytest.raises(postgen.UserError, match=REFUSED):
        postgen.apply_fused_ops(pipe)
    with pytest.raises(postgen.UserError, match=REFUSED), fused_for_call(pipe, True):
        pass
    assert [state(each) for each in (first, second)] == before
    assert torch.equal(wan(), prediction)
    # Fused operations outside attention can be combined with it.
    handle = postgen.apply_fused_ops(pipe, postgen.FusedOpsConfig(norm_rope=False, attention=None))
    assert torch.allclose(wan(), prediction, atol=1e-5)
    for settings in ({"norm_rope": True}, {"attention": "auto"}):
        with pytest.raises(postgen.UserError, match=REFUSED):
            handle.update(**settings)
        assert handle.config == postgen.FusedOpsConfig(norm_rope=False, attention=None)
    handle.remove()
    assert [state(each) for each in (first, second)] == before
    processor_stack(second).release("toy")
    assert postgen.apply_fused_ops(pipe).stats()["transformer_2"]["attention"] == 2


def test_nobody_computes_where_they_are(wan: TinyModel) -> None:
    stack = processor_stack(wan.transformer)
    postgen.apply_fused_ops(wan.transformer)
    before, prediction = state(wan.transformer), wan()
    message = r"toy cannot compute the attention of blocks\.\d\.attn1 and 1 more: fused_ops computes it already"
    modules = video_tokens_of(wan.transformer).attention_modules(wan.transformer)
    for refuse in (stack.claim, stack.check_claim):
        with pytest.raises(postgen.UserError, match=message):
            refuse("toy", dict.fromkeys(modules, toy))
    with pytest.raises(postgen.UserError, match="are on this transformer already"):
        postgen.apply_fused_ops(wan.transformer)
    assert state(wan.transformer) == before
    assert torch.equal(wan(), prediction)


def test_the_place_may_be_taken_while_they_are_off(wan: TinyModel) -> None:
    first, second = copy.deepcopy(wan.transformer), wan.transformer
    pipe = SimpleNamespace(components={"transformer": first, "transformer_2": second})
    handle = postgen.apply_fused_ops(pipe)
    handle.disable()
    processor_stack(second).claim("toy", {"blocks.1.attn1": toy})
    before, prediction, config = [state(each) for each in (first, second)], wan(), handle.config
    with pytest.raises(postgen.UserError, match=REFUSED):
        handle.enable()
    with pytest.raises(postgen.UserError, match=REFUSED), fused_for_call(pipe, True):
        pass
    assert [state(each) for each in (first, second)] == before
    assert not any(map(is_fused, [*first.blocks, *second.blocks]))
    assert (handle.enabled, handle.config) == (False, config)
    assert torch.equal(wan(), prediction)
    processor_stack(second).release("toy")
    handle.enable()
    with count_operations() as run:
        wan()
    assert run.counts["attention"] == 2
