"""Faster training steps on a GPU: the same computation in fewer and larger kernels.

A step of this small model launches about two thousand kernels, and the launches take longer than the computation. CUDA
graphs replay all launches at once. In addition, the rotary embedding of neighbouring pairs writes whole rows, whereas
the stock version writes every other element.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class RowRotaryAttention:
    """Processor of Wan's self-attention with the rotary embedding computed on whole rows; equal to the stock one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the attention output (B, N, D) of video tokens (B, N, D)."""
        if rotary_emb is None or encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("this processor is for Wan's self-attention only: pass rotary_emb, no text and no mask")
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        q = rotated(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), *rotary_emb)
        k = rotated(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)), *rotary_emb)
        q, k = q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2)
        out = functional.scaled_dot_product_attention(q, k, v)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2, 3))
        return attn.to_out[1](out)  # type: ignore[no-any-return]


def rotated(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to neighbouring pairs: x cos + swap(x) (-sin, +sin).

    Args:
        x_BNHD: queries or keys.
        cos, sin: broadcast to x; both values of a pair are equal, as in diffusers' tables.
    """
    swapped = x_BNHD.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    half = sin[..., 1::2]
    result: Tensor = x_BNHD * cos + swapped * torch.stack((-half, half), -1).flatten(-2)
    return result


def uncached_autocast(device: str) -> Any:
    """Return the active autocast without its cache; a cached cast of an earlier pass would be missing in a graph."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


class _Call(nn.Module):
    """The call for one set of input shapes, with its own graph; all calls share the parameters."""

    def __init__(self, function: Callable[..., Tensor], models: nn.ModuleDict) -> None:
        super().__init__()
        self.models, self.function = models, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class GraphedCall:
    """Replays `function(*inputs)` as CUDA graphs, forward and backward, one graph per set of input shapes.

    Gradients of two calls must not be accumulated, because a replay overwrites the memory of the previous one. The
    first call with a set of shapes records its graphs; no other autograd graph over `models` may exist at that time.

    Args:
        function: computes with the parameters of `models`, draws no random numbers, never synchronises the device.
        models: modules whose parameters receive gradients.
        share_memory: use the same memory for the intermediate results of all graphs. A backward pass must then end
            before the forward pass of another shape begins.
    """

    def __init__(
        self, function: Callable[..., Tensor], models: dict[str, nn.Module], *, share_memory: bool = False
    ) -> None:
        self._function, self._models = function, nn.ModuleDict(models)
        self._memory = torch.cuda.graph_pool_handle() if share_memory else None
        self._calls: dict[tuple[torch.Size, ...], Callable[..., Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's value; the first call with a set of shapes records its graphs."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._calls:
            samples = tuple(x.detach().clone() for x in inputs)
            call = _Call(self._function, self._models)
            graphed: Any = torch.cuda.make_graphed_callables(call, samples, num_warmup_iters=4, pool=self._memory)
            self._calls[shapes] = graphed
        return self._calls[shapes](*inputs)
