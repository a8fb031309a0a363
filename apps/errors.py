"""Errors on the page: one line for the user, and no traceback in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from postgen.apps.jobs import Progress
from postgen.errors import UserError

T = TypeVar("T")


def said(ask: Callable[[], T]) -> T:
    """Call a function and return its result; show its `UserError` on the page.

    Raises:
        gradio.Error: the function raised a `UserError`; the message is the same.
    """
    import gradio as gr

    try:
        return ask()
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def raise_failed(progress: Progress) -> None:
    """Show why a job failed, in a message that stays until the user closes it.

    Event handlers call this after they have yielded the state of the job. The error stops further updates of the
    page, so buttons that are not released before would stay disabled.

    Raises:
        gradio.Error: the job failed.
    """
    import gradio as gr

    if progress.error is not None:
        raise gr.Error(progress.error, print_exception=False, duration=None)
