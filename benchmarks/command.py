"""Exit codes and messages of long benchmarks after wrong input and after a signal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from postgen.errors import UserError
from postgen.interrupts import stoppable


def ended(name: str, work: Callable[[], int], stopped: str = "run the same command again to continue") -> int:
    """Run the work of a command and return the exit code of the command.

    The exit code is 2 after a UserError, 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP; each prints one
    line to standard error. A signal raises KeyboardInterrupt in the work.

    Args:
        name: the name of the command for messages.
        work: a function that does the work and returns the exit code.
        stopped: the hint that is printed after a signal.
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
            stop.end()  # a signal, or an error that a library raised because of one
            print(f"{name}: stopped; {stopped}", file=sys.stderr)
            return stop.code


def without_options(module: str, doc: str | None, argv: Sequence[str] | None) -> None:
    """Read the command line of a module that takes no options: `--help` explains it, and anything else is refused.

    Args:
        module: name of the module, such as "benchmarks.lowp_report".
        doc: its docstring.
        argv: the command line; None is that of the process.
    """
    shape = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=shape).parse_args(argv)
