"""How the page says that something is wrong: one line, and nothing in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from postgen.apps.jobs import Progress
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


def raise_failed(progress: Progress) -> None:
    """Tell why a job failed, in a message that stays. A page calls it after it has yielded how the job stands.

    What is raised leaves the page as it is: buttons that were not released before would stay as of a running job.

    Raises:
        gradio.Error: the job failed.
    """
    import gradio as gr

    if progress.error is not None:
        raise gr.Error(progress.error, print_exception=False, duration=None)
