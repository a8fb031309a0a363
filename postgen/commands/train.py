"""`postgen train`: passes its arguments to `postgen.train`, which `accelerate launch -m postgen.train` also runs."""

from typing import Annotated

import typer

# All words after the command belong to the recipe, including options that typer does not know.
# Without names for the help option, `--help` reaches `postgen.train`, which has the one help text for both programs.
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}


def train(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="Recipe (a name or a file), and values that replace its own."),
    ],
) -> None:
    """Run a training recipe: the name of one that `postgen recipes` lists, or a file.

    `--key value` replaces a value of the recipe (`--key 0 2` for a list). --resume continues from the newest
    checkpoint (`--resume auto` starts a new run if there is none). --dry-run only estimates memory and cost.
    """
    from postgen.train import main

    # `main` has already printed its messages, so only the exit code is passed on.
    raise SystemExit(main(arguments))
