"""Nested form of a configuration: `lora: {r: 32}` for `lora_r: 32`.

A part (`postgen.settings.Part`) may be written as a mapping under its name. The keys of the mapping are the fields of
the part, with or without the prefix `<part>_`. Fields that no other part owns belong to the part `method`:
`method: {name: dancegrpo, epsilon: 1e-4}`.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from postgen.errors import UserError, shown
from postgen.settings import Part


def parts_of(config_class: type[Part]) -> dict[str, list[str]]:
    """Return the field names of a configuration, by the name of the part under which a recipe may nest them.

    The part `method` has the fields that no other part owns, but not the field `method` itself.
    """
    found: dict[str, list[str]] = {}
    for base in reversed(config_class.__mro__):
        if (name := vars(base).get("part")) and issubclass(base, Part):
            inherited = {item.name for parent in base.__bases__ if issubclass(parent, Part) for item in fields(parent)}
            own = [item.name for item in fields(base) if item.name not in {*inherited, "method"}]
            found[name] = [*found.get(name, ()), *own]  # several classes may declare fields of one part
    owned = {"method", *(name for names in found.values() for name in names)}
    found["method"] = [item.name for item in fields(config_class) if item.name not in owned]
    return found


def flat(config_class: type[Part], values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Convert nested values to flat ones, by field name.

    Args:
        config_class: class of the configuration.
        values: values by field name, or by part and field name.
        origin: name of the source of the values, for messages.

    Raises:
        UserError: a key or part is unknown, a part is not a mapping, or a key is given twice.
    """
    parts = parts_of(config_class)
    known = [item.name for item in fields(config_class)]
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key in parts:
            _add(found, _fields(str(key), value, parts, origin), origin)
        elif key in known:
            _add(found, {key: value}, origin)
        elif key in parts:
            some = ", ".join(parts[key][:3])
            raise UserError(
                f"{key} in {origin} is {shown(value)}, it must be a mapping with the keys of this part ({some}, ...)."
            )
        elif isinstance(value, Mapping):
            raise UserError(
                f"{config_class.__name__} has no part {key!r} ({origin}): its parts are {', '.join(parts)}."
            )
        else:
            check_key(str(key), [*known, *parts], origin)
    return found


def check_key(key: str, known: Iterable[str], origin: str) -> None:
    """Check that a key is known.

    Raises:
        UserError: the key is unknown; the message suggests the most similar known key.
    """
    known = list(known)
    if key in known:
        return
    plain = key.strip().lower()
    # For dotted keys, such as lora.r or sampling.guidance_scale, suggest lora_r and guidance_scale.
    spellings = (plain.replace(".", "_"), plain.rpartition(".")[2])
    near = [name for name in spellings if name in known] or difflib.get_close_matches(plain, known, n=1, cutoff=0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"Unknown key {shown(key)} in {origin}.{hint}")


def _fields(part: str, values: Mapping[str, Any], parts: Mapping[str, list[str]], origin: str) -> dict[str, Any]:
    """Return the values of one part by field name."""
    own = parts[part]
    names = {name.removeprefix(f"{part}_"): name for name in own} | {name: name for name in own}
    if part == "method":
        names["name"] = "method"
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names and (owner := next((name for name in parts if key in parts[name]), None)):
            raise UserError(f"Unknown key {key!r} in the part {part} of {origin}: it is a key of the part {owner}.")
        check_key(str(key), names, f"the part {part} of {origin}")
        _add(found, {names[key]: value}, origin)
    return found


def _add(found: dict[str, Any], values: Mapping[str, Any], origin: str) -> None:
    for name, value in values.items():
        if name in found:
            raise UserError(f"{name} is given twice in {origin}: keep one of the two.")
        found[name] = value
