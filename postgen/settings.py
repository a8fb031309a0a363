"""Parts of a configuration: keyword-only dataclasses that check their fields, combined by inheritance."""

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from postgen.errors import NUMBERS, UserError, shown

LARGEST: Mapping[type, int] = {int: 2**31 - 1, float: 10**9}
"""Largest absolute value of an int and of a float in a configuration. A larger value is a typing error, and would lead
to an overflow or an out-of-memory error in other code."""


@dataclass(kw_only=True)
class Part:
    """Base class of the parts of a configuration.

    Each part is defined next to the code that uses it, and a configuration inherits from the parts that it needs. A
    part checks its own fields in `__post_init__` after the call of `super().__post_init__()`. In this way, each part
    of a configuration is checked once, when all values already have their declared types.

    >>> @dataclass(kw_only=True)
    ... class Size(Part):
    ...     width: int = 8
    ...     def __post_init__(self) -> None:
    ...         super().__post_init__()
    ...         self.require(self.width >= 1, "width", "at least 1")
    >>> Size(width=0)
    Traceback (most recent call last):
    postgen.errors.UserError: width is 0, it must be at least 1.
    """

    part: ClassVar[str] = ""
    """Key under which a recipe may nest the fields of this class; empty: the fields cannot be nested."""

    may_change: ClassVar[tuple[str, ...]] = ()
    """Fields of this class that may change when a run is resumed, because they do not influence the training. All
    fields whose name begins with `eval_` may change too."""

    share_out: ClassVar[tuple[str, ...]] = ()
    """Fields of this class that divide a batch among processes. They may change when a run is resumed with another
    number of processes."""

    files: ClassVar[tuple[str, ...]] = ()
    """Fields of this class that may contain a path. Such a path is first searched relative to the folder of the
    recipe."""

    @classmethod
    def named_in(cls, variable: Literal["may_change", "share_out", "files"]) -> set[str]:
        """Return the fields that this class and its base classes list in a class variable."""
        return {name for kind in cls.__mro__ for name in vars(kind).get(variable, ())}

    def __post_init__(self) -> None:
        """Convert all values to their declared types."""
        coerce(self)

    def require(self, holds: bool, name: str, allowed: str) -> None:
        """Raise a `UserError` about the field `name` if `holds` is false; `allowed` describes the allowed values."""
        if not holds:
            raise UserError(f"{name} is {shown(getattr(self, name))}, it must be {allowed}.")

    def require_in(self, bounds: tuple[float, float], name: str) -> None:
        """Raise a `UserError` about the field `name` if its value is neither None nor within `bounds`."""
        value, (least, most) = getattr(self, name), bounds
        if value is not None and value < least:
            self.require(False, name, f"at least {least}")
        self.require(value is None or value <= most, name, f"at most {most:,}")


def coerce(config: Part) -> None:
    """Check each field against its annotation, and convert its value to the declared type.

    Whole floats become ints, ints become floats, and paths become strings. The check is needed because values from
    YAML and from Python have not passed through an argument parser.

    Raises:
        UserError: a value has another type.
    """
    hints = _hints(typing.cast(Any, type(config)))
    for item in fields(config):
        value = getattr(config, item.name)
        setattr(config, item.name, _coerced(item.name, value, hints[item.name]))


_TYPES: dict[Any, str] = {int: NUMBERS["int"], float: NUMBERS["float"], bool: "true or false", str: "a text"}
"""Type -> its name in messages."""
_hints = functools.cache(typing.get_type_hints)


def _coerced(name: str, value: Any, hint: Any) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in options if option is not type(None)]
        if len(inner) == len(options):
            return value
        return None if value is None else _coerced(name, value, inner[0])
    if origin is Literal:
        if value in options:
            return value
        raise UserError(f"{name} is {shown(value)}. Allowed: {', '.join(map(str, options))}.")
    if origin is list:
        if isinstance(value, list | tuple):
            return [_coerced(name, item, options[0]) for item in value] if options else list(value)
        raise UserError(f"{name} is {shown(value)}, it must be a list.")
    return _scalar(name, value, hint)


def _scalar(name: str, value: Any, hint: Any) -> Any:
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return _number(name, value, hint)
    if hint not in (int, float) and (not isinstance(hint, type) or isinstance(value, hint)):
        return value
    raise UserError(f"{name} is {shown(value)}, it must be {_TYPES.get(hint, f'a value of type {hint.__name__}')}.")


def _number(name: str, value: float, hint: type) -> Any:
    """Return a number converted to its declared type.

    Raises:
        UserError: the number is infinite, NaN or out of range; or the type is int and the number is not whole.
    """
    largest = LARGEST[hint]
    if not -largest <= value <= largest:
        raise UserError(f"{name} is {shown(value)}, it must be a number from -{largest:,} to {largest:,}.")
    if hint is int and value != int(value):
        raise UserError(f"{name} is {shown(value)}, it must be {_TYPES[int]}.")
    return hint(value)
