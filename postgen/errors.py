"""Errors that are meant for the person at the keyboard."""


class UserError(ValueError):
    """A wrong input. The message is one line: what was given, what is allowed, what to do.

    The command line prints it and exits with code 2; nothing is written.
    """
