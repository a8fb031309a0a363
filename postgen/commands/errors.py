"""Messages and exit codes of commands: wrong input prints one line on standard error and exits with code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from postgen.commands.usage import usage_words
from postgen.compat import command_error
from postgen.errors import SettingError, UserError, cut_words

STOPPED = "no half-written file was left"
"""Message after Ctrl-C of a command that has no message of its own."""

_standing: list[Callable[[], str]] = []

_WORD = 400
"""Largest number of characters of a word in a message."""


@contextmanager
def when_stopped(standing: Callable[[], str]) -> Iterator[None]:
    """Context manager that sets the message of `tell_stopped` for the case that a signal ends the block.

    Args:
        standing: function that returns the message in one line: the progress so far, and how to continue.
    """
    _standing.append(standing)
    yield
    _standing.remove(standing)  # not after an exception, because `tell_stopped` needs the message later


def tell_stopped() -> None:
    """Print that the command was stopped, and the message of `when_stopped`."""
    tell(f"postgen: stopped; {_standing[-1]() if _standing else STOPPED}")


def forget_standing() -> None:
    """Remove the messages of earlier commands of this process."""
    _standing.clear()


def tell(message: str) -> None:
    """Print a message to standard error in one line. Very long words are shortened."""
    print(cut_words(message, _WORD), file=sys.stderr)


def tell_error(error: BaseException, option_of: Callable[[str], str] = str) -> int | None:
    """Print the message of a user's error in one line.

    Args:
        error: the exception.
        option_of: function that returns the option of a setting, for a `SettingError`.

    Returns:
        The exit code; None if the exception is a bug of postgen. In this case nothing is printed.
    """
    if isinstance(error, UserError):
        text = error.worded(option_of(error.setting)) if isinstance(error, SettingError) else str(error)
        tell(f"postgen: error: {text}")
        return 2
    if (told := command_error(error)) is None:
        return None
    if not told[0]:  # typer has printed the help of a command group that was called without a command
        return 0
    tell(f"postgen: error: {usage_words(error, told[0])} (see {told[2] or 'postgen'} --help)")
    return told[1]
