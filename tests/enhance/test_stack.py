"""The attention processors: one who computes, wrappers around; the tap on diffusers' attention dispatcher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import postgen
from postgen.families import video_tokens_of
from postgen.families.attention.dispatch import install_attention_tap, tap_dispatched
from postgen.families.installed import processor_stack
from postgen.families.processors import ProcessorStack
from tests.families.tiny_models import TinyModel, tiny_model


@pytest.fixture
def wan() -> TinyModel:
    return tiny_model("Wan")


def push(tiny: TinyModel, name: str, wrapper: Callable[..., Any]) -> ProcessorStack:
    stack = processor_stack(tiny.transformer)
    names = video_tokens_of(tiny.transformer).attention_modules(tiny.transformer)
    stack.push(name, dict.fromkeys(names, wrapper))
    return stack


def claim(tiny: TinyModel, name: str, compute: Callable[..., Any]) -> ProcessorStack:
    stack = processor_stack(tiny.transformer)
    names = video_tokens_of(tiny.transformer).attention_modules(tiny.transformer)
    stack.claim(name, dict.fromkeys(names, compute))
    return stack


def noting(log: list[str], word: str) -> Callable[..., Any]:
    def wrapper(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        log.append(word)
        return inner(*args, **kwargs)

    return wrapper


def test_wrappers_run_from_the_outside_in(wan: TinyModel) -> None:
    off, log = wan(), []
    push(wan, "a", noting(log, "a"))
    push(wan, "b", noting(log, "b"))
    stack = claim(wan, "c", noting(log, "c"))
    assert stack.names == ("c", "a", "b")
    assert torch.equal(wan(), off)
    assert log == ["b", "a", "c"] * 2
    stack.pop("a")
    log.clear()
    wan()
    assert log == ["b", "c"] * 2
    assert "diffusers < c (computes) < b" in str(postgen.summary(wan.transformer))


def test_the_last_pop_gives_the_processors_back(wan: TinyModel) -> None:
    before = [block.attn1.processor for block in wan.transformer.blocks]
    stack = push(wan, "a", noting([], "a"))
    stack.push("b", {"blocks.0.attn1": noting([], "b")})
    stack.pop("a")
    now = [block.attn1.processor for block in wan.transformer.blocks]
    assert now[0] is not before[0]
    assert now[1] is before[1]
    stack.pop("b")
    assert wan.transformer.blocks[0].attn1.processor is before[0]
    assert stack.names == ()


def test_names_are_pushed_once_and_popped_by_those_who_are_there(wan: TinyModel) -> None:
    stack = push(wan, "a", noting([], "a"))
    with pytest.raises(postgen.UserError, match="a is on the attention processors already"):
        push(wan, "a", noting([], "a"))
    with pytest.raises(postgen.UserError, match=r"b is not on the attention processors\. On them: a"):
        stack.pop("b")


def test_attention_may_be_computed_by_others(wan: TinyModel) -> None:
    """Something else than diffusers' processor at the bottom: what stands above works on what it returns."""

    def linear(inner: Callable[..., Any], attention: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = attention.to_out[0](attention.to_v(x))
        return result

    stock = wan()
    claim(wan, "linear", linear)
    alone = wan()
    seen: list[str] = []
    stack = push(wan, "note", noting(seen, "note"))
    assert torch.equal(wan(), alone)
    stack.release("linear")
    assert not torch.equal(alone, stock)
    assert torch.equal(wan(), stock)
    assert len(seen) == 4


def test_diffusers_sees_the_processor_it_knows(wan: TinyModel) -> None:
    from diffusers.hooks._helpers import AttentionProcessorRegistry
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    push(wan, "a", noting([], "a"))
    processor = wan.transformer.blocks[0].attn1.processor
    assert isinstance(processor, WanAttnProcessor)
    assert type(processor).__name__ == "WanAttnProcessor"
    assert inspect.signature(processor.__call__) == inspect.signature(WanAttnProcessor().__call__)
    latte = tiny_model("Latte")
    push(latte, "a", noting([], "a"))
    known = AttentionProcessorRegistry.get(type(latte.transformer.temporal_transformer_blocks[0].attn1.processor))
    assert known is AttentionProcessorRegistry.get(AttnProcessor2_0)


def test_a_backend_chosen_meanwhile_stays(wan: TinyModel) -> None:
    stack = push(wan, "a", noting([], "a"))
    try:
        wan.transformer.set_attention_backend("_native_math")
        chosen = wan.transformer.blocks[0].attn1.processor._attention_backend
        stack.pop("a")
        assert wan.transformer.blocks[0].attn1.processor._attention_backend is chosen
    finally:
        wan.transformer.set_attention_backend("native")


@pytest.fixture
def later_backend() -> Iterator[Any]:
    """A backend that is registered after the tap was installed, under the name of one that cannot run here."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    install_attention_tap()
    name = AttentionBackendName("_native_npu")
    kept = _AttentionBackendRegistry._backends[name], _AttentionBackendRegistry._supported_arg_names[name]

    @_AttentionBackendRegistry.register(name)
    def backend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value

    yield name
    _AttentionBackendRegistry._backends[name], _AttentionBackendRegistry._supported_arg_names[name] = kept


def test_the_tap_sees_every_call_once(later_backend: Any) -> None:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    install_attention_tap()  # a second time changes nothing
    outer, inner = [], []
    q, k, v = torch.randn(3, 1, 6, 2, 8).unbind(0)
    with tap_dispatched(lambda query, key, scale, parallel: outer.append((query, key, scale, parallel))):
        dispatch_attention_fn(q, k, v, scale=0.5)
        with tap_dispatched(lambda query, *rest: inner.append(query)):
            dispatch_attention_fn(q, k, v, backend=later_backend)
        assert torch.equal(dispatch_attention_fn(q, k, v, backend=later_backend), v)
    dispatch_attention_fn(q, k, v)
    assert [(query is q, key is k, scale, parallel) for query, key, scale, parallel in outer] == [
        (True, True, 0.5, None),
        (True, True, None, None),
    ]
    assert len(inner) == 1


def test_another_thread_is_not_watched() -> None:
    from threading import Thread

    from diffusers.models.attention_dispatch import dispatch_attention_fn

    install_attention_tap()
    seen: list[Tensor] = []
    q = torch.randn(1, 6, 2, 8)
    with tap_dispatched(lambda query, *rest: seen.append(query)):
        other = Thread(target=dispatch_attention_fn, args=(q, q, q))
        other.start()
        other.join()
    assert not seen
