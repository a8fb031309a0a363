"""How every command ends: a wrong input is one line on standard error and exit code 2, and no traceback."""

from __future__ import annotations

import sys

from postgen.compat import command_error
from postgen.errors import UserError, cut_words

STOPPED = "postgen: stopped; no half-written file was left"
"""What is said after Ctrl-C."""

_WORD = 400


def tell(message: str) -> None:
    """Write a message to standard error, in one line; of a word that is longer than any path, a part."""
    print(cut_words(message, _WORD), file=sys.stderr)


def tell_error(error: BaseException) -> int | None:
    """Say what the user did wrong, in one line.

    Returns:
        The exit code; None for an exception that is a defect of ours, of which nothing is said.
    """
    if isinstance(error, UserError):
        tell(f"postgen: error: {error}")
        return 2
    if (told := command_error(error)) is None:
        return None
    if told[0]:  # nothing is to be said where typer has shown the help of a group instead
        tell(f"postgen: error: {told[0]} (see {told[2] or 'postgen'} --help)")
    return told[1]
