"""The linear layers of repeated blocks that process the many video or image tokens, by their part of the block.

Low precision saves time and memory there. Layers that process only the few text tokens belong to no part: keys and
values of cross-attention, and the layers of a separate text stream.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from postgen.families.calls import self_attention_names
from postgen.families.linear import role_of

if TYPE_CHECKING:
    from torch import nn

LinearPart = Literal["attention", "cross_attention", "feed_forward", "feed_forward_out"]
"""The projections of queries, keys, values and output in self-attention; the projections of queries and output in
cross-attention to text; the first linear layer of a feed-forward network; its layer after the activation."""

_FEW_TOKENS = re.compile(r"context|txt|text|audio|\bav_|\badd_|to_add_out")
_ADDED = re.compile(r"\bpostgen_")
"""Names of layers that a postgen method added to the model, such as the gates of linear attention."""
_KEY_OR_VALUE = re.compile(r"(to_)?(k|v|kv|key|value)(_proj)?")
_QUERY_KEY_VALUE = re.compile(r"(to_)?(q|k|v|query|key|value)(_proj)?")
_AFTER_ACTIVATION = re.compile(r".*\.(net\.2|proj_out|out_layer|linear_2|fc2|w2|down_proj)")


class LinearParts:
    """Assigns the linear layers of a transformer to parts.

    Args:
        model: the transformer.

    Raises:
        UserError: the class of the transformer has no layout; the message lists the known classes.
    """

    def __init__(self, model: nn.Module) -> None:
        # Last components of the names: where a model has spatial and temporal self-attention, both have the same one.
        self._own = {name.rpartition(".")[2] for name in self_attention_names(model)}

    def of(self, name: str) -> LinearPart | None:
        """Return the part of a layer, or None for a layer of text tokens or outside attention and feed-forward."""
        role = role_of(name)
        if role not in ("attention", "feed_forward") or _FEW_TOKENS.search(name) or _ADDED.search(name):
            return None
        if role == "feed_forward":
            return "feed_forward_out" if _AFTER_ACTIVATION.fullmatch(name) else "feed_forward"
        if self._own.intersection(name.split(".")[:-1]):
            return "attention"
        return None if _KEY_OR_VALUE.fullmatch(name.rpartition(".")[2]) else "cross_attention"


def shares_input(name: str, part: str) -> bool:
    """Return whether a layer is one of the query, key and value projections, which read the same tokens in turn."""
    return part == "attention" and _QUERY_KEY_VALUE.fullmatch(name.rpartition(".")[2]) is not None
