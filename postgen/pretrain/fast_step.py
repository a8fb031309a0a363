"""The denoiser's training step on a GPU without idle time: the same function in fewer and larger kernels.

A step of this small model issues about two thousand kernels, which takes the host longer than the GPU computes. CUDA
graphs replay them at once; a rotation of neighbouring pairs that writes whole rows replaces one that writes every
other element.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class RowRotaryAttention:
    """Processor of Wan's self-attention that computes the rotary embedding on whole rows; the same function."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention output (B, N, D) of video tokens (B, N, D)."""
        if rotary_emb is None or encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("this processor is for Wan's self-attention: a rotary embedding, no text and no mask")
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        q = rotated(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), *rotary_emb)
        k = rotated(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)), *rotary_emb)
        q, k = q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2)
        out = functional.scaled_dot_product_attention(q, k, v)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2, 3))
        return attn.to_out[1](out)  # type: ignore[no-any-return]


def rotated(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs, x cos + swap(x) (-sin, +sin).

    Args:
        x_BNHD: queries or keys.
        cos, sin: broadcast to x; the two values of a pair are equal, as diffusers' tables have them.
    """
    swapped = x_BNHD.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    half = sin[..., 1::2]
    result: Tensor = x_BNHD * cos + swapped * torch.stack((-half, half), -1).flatten(-2)
    return result


def uncached_autocast(device: str) -> Any:
    """The autocast that is entered, but its casts are not kept: one from an earlier pass would miss in a graph."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


class _Call(nn.Module):
    """One shape of the call, with its own graph; the parameters are shared by all."""

    def __init__(self, function: Callable[..., Tensor], models: nn.ModuleDict) -> None:
        super().__init__()
        self.models, self.function = models, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class GraphedCall:
    """`function(*inputs)` replayed as CUDA graphs, forward and backward, one graph for each set of input shapes.

    The gradients of two calls must not be accumulated: a replay writes into the memory of the one before. While graphs
    are recorded, at the first call with a set of shapes, no other autograd graph over `models` may be alive.

    Args:
        function: computes with the parameters of `models`, draws no random number, never waits for the device.
        models: whose parameters get gradients.
        share_memory: keep what lies between inputs and outputs of all graphs in the same memory. Then a backward pass
            must end before the forward pass of another shape begins.
    """

    def __init__(
        self, function: Callable[..., Tensor], models: dict[str, nn.Module], *, share_memory: bool = False
    ) -> None:
        self._function, self._models = function, nn.ModuleDict(models)
        self._memory = torch.cuda.graph_pool_handle() if share_memory else None
        self._calls: dict[tuple[torch.Size, ...], Callable[..., Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's value; the first call with a set of shapes records its graphs."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._calls:
            samples = tuple(x.detach().clone() for x in inputs)
            call = _Call(self._function, self._models)
            graphed: Any = torch.cuda.make_graphed_callables(call, samples, num_warmup_iters=4, pool=self._memory)
            self._calls[shapes] = graphed
        return self._calls[shapes](*inputs)
