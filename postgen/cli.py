"""The `postgen` command. Nothing heavy is imported before a command runs."""

import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

import postgen
from postgen.commands.compare import compare
from postgen.commands.export_lora import export_lora
from postgen.commands.generate import generate
from postgen.commands.info import info
from postgen.commands.score import score
from postgen.commands.serve_reward import serve_reward
from postgen.commands.train import SETTINGS, train
from postgen.compat import command_error
from postgen.errors import UserError

_STOPPED = "postgen: stopped; no half-written file was left"

app = typer.Typer(
    name="postgen",
    help="Make a trained diffusers video model better, faster and longer.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(compare)
app.command(context_settings=SETTINGS)(train)
app.command()(score)
app.command("serve-reward")(serve_reward)
app.command("export-lora")(export_lora)
app.command()(info)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"postgen {postgen.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process.

    A wrong input is one line on standard error and exit code 2, Ctrl-C one line and 130; any other exception is a
    defect and keeps its traceback.

    Args:
        arguments: the words after `postgen`; None takes them from the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    warnings.formatwarning = _warning
    sys.unraisablehook = _unraisable
    try:
        result = app(args=words, prog_name="postgen", standalone_mode=False)
    except UserError as error:
        _leave(f"postgen: error: {error}", 2)
    except (KeyboardInterrupt, typer.Abort):
        _leave(_STOPPED, 130)
    except Exception as error:
        if (told := command_error(error)) is None:
            raise
        _leave(f"postgen: error: {told[0]} (see postgen --help)", told[1])
    code = result if isinstance(result, int) else 0
    if code == 130:  # newer typer turns Ctrl-C into this code by itself
        _leave(_STOPPED, code)
    raise SystemExit(code)


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """Press Ctrl-C again where Python would ignore it: it came while an object was being deleted."""
    if lost.exc_type is KeyboardInterrupt and hasattr(signal, "pthread_kill"):  # not on Windows
        # Not at once: the object is still being deleted. To the main thread, which may be waiting for something.
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What concerns the user in one line, without the place in the code that said it."""
    if category is UserWarning:
        return f"postgen: warning: {' '.join(str(message).split())}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _leave(message: str, code: int) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
