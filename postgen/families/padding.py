"""Exact cross-attention to prompts with unmasked padding, with fewer keys.

Wan and SkyReels-V2 pad a prompt with zeros to 512 tokens and attend to all of them. Equal tokens have equal keys and
values, and n equal keys have the same weight as one key whose score is larger by log n: exp(s + log n) = n exp(s). So
one token replaces the n equal tokens at the end, and an additive mask has log n at its place. Results differ by
rounding only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from postgen.compat import unwrap
from postgen.errors import UserError
from postgen.families.attention.dispatch import computes_natively
from postgen.families.attention.registry import attention_of
from postgen.families.by_frame import altered

_MODELS = ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel")
"""Classes that project the text token by token and use it only in their blocks' cross-attention, without a mask."""
_CROSS = "attn2"


@contextmanager
def merged_padding(network: nn.Module) -> Iterator[None]:
    """Merge the padding of prompts into one token, in forward passes that this thread makes inside the context.

    The context merges padding only on the CPU in float32 or float64. On a GPU, the search for the padding would force
    a synchronisation; in half precision, log n is too coarse. The context also changes nothing if

    - gradients are enabled, or autocast is on;
    - the network or a block is compiled, or its `forward` was replaced;
    - cross-attention uses another processor or attention backend than the default ones of diffusers;
    - the network takes image tokens in addition to the text;
    - the network is not of a class in `_MODELS`.

    Args:
        network: the transformer, which may be wrapped.
    """
    model = unwrap(network)
    if torch.is_grad_enabled() or not _fits(network, model):
        yield
        return
    merging = _Merging()
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(merging.before_model, with_kwargs=True).remove)
        for block in _blocks(model):
            attention = block.get_submodule(_CROSS)
            stack.callback(attention.register_forward_pre_hook(merging.before_attention).remove)
        yield


def merged(text: Tensor) -> tuple[Tensor, int]:
    """Return a text encoding (B, L, D) without the repetitions of its last token, and the count of that token.

    A position counts as a repetition only if all rows of the batch repeat their last token there.

    >>> short, count = merged(torch.tensor([[[3.0], [7.0], [0.0], [0.0], [0.0]]]))
    >>> short.flatten().tolist(), count
    ([3.0, 7.0, 0.0], 3)
    """
    same = (text == text[:, -1:]).all(2).all(0)
    count = int(same.flip(0).int().cumprod(0).sum())
    return text[:, : text.shape[1] - max(count, 1) + 1], max(count, 1)


def _blocks(model: Any) -> list[nn.Module]:
    return list(model.blocks)


def _fits(network: nn.Module, model: Any) -> bool:
    """Whether merged padding leaves the result of this network unchanged."""
    if type(model).__name__ not in _MODELS or model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    blocks = _blocks(model)
    if model.dtype not in (torch.float32, torch.float64) or any(map(altered, (network, model, *blocks))):
        return False
    anatomy = attention_of(model)
    for block in blocks:
        attention: Any = block.get_submodule(_CROSS)
        if attention.add_k_proj is not None or not computes_natively(attention.processor):
            return False
        try:
            anatomy.reader(attention.processor)  # checks the fingerprint of the processor's code
        except UserError:
            return False
    return True


class _Merging:
    """Forward pre-hooks, active in one thread only."""

    def __init__(self) -> None:
        self.caller = threading.get_ident()
        self.bias: Tensor | None = None
        """(1, 1, 1, keys) added to the cross-attention scores of this forward pass; None if nothing is merged."""

    def before_model(self, model: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> Any:
        if threading.get_ident() != self.caller:
            return None
        self.bias = None
        text = words.get("encoder_hidden_states")
        if not isinstance(text, Tensor) or text.dim() != 3 or not text.shape[1]:
            return None
        short, count = merged(text)
        if count == 1:
            return None
        self.bias = text.new_zeros(1, 1, 1, short.shape[1])
        self.bias[..., -1] = math.log(count)
        return args, {**words, "encoder_hidden_states": short}

    def before_attention(self, attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.bias is None or threading.get_ident() != self.caller:
            return None
        hidden, text, _, *rest = args  # the third argument, the mask, is None in all blocks of these classes
        return (hidden, text, self.bias.to(hidden.dtype), *rest)
