"""Cache of syntax trees for the tests of the layout, because parsing takes longer than the checks."""

from __future__ import annotations

import ast
from functools import cache


@cache
def tree_of(source: str) -> ast.Module:
    """Return the syntax tree of a text. It is the same object for the same text, so do not change it."""
    return ast.parse(source)
