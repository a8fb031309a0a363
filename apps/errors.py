"""How the page says that something is wrong: one line, and nothing in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from postgen.errors import UserError

T = TypeVar("T")


def said(ask: Callable[[], T]) -> T:
    """Return what a function returns; what it has to say to the user goes to the page.

    Raises:
        gradio.Error: instead of a `UserError`.
    """
    import gradio as gr

    try:
        return ask()
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
