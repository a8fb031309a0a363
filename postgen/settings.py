"""Parts of a configuration: keyword-only dataclasses whose fields are checked, put together by inheritance."""

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from postgen.errors import UserError, shown

LARGEST: Mapping[type, int] = {int: 2**31 - 1, float: 10**9}
"""How far from 0 a whole number, and any other, of a configuration may be: what is further is a slip, and would end in
an overflow or in no memory somewhere below."""


@dataclass(kw_only=True)
class Part:
    """Base of a part. Each part lives with the code that reads it; a configuration inherits from those that it needs.

    A part checks its own fields in `__post_init__`, after `super().__post_init__()`: the parts of a configuration then
    check themselves once each, when all values have their declared types.

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
    """Name under which a recipe may nest the fields of a class; empty where it may not."""

    may_change: ClassVar[tuple[str, ...]] = ()
    """Fields of this class that change nothing of what is learned, whatever they are when a run is resumed; those that
    begin with `eval_` are among them anyway."""

    share_out: ClassVar[tuple[str, ...]] = ()
    """Fields of this class that say which part of a batch is whose: another number of processes may have others."""

    files: ClassVar[tuple[str, ...]] = ()
    """Fields of this class that may name a file of a recipe: it is looked for beside the recipe first."""

    @classmethod
    def named_in(cls, variable: Literal["may_change", "share_out", "files"]) -> set[str]:
        """Return the fields that a class and all that it inherits from name in such a variable."""
        return {name for kind in cls.__mro__ for name in vars(kind).get(variable, ())}

    def __post_init__(self) -> None:
        """Bring all values into their declared types."""
        coerce(self)

    def require(self, holds: bool, name: str, allowed: str) -> None:
        """Raise a `UserError` about field `name` unless `holds`; `allowed` says what it must be."""
        if not holds:
            raise UserError(f"{name} is {shown(getattr(self, name))}, it must be {allowed}.")

    def require_in(self, bounds: tuple[float, float], name: str) -> None:
        """Raise a `UserError` about field `name` unless it is None or from the first bound to the second."""
        value, (least, most) = getattr(self, name), bounds
        if value is not None and value < least:
            self.require(False, name, f"at least {least}")
        self.require(value is None or value <= most, name, f"at most {most:,}")


def coerce(config: Part) -> None:
    """Check each field against its annotation; whole floats become ints, ints become floats, paths strings.

    YAML and Python callers give values that no argument parser has seen.

    Raises:
        UserError: a value of another type.
    """
    hints = _hints(typing.cast(Any, type(config)))
    for item in fields(config):
        value = getattr(config, item.name)
        setattr(config, item.name, _coerced(item.name, value, hints[item.name]))


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
    raise UserError(f"{name} is {shown(value)}, it must be a value of type {hint.__name__}.")


def _number(name: str, value: float, hint: type) -> Any:
    """Return a number in its declared type.

    Raises:
        UserError: it is infinite, NaN or so large that no setting can mean it; or no whole number where one is needed.
    """
    largest = LARGEST[hint]
    if not -largest <= value <= largest:
        raise UserError(f"{name} is {shown(value)}, it must be a number from -{largest:,} to {largest:,}.")
    if hint is int and value != int(value):
        raise UserError(f"{name} is {shown(value)}, it must be a value of type int.")
    return hint(value)
