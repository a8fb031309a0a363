"""Who computes attention: one claimant a module, refused before anything changes, under Enhance-A-Video."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import postgen
from postgen.families import video_tokens_of
from postgen.families.attention import AttentionReader, attention_of
from postgen.families.attention.dispatch import show_attention_call
from postgen.families.attention.reading import dispatched
from postgen.families.installed import installed, processor_stack
from postgen.families.processors import ProcessorStack
from tests.families.tiny_models import TinyModel, tiny_model

FIRST, SECOND = "blocks.0.attn1", "blocks.1.attn1"
ENHANCED = postgen.EnhanceAVideoConfig(relative_weight=0.4)


@pytest.fixture(scope="module")
def shared() -> TinyModel:
    return tiny_model("Wan", batch=2)


@pytest.fixture
def wan(shared: TinyModel) -> TinyModel:
    return copy.deepcopy(shared)


def same(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return inner(*args, **kwargs)


def nothing(inner: Callable[..., Any], attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(hidden_states)


def state(model: Any) -> tuple[Any, ...]:
    """What is on a model, and which objects its processors are."""
    stack = processor_stack(model)
    modules = video_tokens_of(model).attention_modules(model)
    processors = [(id(each.processor), getattr(each.processor, "postgen_wrappers", None)) for each in modules.values()]
    return stack.claims, stack.wrappers, processors


def test_the_claimant_stands_below_every_wrapper(wan: TinyModel) -> None:
    stack = processor_stack(wan.transformer)
    stack.push("around", {FIRST: same, SECOND: same})
    stock = wan()
    stack.claim("zeros", {FIRST: nothing})
    assert stack.claims == {"zeros": (FIRST,)}
    assert (stack.wrappers, stack.names) == (("around",), ("zeros", "around"))
    assert not torch.equal(wan(), stock)
    assert "attention processors: diffusers < zeros (computes) < around" in str(postgen.summary(wan.transformer))
    stack.release("zeros")
    assert torch.equal(wan(), stock)
    assert "attention processors: diffusers < around" in str(postgen.summary(wan.transformer))


def test_claimants_may_share_a_model_but_no_module(wan: TinyModel) -> None:
    stack = processor_stack(wan.transformer)
    stack.claim("a", {FIRST: nothing})
    stack.claim("b", {SECOND: same})
    assert "diffusers < a (computes 1), b (computes 1)" in str(postgen.summary(wan.transformer))
    before = state(wan.transformer)
    message = r"c cannot compute the attention of blocks\.1\.attn1: b computes it already\. Remove b, or exclude"
    for refuse in (stack.claim, stack.check_claim):
        with pytest.raises(postgen.UserError, match=message):
            refuse("c", {SECOND: same})
    assert state(wan.transformer) == before
    stack.release("b")
    stack.check_claim("c", [SECOND])
    stack.claim("c", {SECOND: same})
    assert stack.claims == {"a": (FIRST,), "c": (SECOND,)}


def claim_more(stack: ProcessorStack) -> None:
    stack.claim("late", {SECOND: same, FIRST: same})


def claim_again(stack: ProcessorStack) -> None:
    stack.claim("early", {SECOND: same})


def claim_unknown(stack: ProcessorStack) -> None:
    stack.claim("late", {SECOND: same, "blocks.7.attn1": same})


def claim_other(stack: ProcessorStack) -> None:
    stack.claim("late", {SECOND: same, "blocks.0.ffn": same})


def push_unknown(stack: ProcessorStack) -> None:
    stack.push("late", {SECOND: same, "attn9": same})


def push_as_claimant(stack: ProcessorStack) -> None:
    stack.push("early", {SECOND: same})


def release_nothing(stack: ProcessorStack) -> None:
    stack.release("late")


def pop_claimant(stack: ProcessorStack) -> None:
    stack.pop("early")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (claim_more, r"late cannot compute the attention of blocks\.0\.attn1: early computes it already"),
        (claim_again, "early is on the attention processors already: release it first"),
        (push_as_claimant, "early is on the attention processors already: release it first"),
        (claim_unknown, r"WanTransformer3DModel has no attention module 'blocks\.7\.attn1'"),
        (claim_other, r"WanTransformer3DModel has no attention module 'blocks\.0\.ffn'"),
        (push_unknown, "has no attention module 'attn9'"),
        (release_nothing, r"late computes no attention here\. Known: early"),
        (pop_claimant, r"early is not on the attention processors\. On them: early"),
    ],
)
def test_what_is_refused_changes_nothing(wan: TinyModel, act: Callable[[ProcessorStack], None], message: str) -> None:
    stack = processor_stack(wan.transformer)
    stack.claim("early", {FIRST: nothing})
    before, prediction = state(wan.transformer), wan()
    with pytest.raises(postgen.UserError, match=message):
        act(stack)
    assert state(wan.transformer) == before
    assert torch.equal(wan(), prediction)


def test_copies_keep_their_claims(wan: TinyModel) -> None:
    processor_stack(wan.transformer).claim("zeros", {FIRST: nothing}, dispatches=True)
    twin = copy.deepcopy(wan)
    processor_stack(wan.transformer).release("zeros")
    stack = processor_stack(twin.transformer)
    assert (stack.claims, stack.dispatches(FIRST), stack.dispatches(SECOND)) == ({"zeros": (FIRST,)}, True, False)
    assert not torch.equal(twin(), wan())


class Claimant:
    """A method that computes attention: queries and keys are scaled, so that others than diffusers' are measured."""

    def __init__(self, reader: AttentionReader, show: str, scale: float = 1.0) -> None:
        self.reader, self.show, self.scale = reader, show, scale

    def compute(self, inner: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any) -> Any:
        call = self.reader.bind(attention, *args, **kwargs)
        reading = self.reader.read(call)
        assert reading is not None
        query, key, value = reading.joined()
        query = query * self.scale
        if self.show == "dispatches":
            out = dispatched(attention, query, key, value, reading.mask)
        else:
            if self.show == "shows":
                show_attention_call(query, key)
            probabilities = torch.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
            if reading.mask is not None:
                probabilities = probabilities.masked_fill(~reading.mask, -torch.inf)
            out = torch.einsum("bhnm,bmhd->bnhd", probabilities.softmax(-1), value)
        return self.reader.finish(call, out, query.dtype)


