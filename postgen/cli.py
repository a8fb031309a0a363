"""The `postgen` command. Nothing heavy is imported before a command runs."""

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
from postgen.commands.options import takes_settings
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
"""Seconds that a stopped command has to end its threads."""
_SPINS = "1000"
"""Rounds, some microseconds, for which a waiting thread of GNU's OpenMP spins before it sleeps. Its own 300,000 take
milliseconds. With 10,000 and two threads, on 2 cores that 9 other processes wanted, 4 chunks of a long video were not
made within 120 s, in none of three runs; with 1000 they were in all three, 7 to 15 s a chunk."""


def app(**words: Any) -> Any:
    """Run the command line as it is now: plug-ins that were registered before this call have their options."""
    return _commands(known_plug_ins())(**words)


@lru_cache(maxsize=1)
def _commands(rows: tuple[PlugIn, ...]) -> Any:
    """Return what parses and runs, for a table of plug-ins: made once, which takes as long as most calls."""
    return typer.main.get_command(build())


def build() -> typer.Typer:
    """Return the command line, with an option for each row of the table of plug-ins.

    Raises:
        UserError: a plug-in has the option of a setting.
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
    short = "The same as convert lora."
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
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process.

    A wrong input is one line on standard error and exit code 2, Ctrl-C one line and 130, SIGTERM the same line and
    143; any other exception is a defect and keeps its traceback.

    Args:
        arguments: the words after `postgen`; None takes them from the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    warnings.formatwarning = _warning
    _say_what_can_be_said()
    _wait_asleep()
    with stoppable() as stop:
        code = _run(words, stop)
    if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Nothing is left to clean up: Ctrl-C while Python ends is no traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if arguments is None and stop.number:
        leave_given_up(code)
        leave_within(_PATIENCE, code)
    raise SystemExit(code)


def _say_what_can_be_said() -> None:
    """Write what a terminal has no sign for as its number: names of files need not be UTF-8, nor the terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _wait_asleep() -> None:
    """Let threads that wait for each other sleep soon, unless the environment says how they wait.

    On a busy machine a thread loses its core in the middle of an operation. If the others spin until it comes back,
    they keep it from a core: two threads were then several times slower than one.
    """
    if "torch" in sys.modules:  # the library has been loaded, and read the environment
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def _run(words: list[str], stop: Stop) -> int:
    """Run a command and return the exit code."""
    forget_standing()
    try:
        result = app(args=words, prog_name="postgen", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _stopped(stop)
    except SystemExit as left:  # `train` has told what there is to say
        if not isinstance(left.code, int):
            raise
        return left.code
    except Exception as error:
        if stop.number:  # what became of the interrupt inside a library
            return _stopped(stop)
        if (code := tell_error(error)) is None:
            raise
        return code
    code = result if isinstance(result, int) else 0
    # Newer typer turns Ctrl-C into this code by itself.
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
    """What concerns the user in one line, without the place in the code that said it."""
    if category is UserWarning:
        return f"postgen: warning: {' '.join(str(message).split())}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


if __name__ == "__main__":
    main()
