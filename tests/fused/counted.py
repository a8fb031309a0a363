"""Count the operations of postgen that a call runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class count_operations(TorchDispatchMode):
    """Context manager that counts the calls of postgen's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function.name().partition("::")
        if namespace == "postgen":
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
