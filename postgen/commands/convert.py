"""`postgen convert METHOD MODEL -o OUT`: one command for each method that converts a model or a part of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from postgen.commands.convert_lit import convert_lit
from postgen.commands.convert_quant import convert_quant
from postgen.commands.export_lora import export_lora
from postgen.errors import UserError
from postgen.files import check_apart, check_place, files_of

Converter = Callable[..., None]
"""Type of a command. Its first parameter is the model: a path, or a text if Hub ids are allowed. It has a parameter
`output`, a path with the option `-o`. Its docstring is its help. It imports heavy modules when it is called."""

CONVERTERS: dict[str, Converter] = {
    "lit": convert_lit,
    "lora": export_lora,
    "quant": convert_quant,
}
"""Commands by method. A new method needs a function and a row in this table."""


def convert_commands() -> typer.Typer:
    """Return the commands of `CONVERTERS` as one group."""
    text = "Convert a model, or a part of it: convert METHOD MODEL -o OUT."
    group = typer.Typer(help=text, no_args_is_help=True)
    for name, command in CONVERTERS.items():
        group.command(name)(checked(command))
    return group


def checked(command: Converter) -> Converter:
    """Return a command that checks the output path before it calls `command`.

    Raises:
        UserError: the output cannot be written, or it is the model itself. The returned command raises this error.
    """
    model, *others = inspect.signature(command).parameters
    assert "output" in others, f"{command.__name__} has no parameter output"

    @functools.wraps(command)
    def convert(**given: Any) -> None:
        source, output = Path(given[model]).expanduser(), given["output"]
        check_place(output)
        if source.exists() and output.exists() and source.samefile(output):
            raise UserError(f"{output} is the model to convert: give another output with -o")
        check_apart([output], files_of(source))
        command(**given)

    return convert
