"""Merged padding: the result of a stock call with fewer keys, and stock calls wherever the result would differ."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor

from postgen import register_attention_backend
from postgen.families.by_frame import modulated_by_frame
from postgen.families.installed import processor_stack
from postgen.families.padding import merged, merged_padding
from tests.families.test_by_frame import call_of
from tests.families.test_frame_levels import FRAMES, MAKERS

LENGTH, USED = 40, (7, 3)
"""Tokens of a prompt, and the numbers of tokens of two prompts that are not padding."""


def padded(call: dict[str, Any]) -> dict[str, Any]:
    """Return the call with prompts that are padded with zeros."""
    text = torch.randn(2, LENGTH, call["encoder_hidden_states"].shape[2], generator=torch.Generator().manual_seed(1))
    for row, used in zip(text, USED, strict=True):
        row[used:] = 0
    return {**call, "encoder_hidden_states": text}


def keys_seen(model: Any, call: dict[str, Any]) -> tuple[Tensor, int]:
    """Return the prediction with merged padding, and the number of text tokens in the last block."""
    seen: list[int] = []
    attention = model.blocks[-1].attn2
    hook = attention.register_forward_hook(lambda _, args, out: seen.append(args[1].shape[1]))
    with merged_padding(model):
        out = model(**call)[0]
    hook.remove()
    return out, seen[0]


@pytest.mark.parametrize("family", ["Wan", "SkyReels-V2"])
@pytest.mark.parametrize("by_frame", [False, True])
@torch.no_grad()
def test_merged_padding_gives_what_all_of_it_gives(family: str, by_frame: bool) -> None:
    pipe = MAKERS[family]()
    single, call = pipe.transformer, padded(call_of(pipe))
    double = copy.deepcopy(single).double()
    in_double = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
    hooks = [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in double.modules()]
    for model, told, within in ((double, in_double, 1e-13), (single, call, 2e-6)):
        with modulated_by_frame(model, FRAMES) if by_frame else nullcontext():
            expected = model(**told)[0]
            out, keys = keys_seen(model, told)
        assert keys == max(USED) + 1
        assert (out - expected).abs().max() <= within * expected.abs().max()
        short = {**told, "encoder_hidden_states": told["encoder_hidden_states"][:, :keys]}
        assert (model(**short)[0] - expected).abs().max() > 1e-5 * expected.abs().max()  # padding has an effect
    assert hooks == [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in double.modules()]


@torch.no_grad()
def test_one_attention_in_float64() -> None:
    attention = MAKERS["Wan"]().transformer.blocks[0].attn2.double()
    generator = torch.Generator().manual_seed(2)
    hidden, tokens = torch.randn(2, 9, 24, generator=generator).double(), torch.randn(2, LENGTH, 24).double()
    tokens[:, 5:] = tokens[:1, 5:6]
    short, count = merged(tokens)
    assert (short.shape[1], count) == (6, LENGTH - 5)
    bias = torch.tensor([0.0] * 5 + [math.log(LENGTH - 5)], dtype=torch.float64).view(1, 1, 1, 6)
    expected = attention(hidden, tokens)
    assert (attention(hidden, short, bias) - expected).abs().max() < 1e-14
    assert (attention(hidden, short) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_texts_without_padding_have_the_bits_of_a_stock_call() -> None:
    pipe = MAKERS["Wan"]()
    model, call = pipe.transformer, call_of(pipe)
    out, keys = keys_seen(model, call)
    assert keys == call["encoder_hidden_states"].shape[1]
    assert torch.equal(out, model(**call)[0])
    short, count = merged(torch.ones(2, 5, 3))
    assert short.shape == (2, 1, 3)
    assert count == 5


def _other_backend(pipe: Any) -> None:
    pipe.transformer.blocks[1].attn2.processor._attention_backend = register_attention_backend()


def _scaled(inner: Callable[..., Any], attention: Any, *args: Any, **words: Any) -> Any:
    return inner(attention, *args, **words) * 2


def _wrapped(pipe: Any) -> None:
    processor_stack(pipe.transformer).push("scaled", {"blocks.1.attn2": _scaled})


def _replaced(pipe: Any) -> None:
    block = pipe.transformer.blocks[1]
    block.forward = type(block).forward.__get__(block)


class _OwnProcessor:
    _attention_backend = None

    def __call__(self, attention: Any, hidden: Tensor, text: Tensor, mask: Any = None, rotary: Any = None) -> Tensor:
        return attention.to_out[0](hidden + attention.to_v(text).mean(1, keepdim=True))


def _unknown(pipe: Any) -> None:
    pipe.transformer.blocks[1].attn2.set_processor(_OwnProcessor())


def _half(pipe: Any) -> None:
    pipe.transformer.to(torch.bfloat16)


@pytest.mark.parametrize("change", [_other_backend, _wrapped, _replaced, _unknown, _half])
@torch.no_grad()
def test_what_may_take_no_bias_sees_the_whole_text(change: Callable[[Any], None]) -> None:
    pipe = MAKERS["Wan"]()
    change(pipe)
    model = pipe.transformer
    call = padded(call_of(pipe))
    call |= {name: call[name].to(model.dtype) for name in ("hidden_states", "encoder_hidden_states")}
    out, keys = keys_seen(model, call)
    assert keys == LENGTH
    assert torch.equal(out, model(**call)[0])


@torch.no_grad()
def test_defaults_of_the_process_autocast_image_tokens_gradients_and_threads_are_heeded() -> None:
    pipe = MAKERS["Wan"]()
    model, call = pipe.transformer, padded(call_of(pipe))
    with attention_backend(register_attention_backend()):
        assert keys_seen(model, call)[1] == LENGTH
    with torch.autocast("cpu", torch.bfloat16):
        assert keys_seen(model, call)[1] == LENGTH
    with torch.enable_grad():
        assert keys_seen(model, call)[1] == LENGTH
    expected, found = model(**call)[0], []

    def elsewhere() -> None:
        with torch.no_grad():
            found.append(model(**call)[0])

    with merged_padding(model):
        worker = threading.Thread(target=elsewhere)
        worker.start()
        worker.join()
    assert torch.equal(found[0], expected)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    with_image = type(model).from_config(model.config, image_dim=8, added_kv_proj_dim=width)
    with merged_padding(with_image):
        assert not with_image._forward_pre_hooks
    with merged_padding(model):
        assert model._forward_pre_hooks
