"""Access to queries and keys of processors that call torch's attention directly, without diffusers' dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class tap_sdpa(TorchFunctionMode):
    """Context manager that passes the inputs of every call of `F.scaled_dot_product_attention` to a function.

    The function is called as `sink(query, key, scale, None)` with views (B, L, heads, D), the layout of diffusers'
    dispatcher.
    """

    def __init__(self, sink: Callable[..., None]) -> None:
        super().__init__()
        self.sink = sink

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            self.sink(query.transpose(1, 2), key.transpose(1, 2), kwargs.get("scale"), None)
        return function(*args, **kwargs)
