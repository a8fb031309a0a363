"""`postgen train`: hands its arguments to `postgen.train`, which `accelerate launch -m postgen.train` runs as well."""

from typing import Annotated

import typer

# Everything after the command belongs to the recipe, options that we do not know included.
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def train(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="Recipe, a name or a file, and values that replace its own."),
    ],
) -> None:
    """Run a training recipe: one that `postgen recipes` lists, by its name, or a file.

    `--key value` replaces a value of it (`--key 0 2` a list), --resume goes on (`--resume auto`: or begins),
    --dry-run only estimates.
    """
    from postgen.train import main

    # It has printed what there is to say, so its code goes out as it is.
    raise SystemExit(main(arguments))
