"""`postgen recipes`: list, show and copy the files that come with the package."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from postgen.shipped import Shipped

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name from the list of `postgen recipes`.")]
Folder = Annotated[
    str, typer.Argument(metavar="FOLDER", help="Folder to write: FOLDER/NAME.yaml, and prompts in FOLDER/prompts.")
]

_TITLES = {
    "recipe": "Recipes: postgen train NAME",
    "accelerate": "Configurations for accelerate launch --config_file FILE, after `postgen recipes copy NAME`",
    "prompts": "Prompts",
}
_LEAST, _MOST = 60, 120
"""Smallest and largest width, in columns, to which lines are wrapped."""


def recipes_commands() -> typer.Typer:
    """Return the command `recipes`, which lists all files, with its subcommands `show` and `copy`."""
    text = "List the recipes that come with postgen; show or copy one."
    group = typer.Typer(help=text, invoke_without_command=True)
    group.callback()(_list)
    group.command()(show)
    group.command()(copy)
    return group


def _list(context: typer.Context) -> None:
    """List the recipes that come with postgen; show or copy one."""
    if context.invoked_subcommand:
        return
    from postgen.shipped import shipped

    found = shipped()
    columns = min(max(shutil.get_terminal_size().columns, _LEAST), _MOST)
    for kind, title in _TITLES.items():
        typer.echo(f"{'' if kind == 'recipe' else chr(10)}{title}")
        these = [item for item in found if item.kind == kind]
        width = max(len(item.name) for item in these) + 2
        for item in these:
            for line in _lines(item, width, columns):
                typer.echo(line)


def show(name: Name) -> None:
    """Print a recipe with its comments, which describe its purpose and measured results."""
    from postgen.shipped import find_shipped

    typer.echo(find_shipped(name).path.read_text(encoding="utf-8"), nl=False)


def copy(name: Name, folder: Folder = "recipes") -> None:
    """Copy a recipe and its prompts, so that you can change them. Existing files are never overwritten."""
    from postgen.files import named
    from postgen.shipped import FOLDER, find_shipped

    home = named(folder, folder=True)
    item = find_shipped(name)
    places = [item.path, *(item.path.parent / read for read in item.reads)]
    pairs = {home / place.relative_to(FOLDER): place for place in places}
    _copy_all(pairs)
    for target in pairs:
        typer.echo(target)
    for line in _next_steps(item, home):
        typer.echo(line)


def _lines(item: Shipped, width: int, columns: int) -> list[str]:
    if item.kind == "prompts":
        with item.path.open(encoding="utf-8") as file:
            return [f"  {item.name:<{width}}{sum(1 for _ in file):,} prompts"]
    texts = [item.about, f"{item.method}; {item.needs}" if item.kind == "recipe" else ""]
    lines = [line for text in texts for line in textwrap.wrap(text, columns - width - 2)]
    return [f"  {item.name if number == 0 else '':<{width}}{line}" for number, line in enumerate(lines)]


def _copy_all(pairs: dict[Path, Path]) -> None:
    """Copy all files or none. A file that already exists must have the same content.

    Raises:
        UserError: an existing file has other content, or a file cannot be written.
    """
    from postgen.errors import UserError
    from postgen.files import check_place, replacing_all

    new = []
    for target, source in pairs.items():
        check_place(target, folder=False)
        if not target.exists():
            new.append(target)
        elif target.read_bytes() != source.read_bytes():
            raise UserError(f"{target} already exists with other content: give another folder, or move the file")
    with replacing_all(new) as parts:
        for target, part in zip(new, parts, strict=True):
            shutil.copyfile(pairs[target], part)


def _next_steps(item: Shipped, folder: Path) -> list[str]:
    """Return lines for the user: how to use a copied file."""
    if item.kind == "prompts":
        return []
    place = f"{folder.as_posix().rstrip('/')}/{item.name}.yaml"
    if item.kind == "accelerate":
        return [f"Use it: accelerate launch --config_file {shlex.quote(place)} -m postgen.train RECIPE.yaml"]
    command = item.command or f"postgen train recipes/{item.name}.yaml"
    words = [word.replace("recipes/", f"{folder.as_posix().rstrip('/')}/", 1) for word in shlex.split(command)]
    own = [f"It needs your own files, or other values for these keys: {', '.join(item.lacks)}"] if item.lacks else []
    return [*own, f"Run it: {shlex.join(words)}"]
