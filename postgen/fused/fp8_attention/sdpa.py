"""Replace the attention of processors that call torch's attention directly, without diffusers' dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class divert_sdpa(TorchFunctionMode):
    """Let a function compute calls of `F.scaled_dot_product_attention` inside a `with` block.

    Args:
        attend: a function as in `divert_dispatched`, with tensors (B, N, H, D). torch computes the calls for which it
            returns None, and all calls with dropout, causal masking or grouped heads.
    """

    def __init__(self, attend: Callable[..., Tensor | None]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            call = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            if not (call.get("dropout_p") or call.get("is_causal") or call.get("enable_gqa")):
                tensors = (call[name].transpose(1, 2) for name in ("query", "key", "value"))
                out = self.attend(*tensors, call.get("attn_mask"), call.get("scale"), None)
                if out is not None:
                    return out.transpose(1, 2)
        # `Tensor.unflatten` calls `super()`, which torch.compile cannot trace inside a mode; `torch.unflatten` works.
        return (torch.unflatten if function is Tensor.unflatten else function)(*args, **kwargs)
