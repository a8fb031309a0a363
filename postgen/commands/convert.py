"""`postgen convert METHOD MODEL -o OUT`: one command a method that makes a model, or part of one, of another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from postgen.commands.convert_lit import convert_lit
from postgen.commands.export_lora import export_lora
from postgen.errors import UserError
from postgen.files import check_apart, check_place, files_of

Converter = Callable[..., None]
"""A command whose first parameter is the model (a path, or a text where a hub id will do) and that has an `output`, a
path, with `-o`; its docstring is its help. It imports what is heavy when it is called."""

CONVERTERS: dict[str, Converter] = {
    "lit": convert_lit,
    "lora": export_lora,
}
"""Method -> its command. A new one is its function, and a row here."""


def convert_commands() -> typer.Typer:
    """Return the commands of `CONVERTERS` as one group."""
    text = "Make a model, or a part of one, of another: convert METHOD MODEL -o OUT."
    group = typer.Typer(help=text, no_args_is_help=True)
    for name, command in CONVERTERS.items():
        group.command(name)(checked(command))
    return group


def checked(command: Converter) -> Converter:
    """Return a converter that looks at where it is to write before it reads the model.

    Raises:
        UserError: when called, for a place that cannot be written or that is the model itself.
    """
    model, *others = inspect.signature(command).parameters
    assert "output" in others, f"{command.__name__} has no parameter output"

    @functools.wraps(command)
    def convert(**given: Any) -> None:
        source, output = Path(given[model]).expanduser(), given["output"]
        check_place(output)
        if source.exists() and output.exists() and source.samefile(output):
            raise UserError(f"{output} is what is to be converted: give another place with -o")
        check_apart([output], files_of(source))
        command(**given)

    return convert
