"""How a tab says that something is wrong: in one line, on the page, with nothing in the server's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import gradio as gr

from postgen.errors import UserError

T = TypeVar("T")


def said(ask: Callable[[], T]) -> T:
    """Return what a function returns; what it says to the user goes to the page.

    Raises:
        gr.Error: instead of `UserError`.
    """
    try:
        return ask()
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