def claim_all(tiny: TinyModel, show: str, scale: float = 1.0) -> ProcessorStack:
    stack, anatomy = processor_stack(tiny.transformer), attention_of(tiny.transformer)
    modules: dict[str, Any] = video_tokens_of(tiny.transformer).attention_modules(tiny.transformer)
    computes = {name: Claimant(anatomy.reader(each.processor), show, scale).compute for name, each in modules.items()}
    stack.claim("toy", computes, dispatches=show != "hides")
    return stack


@pytest.mark.parametrize("show", ["dispatches", "shows"])
@pytest.mark.parametrize("name", ["CogVideoX 1.5", "HunyuanVideo", "LTX", "Wan"])
@pytest.mark.filterwarnings("error:Enhance-A-Video")
def test_enhance_a_video_measures_what_the_claimant_uses(name: str, show: str) -> None:
    tiny = tiny_model(name, batch=2)
    handle = postgen.apply_enhance_a_video(tiny.transformer, ENHANCED)
    expected, gains = tiny(), handle.stats()
    stack = claim_all(tiny, show)
    assert torch.allclose(tiny(), expected, atol=1e-5)
    assert handle.stats().keys() == gains.keys()
    for layer, gain in handle.stats().items():
        assert gain == pytest.approx(gains[layer], abs=1e-5)
    stack.release("toy")
    claim_all(tiny, show, scale=4.0)
    first = next(iter(gains))
    tiny()
    assert handle.stats()[first] != pytest.approx(gains[first], abs=1e-4)
    assert "diffusers < toy (computes) < enhance_a_video" in str(postgen.summary(tiny.transformer))
    stack.release("toy")
    assert torch.equal(tiny(), expected)


@pytest.mark.parametrize("name", ["CogVideoX 1.5", "Wan"])
def test_enhance_a_video_says_that_it_sees_nothing(name: str) -> None:
    tiny = tiny_model(name, batch=2)
    stock = tiny()
    claim_all(tiny, "hides")
    handle = postgen.apply_enhance_a_video(tiny.transformer, ENHANCED)
    with pytest.warns(UserWarning, match="no attention call was seen"):
        assert torch.allclose(tiny(), stock, atol=1e-5)
    assert handle.stats() == {}
    assert "note: no attention call was seen" in str(postgen.summary(tiny.transformer))


def test_enhance_a_video_says_where_it_sees_nothing(wan: TinyModel) -> None:
    processor_stack(wan.transformer).claim("zeros", {FIRST: nothing})
    handle = postgen.apply_enhance_a_video(wan.transformer, ENHANCED)
    with pytest.warns(UserWarning, match=r"seen in 1 of 2 layers \(zeros hides it\)"):
        wan()
    assert list(handle.stats()) == [SECOND]


@pytest.mark.filterwarnings("error:Enhance-A-Video")
def test_modules_that_nobody_claims_are_measured_as_before() -> None:
    """CogVideoX calls torch's attention itself: the tap is chosen module by module."""
    tiny = tiny_model("CogVideoX 1.5", batch=2)
    handle = postgen.apply_enhance_a_video(tiny.transformer, ENHANCED)
    expected, gains = tiny(), handle.stats()
    modules: dict[str, Any] = video_tokens_of(tiny.transformer).attention_modules(tiny.transformer)
    name, module = next(iter(modules.items()))
    reader = attention_of(tiny.transformer).reader(module.processor)
    processor_stack(tiny.transformer).claim("toy", {name: Claimant(reader, "shows").compute}, dispatches=True)
    assert torch.allclose(tiny(), expected, atol=1e-5)
    assert handle.stats().keys() == gains.keys()
    assert all(handle.stats()[each] == pytest.approx(gains[each], abs=1e-5) for each in gains)


def test_nothing_is_kept_on_models_that_are_only_looked_at(wan: TinyModel) -> None:
    assert "nothing is on" in str(postgen.summary(wan.transformer))
    assert installed(wan.transformer).stack is None
