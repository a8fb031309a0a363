"""Errors that are meant for the person at the keyboard."""


class UserError(ValueError):
    """A wrong input. The message is one line: what was given, what is allowed, what to do.

    The command line prints it and exits with code 2; nothing is written.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name where it says nothing.

    >>> first_line(OSError("no header\\nat byte 0")), first_line(KeyError())
    ('no header', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
