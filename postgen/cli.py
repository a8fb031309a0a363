"""The `postgen` command. Heavy modules are imported only when a command runs."""

import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, NoReturn

import typer

import postgen
from postgen.commands.compare import compare
from postgen.commands.convert import checked, convert_commands
from postgen.commands.demo import demo
from postgen.commands.errors import forget_standing, tell_error, tell_stopped
from postgen.commands.export_lora import export_lora
from postgen.commands.generate import generate
from postgen.commands.info import info
from postgen.commands.merge import merge
from postgen.commands.options import option_of, takes_settings, with_optional_values
from postgen.commands.recipes import recipes_commands
from postgen.commands.score import score
from postgen.commands.serve_reward import serve_reward
from postgen.commands.train import SETTINGS, train
from postgen.files import discard_unfinished
from postgen.interrupts import Stop, leave_given_up, leave_within, stoppable, terminate_children
from postgen.plug_ins import PlugIn, known_plug_ins

MAKE, JUDGE, TRAIN, CONVERT, SERVE, ABOUT = "Make", "Judge", "Train", "Convert", "Serve", "About"
"""Groups of commands in `postgen --help`."""

_PATIENCE = 5.0
"""Seconds that the threads of a stopped command have to end before the process exits."""
_SPINS = "1000"
"""Number of rounds that a waiting thread of GNU OpenMP spins before it sleeps: 1000 rounds take some microseconds, the
default of 300,000 rounds takes milliseconds. Measured with two threads on 2 cores that 9 other processes used too:
with 10,000 rounds, none of three runs finished 4 chunks of a long video within 120 s; with 1000 rounds, all three runs
did, in 7 to 15 s per chunk."""


def app(**words: Any) -> Any:
    """Run the command line with the options of all plug-ins that are registered at this time."""
    return _commands(known_plug_ins())(**words)


@lru_cache(maxsize=1)
def _commands(rows: tuple[PlugIn, ...]) -> Any:
    """Return the click command for a table of plug-ins.

    The result is cached, because building the command takes as long as most calls.
    """
    return typer.main.get_command(build())


def build() -> typer.Typer:
    """Return the command line, with one option for each registered plug-in.

    Raises:
        UserError: a plug-in has the same option name as a setting.
    """
    commands = typer.Typer(
        name="postgen",
        help="Make a trained diffusers video model better, faster and longer.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    commands.callback()(_common)
    commands.command(rich_help_panel=MAKE)(takes_settings(generate))
    commands.command(rich_help_panel=MAKE)(takes_settings(compare))
    commands.command(rich_help_panel=MAKE)(demo)
    commands.command(rich_help_panel=JUDGE)(score)
    commands.command(rich_help_panel=TRAIN, context_settings=SETTINGS)(train)
    commands.add_typer(recipes_commands(), name="recipes", rich_help_panel=TRAIN)
    commands.add_typer(convert_commands(), name="convert", rich_help_panel=CONVERT)
    commands.command(rich_help_panel=CONVERT)(merge)
    short = "Alias of convert lora."
    commands.command("export-lora", rich_help_panel=CONVERT, short_help=short)(checked(export_lora))
    commands.command("serve-reward", rich_help_panel=SERVE)(serve_reward)
    commands.command(rich_help_panel=ABOUT)(info)
    return commands


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"postgen {postgen.__version__}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit the process.

    Wrong input prints one line on standard error and exits with code 2. Ctrl-C prints one line and exits with code
    130; SIGTERM prints the same line and exits with code 143. Any other exception is a bug and keeps its traceback.

    Args:
        arguments: command-line arguments after `postgen`; None: those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    warnings.formatwarning = _warning
    _escape_output()
    _wait_asleep()
    with stoppable() as stop:
        code = _run(words, stop)
    if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Nothing is left to clean up, so Ctrl-C during the shutdown of Python should not print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if arguments is None and stop.number:
        leave_given_up(code)
        leave_within(_PATIENCE, code)
    raise SystemExit(code)


def _escape_output() -> None:
    """Print characters that the terminal cannot encode as escape sequences, instead of failing.

    File names may contain bytes that are not UTF-8, and the terminal may use another encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _wait_asleep() -> None:
    """Make waiting OpenMP threads sleep after a short spin, unless environment variables already configure the wait.

    On a busy machine a thread can lose its core in the middle of an operation. Threads that spin until it returns
    occupy the cores that it needs: two threads were then several times slower than one.
    """
    if "torch" in sys.modules:  # OpenMP is loaded and has already read the environment
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def _run(words: list[str], stop: Stop) -> int:
    """Run a command and return the exit code."""
    forget_standing()
    try:
        result = app(args=with_optional_values(words), prog_name="postgen", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _stopped(stop)
    except SystemExit as left:  # `train` has already printed its message
        if not isinstance(left.code, int):
            raise
        return left.code
    except Exception as error:
        if stop.number:  # a library turned the interrupt into this exception
            return _stopped(stop)
        if (code := tell_error(error, option_of)) is None:
            raise
        return code
    code = result if isinstance(result, int) else 0
    # Newer versions of typer convert Ctrl-C to exit code 130 themselves.
    return _stopped(stop) if code == 130 else code


def _stopped(stop: Stop) -> int:
    stop.end()
    terminate_children()
    discard_unfinished()
    tell_stopped()
    return stop.code


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning: one line without the source location for `UserWarning`, the location for other categories."""
    if category is UserWarning:
        return f"postgen: warning: {' '.join(str(message).split())}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


if __name__ == "__main__":
    main()
