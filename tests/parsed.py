"""Syntax trees of the sources that several tests of the layout read: a parse takes longer than what they look for."""

from __future__ import annotations

import ast
from functools import cache


@cache
def tree_of(source: str) -> ast.Module:
    """Return the tree of a text; the same object for the same text, so nobody may change it."""
    return ast.parse(source)
