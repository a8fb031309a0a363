"""Exact attention on the fastest kernel (`postgen.kernels.attention`) as an attention backend of diffusers.

    postgen.register_attention_backend()
    pipe.transformer.set_attention_backend("postgen")

The backend computes self-attention, which it recognises by equal numbers of queries and keys. Cross-attention, which
has few keys, stays with diffusers.
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
"""The name of the backend for `set_attention_backend` and diffusers' `attention_backend`."""


def register_attention_backend() -> Any:
    """Register "postgen" as an attention backend of diffusers; a second call changes nothing.

    diffusers' `set_attention_backend` also changes the default backend of every other model in the process, and
    `reset_attention_backend` does not restore this default. `routed_attention` does not change the default.

    Returns:
        The object that diffusers keeps on processors as `_attention_backend`.

    Raises:
        UserError: the attention dispatcher of the installed diffusers is not the expected one.
    """
    return dispatch.register_attention_backend(NAME, backend_attention)


@contextmanager
def routed_attention(target: Any) -> Iterator[None]:
    """Run the self-attention of a pipeline or transformer on the backend "postgen" inside a `with` block.

    Only the modules that compute self-attention over the video change their backend. After the block each module has
    its earlier backend again.

    Args:
        target: a diffusers pipeline, or one of its transformers.

    Raises:
        UserError: the model is unknown, or it calls torch's attention directly, without a backend of diffusers.

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
        # The processor is read again here, because the caller may have replaced it inside the block.
        for module, kept in zip(modules, before, strict=True):
            dispatch.set_attention_backend(module.processor, kept)


def backend_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor | None:
    """Compute exact self-attention on the fastest kernel, or return None for calls that diffusers must compute.

    Args:
        query: (B, N, H, D).
        key: (B, N, Hk, D). A different number of tokens than in the query means cross-attention, which diffusers
            computes.
        value: (B, N, Hk, D).
        attn_mask: one bool per key, (B, N) or (B, 1, 1, N). Diffusers computes calls with other masks, with a warning.
        scale: factor of the logits; None is D ** -0.5.

    Returns:
        (B, N, H, D), or None.
    """
    if query.shape[1] != key.shape[1]:
        return None
    if attn_mask is None:
        return attention(query, key, value, scale=scale)
    mask = _one_per_key(attn_mask, *key.shape[:2])
    if mask is None:
        # torch.compile cannot trace a warning.
        if not torch.compiler.is_compiling():
            warn_once(
                "attention runs on diffusers' native backend, not on postgen: the mask"
                f" {tuple(attn_mask.shape)} of {attn_mask.dtype} is not one bool per key"
            )
        return None
    # The result does not depend on the order of the keys. So the unmasked keys are moved to the front, and their
    # number per sample, the key length, replaces the mask.
    order = mask.int().argsort(dim=1, descending=True, stable=True)[..., None, None]
    counts = mask.sum(dim=1)
    key, value = (x.gather(1, order.expand_as(x)) for x in (key, value))
    out = attention(query, key, value, scale=scale, key_lengths=counts.clamp(min=1))
    # A sample without unmasked keys has output 0, as in torch's own attention.
    return out.masked_fill((counts == 0).view(-1, 1, 1, 1), 0.0)


def _one_per_key(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """Return a key mask as (B, N) bools, or None if the mask has another dtype or also depends on heads or queries."""
    if mask.dtype != torch.bool:
        return None
    if mask.dim() == 4 and mask.shape[1:] == (1, 1, keys) and mask.shape[0] in (1, batch):
        return mask[:, 0, 0].expand(batch, keys)
    return mask if mask.shape == (batch, keys) else None


def _modules(transformer: Any) -> list[Any]:
    tokens = video_tokens_of(transformer)
    if tokens.attention_call != "dispatch":
        raise UserError(
            f"{type(transformer).__name__} calls torch's attention directly, so attention backends of diffusers have"
            " no effect on it"
        )
    modules = tokens.attention_modules(transformer)
    for name, module in modules.items():
        if not dispatch.takes_attention_backend(module.processor):
            raise UserError(
                f"{type(module.processor).__name__} of {name} does not use attention backends of diffusers: set a"
                " processor of diffusers that does"
            )
    return list(modules.values())
