"""How a benchmark that runs for long ends: after wrong input, after a signal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from postgen.errors import UserError
from postgen.interrupts import stoppable


def ended(name: str, work: Callable[[], int], stopped: str = "the same command goes on") -> int:
    """Do the work of a command, and return its exit code.

    It is 2 after wrong input, and 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, which are raised as
    KeyboardInterrupt where the work is: each of them is one line on standard error.

    Args:
        name: of the command, for messages.
        work: returns its exit code.
        stopped: what is said after a signal.
    """
    with stoppable() as stop:
        try:
            return work()
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, Exception) and not stop.number:
                raise
            stop.end()  # a signal, or what became of one inside a library
            print(f"{name}: stopped; {stopped}", file=sys.stderr)
            return stop.code
