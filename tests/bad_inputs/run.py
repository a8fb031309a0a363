"""The tables of the matrix of bad inputs, and the function that runs one."""

from __future__ import annotations

import functools
from importlib import import_module

from tests.bad_inputs.row import Row, problem
from tests.bad_inputs.tiny import NAMES, folder

TABLES = ("numbers_options", "numbers_settings", "recipes", "folders", "loras", "data", "calls", "early")
"""Modules of this folder, each with a function `rows`."""


@functools.cache
def table(name: str) -> tuple[Row, ...]:
    """Return the rows of a table."""
    return tuple(import_module(f"tests.bad_inputs.{name}").rows())


def problems(name: str) -> list[tuple[str, str]]:
    """Run a table. Return the failed rows by name, with what is wrong, beginning with the kind of failure."""
    models = {each: folder(each) for each in NAMES}
    return [(row.name, told) for row in table(name) if (told := problem(row, models)) is not None]
