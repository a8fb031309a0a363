"""How every command ends: a wrong input is one line on standard error and exit code 2, and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from postgen.compat import command_error
from postgen.errors import UserError, cut_words

STOPPED = "no half-written file was left"
"""What is said after Ctrl-C of a command that says nothing else."""

_standing: list[Callable[[], str]] = []

_WORD = 400


@contextmanager
def when_stopped(standing: Callable[[], str]) -> Iterator[None]:
    """Let `tell_stopped` say how far the block has come and how to go on, if it ends by a signal.

    Args:
        standing: returns that, in one line.
    """
    _standing.append(standing)
    yield
    _standing.remove(standing)  # not after an exception: what there is to say is said later


def tell_stopped() -> None:
    """Say that the command was stopped, and what it leaves."""
    tell(f"postgen: stopped; {_standing[-1]() if _standing else STOPPED}")


def forget_standing() -> None:
    """Forget what an earlier command of this process has come to."""
    _standing.clear()


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
