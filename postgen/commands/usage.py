"""Plain words for usage errors of the command line: unknown options, missing options and values of a wrong type."""

from __future__ import annotations

import difflib
import re
from typing import Any

from postgen.errors import NUMBERS, shown

_OLDER = {"integer": "int", "float": "float"}
"""Names of the types in messages of click."""


def usage_words(error: Any, text: str) -> str:
    """Return the message of a usage error in plain words.

    Args:
        error: the exception of typer or click. Its public attributes depend on the kind of error.
        text: its own message, which is returned for all other errors.
    """
    param = getattr(error, "param", None)
    if (option := getattr(error, "option_name", None)) is not None and hasattr(error, "possibilities"):
        return _unknown(error, option)
    if text.startswith("Missing ") and (about := getattr(param, "help", None)):
        return f"{text.rstrip('.')}: {about.partition(chr(92))[0].strip()}"  # a backslash begins the default
    if param is not None and (wrong := _wrong_number(error)) is not None:
        name = max(param.opts, key=len)
        return f"{name} must be {NUMBERS[wrong[0]]}, got {shown(wrong[1])}"
    if extra := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", text, re.DOTALL):
        prompt = error.ctx.params.get("prompt")
        if isinstance(prompt, str):
            whole = f"{prompt} {extra[1]}"
            return f'the prompt must be one argument, put it in quotes: {error.ctx.command_path} "{whole}"'
        return f"{text.rstrip('.')}: put words that belong together in quotes"
    return text


def _unknown(error: Any, option: str) -> str:
    """Return the message for an option that the command does not have."""
    said = f"No such option: {option}"
    parameters = getattr(getattr(error.ctx, "command", None), "params", ())
    if option == "--prompt" and any("prompt" in each.opts for each in parameters):
        return f'{said}, give the prompt without an option name: {error.ctx.command_path} "a red ball rolls left"'
    near = difflib.get_close_matches(option, error.possibilities or (), 1, 0.6)
    return f"{said}, did you mean {near[0]}?" if near else said


def _wrong_number(error: Any) -> tuple[str, Any] | None:
    """Return the needed type, int or float, and the given value; None if the error is another one.

    Newer versions of typer convert values by pydantic, whose error is the cause; older ones use click.
    """
    details = getattr(error.__cause__, "errors", None)
    if callable(details):
        first = details()[0]
        kind = str(first["type"]).partition("_")[0]
        return (kind, first["input"]) if kind in NUMBERS else None
    match = re.fullmatch(r"'(.*)' is not a valid (integer|float)\.?", str(error.message), re.DOTALL)
    return None if match is None else (_OLDER[match[2]], match[1])
