"""Exact attention on the fastest kernel (`postgen.kernels.attention`) as an attention backend of diffusers.

    postgen.register_attention_backend()
    pipe.transformer.set_attention_backend("postgen")

It computes self-attention, told by as many queries as keys, and leaves the few keys of cross-attention to diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.attention import dispatch
from postgen.families.installed import transformers_of
from postgen.families.registry import video_tokens_of
from postgen.kernels.attention.ops import attention
from postgen.kernels.dispatch import warn_once

NAME = "postgen"
"""What `set_attention_backend` and diffusers' `attention_backend` take."""


def register_attention_backend() -> Any:
    """Make "postgen" a name that diffusers' `set_attention_backend` knows; a second time changes nothing.

    `set_attention_backend` also makes a backend the default of every other model in the process, and
    `reset_attention_backend` does not take that back: `routed_attention` leaves the default alone.

    Returns:
        diffusers' own object for the name.

    Raises:
        UserError: the installed diffusers has another attention dispatcher.
    """
    return dispatch.register_attention_backend(NAME, backend_attention)


@contextmanager
def routed_attention(target: Any) -> Iterator[None]:
    """While open, the self-attention of a pipeline or transformer runs on the backend "postgen".

    Only the modules that compute self-attention over the video are switched, and each goes back to the backend it had.

    Args:
        target: a diffusers pipeline, or one of its transformers.

    Raises:
        UserError: its model is not known, or calls torch's attention without asking diffusers for a backend.

    Example:
        with postgen.routed_attention(pipe):
            video = pipe(prompt).frames
    """
    backend = register_attention_backend()
    modules = [module for transformer in transformers_of(target).values() for module in _modules(transformer)]
    before = [dispatch.attention_settings(module.processor)[0] for module in modules]
    try:
        for module in modules:
            dispatch.set_attention_backend(module.processor, backend)
        yield
    finally:
        # Whatever processor is on the module by now.
        for module, kept in zip(modules, before, strict=True):
            dispatch.set_attention_backend(module.processor, kept)


def backend_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor | None:
    """Return exact self-attention on the fastest kernel, or None for calls that are left to diffusers.

    Args:
        query: (B, N, H, D).
        key: (B, N, Hk, D); with another number of tokens than the query it is cross-attention, which is left.
        value: (B, N, Hk, D).
        attn_mask: one bool a key, (B, N) or (B, 1, 1, N); masks of another kind are left, with a warning.
        scale: factor of the logits; None is D ** -0.5.
    """
    if query.shape[1] != key.shape[1]:
        return None
    if attn_mask is None:
        return attention(query, key, value, scale=scale)
    mask = _one_per_key(attn_mask, *key.shape[:2])
    if mask is None:
        # Compiled code has no place for a warning.
        if not torch.compiler.is_compiling():
            warn_once(
                "attention runs on diffusers' native backend: a mask"
                f" {tuple(attn_mask.shape)} of {attn_mask.dtype} is not one bool a key"
            )
        return None
    # Attention does not care about the order of keys: with those that count in front, their number is the mask.
    order = mask.int().argsort(dim=1, descending=True, stable=True)[..., None, None]
    counts = mask.sum(dim=1)
    key, value = (x.gather(1, order.expand_as(x)) for x in (key, value))
    out = attention(query, key, value, scale=scale, key_lengths=counts.clamp(min=1))
    # A sample of no keys gives 0, as torch's own attention does.
    return out.masked_fill((counts == 0).view(-1, 1, 1, 1), 0.0)


def _one_per_key(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """Return a mask as (B, N) bools, or None where it says more than which keys count."""
    if mask.dtype != torch.bool:
        return None
    if mask.dim() == 4 and mask.shape[1:] == (1, 1, keys) and mask.shape[0] in (1, batch):
        return mask[:, 0, 0].expand(batch, keys)
    return mask if mask.shape == (batch, keys) else None


def _modules(transformer: Any) -> list[Any]:
    tokens = video_tokens_of(transformer)
    if tokens.attention_call != "dispatch":
        raise UserError(
            f"{type(transformer).__name__} calls torch's attention itself,"
            " so no attention backend of diffusers acts on it"
        )
    modules = tokens.attention_modules(transformer)
    for name, module in modules.items():
        if not dispatch.takes_attention_backend(module.processor):
            raise UserError(
                f"{type(module.processor).__name__} of {name} asks diffusers for no attention backend, so none acts on"
                " it: set a processor of diffusers that does"
            )
    return list(modules.values())
