"""Nested spellings of a configuration: `lora: {r: 32}` for `lora_r: 32`.

A part (`postgen.settings.Part`) may be written as a mapping under its name. Its keys are its fields, with or without
the name of the part before them; what no part owns belongs to the method: `method: {name: dancegrpo, epsilon: 1e-4}`.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from postgen.errors import UserError, shown
from postgen.settings import Part


def parts_of(config_class: type[Part]) -> dict[str, list[str]]:
    """Return the parts of a configuration with their fields; `method` has those that no named part owns."""
    found: dict[str, list[str]] = {}
    for base in reversed(config_class.__mro__):
        if (name := vars(base).get("part")) and issubclass(base, Part):
            inherited = {item.name for parent in base.__bases__ if issubclass(parent, Part) for item in fields(parent)}
            own = [item.name for item in fields(base) if item.name not in {*inherited, "method"}]
            found[name] = [*found.get(name, ()), *own]  # a part may be declared in several classes
    owned = {"method", *(name for names in found.values() for name in names)}
    found["method"] = [item.name for item in fields(config_class) if item.name not in owned]
    return found


def flat(config_class: type[Part], values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return values under the names of the fields.

    Args:
        config_class: the configuration.
        values: by field, or by part and field.
        origin: what messages call the source of the values.

    Raises:
        UserError: an unknown key or part, a part that is no mapping, or a key that is given twice.
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
                f"{key} in {origin} is {shown(value)}, it must be a mapping with keys of this part ({some}, ...)."
            )
        elif isinstance(value, Mapping):
            raise UserError(
                f"{config_class.__name__} has no part {key!r} ({origin}): its parts are {', '.join(parts)}."
            )
        else:
            check_key(str(key), [*known, *parts], origin)
    return found


def check_key(key: str, known: Iterable[str], origin: str) -> None:
    """Check that a key is one of those that are known.

    Raises:
        UserError: names the nearest known one.
    """
    known = list(known)
    if key in known:
        return
    plain = key.strip().lower()
    spellings = (plain.replace(".", "_"), plain.rpartition(".")[2])  # lora.r, sampling.guidance_scale
    near = [name for name in spellings if name in known] or difflib.get_close_matches(plain, known, n=1, cutoff=0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"Unknown key {shown(key)} in {origin}.{hint}")


def _fields(part: str, values: Mapping[str, Any], parts: Mapping[str, list[str]], origin: str) -> dict[str, Any]:
    """Return the values of one part under the names of its fields."""
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
            raise UserError(f"{name} is given twice in {origin}: keep one of the two spellings.")
        found[name] = value
