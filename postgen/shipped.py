"""What is shipped by name: recipes, their prompts, settings for `accelerate launch`. Light to import."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from postgen.errors import UserError, did_you_mean, shown

FOLDER = (Path(__file__).resolve().parent / "recipes").resolve()
"""Where they lie: in a checkout the folder at its root."""

_KINDS = {"": "recipe", "accelerate": "accelerate", "prompts": "prompts"}
_NEEDS = "Needs: "
"""A line of a recipe's comment that begins so says on what it runs, and how long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """One file that is shipped."""

    name: str
    """What it is called: `dancegrpo-tiny`, `accelerate/ddp`, `prompts/two-bodies`."""
    kind: str
    """`recipe`, `accelerate` (for `accelerate launch --config_file`) or `prompts`."""
    path: Path
    """The file."""
    method: str
    """Of a recipe: its training method; empty for other kinds."""
    about: str
    """What it is, in one line; empty for prompts."""
    needs: str
    """Of a recipe: hardware and time as its comment says."""
    command: str
    """Of a recipe: the command that its comment gives, from a folder in which it lies as `recipes/NAME.yaml`."""
    reads: tuple[str, ...]
    """Shipped files that a recipe reads or is launched with, relative to its folder."""
    lacks: tuple[str, ...]
    """Prompts and clips that a recipe reads and the user must have."""


def shipped() -> list[Shipped]:
    """Return what is shipped: recipes first, then settings of accelerate, then prompts, each by name."""
    return [_read(name, path) for name, path in _files().items()]


def find_shipped(name: str) -> Shipped:
    """Return what a name means; its ending may be given.

    Raises:
        UserError: nothing of this name is shipped; the message has the nearest one.
    """
    files = _files()
    plain = name.removesuffix(".yaml").removesuffix(".jsonl")
    if plain not in files:
        ends = {known.rpartition("/")[2]: known for known in files}
        near = f" Did you mean {ends[plain]!r}?" if plain in ends else did_you_mean(plain, files)
        raise UserError(f"no recipe or prompts {shown(name)} are shipped.{near} `postgen recipes` lists them.")
    return _read(plain, files[plain])


def recipe_file(given: str | Path) -> Path:
    """Return the file of a recipe that a user names: a path as it is, a word without an ending by its shipped name.

    A file of that name in the current folder comes first.

    Raises:
        UserError: a word that is neither; or no file, where a recipe of its name is shipped.
    """
    text, path = str(given), Path(given)
    recipes = {name: file for name, file in _files().items() if "/" not in name}
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    if text.strip() and not {"/", os.sep, "\0"} & set(text) and path.suffix not in (".yaml", ".yml"):
        if text in recipes:
            return recipes[text]
        if os.path.isdir(path):
            return path  # whoever reads it says what it is
        own = path.with_name(f"{path.name}.yaml")
        near = f" Did you mean {str(own)!r}?" if os.path.isfile(own) else did_you_mean(text, recipes)
        raise UserError(
            f"Recipe {shown(text)} cannot be read: there is no such file, and none of this name is shipped.{near}"
            " `postgen recipes` lists those that are."
        )
    if path.stem in recipes and not os.path.lexists(path):
        raise UserError(
            f"Recipe {path} cannot be read: there is no such file. One of this name is shipped: say {path.stem!r}."
        )
    return path


def _files() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in _KINDS:
        paths = (FOLDER / folder).glob("*.jsonl" if folder == "prompts" else "*.yaml")
        found |= {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(paths, key=_stem)}
    return found


def _stem(path: Path) -> str:
    return path.stem


def _read(name: str, path: Path) -> Shipped:
    kind = _KINDS[name.rpartition("/")[0]]
    text = "" if kind == "prompts" else path.read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text) if kind == "recipe" else {}
    comment = [line.removeprefix("#") for line in text.split("\n")[: _first_value(text)]]
    method = values.get("method", "")
    beside = [value for _, value in _texts(values) if (path.parent / value).is_file()]
    launched = [place for place in re.findall(r"recipes/(\S+\.yaml)", "\n".join(comment)) if place.startswith("acc")]
    return Shipped(
        name=name,
        kind=kind,
        path=path,
        method=str(method["name"] if isinstance(method, dict) else method),
        about=_first_words(comment),
        needs=next((line.strip().removeprefix(_NEEDS) for line in comment if line.strip().startswith(_NEEDS)), ""),
        command=_command(comment),
        reads=tuple(dict.fromkeys([*beside, *(launched if kind == "recipe" else [])])),
        lacks=tuple(f"{key} {value}" for key, value in _texts(values) if _is_own(key, value, beside)),
    )


def _first_value(text: str) -> int:
    """Return how many lines of comment a file begins with."""
    return next((n for n, line in enumerate(text.split("\n")) if not line.startswith("#")), 0)


def _texts(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of all texts of a recipe, those of its parts included."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _texts(value)
        elif isinstance(value, str):
            yield key, value


def _is_own(key: str, value: str, beside: list[str]) -> bool:
    return key in ("train_dataset", "eval_dataset") and value not in beside


def _first_words(comment: list[str]) -> str:
    """Return a comment up to its first colon or the end of its first sentence; what is indented is a command."""
    text: list[str] = []
    for line in comment:
        if line.startswith("   ") or line.strip().startswith(_NEEDS):
            break
        text.append(line.strip())
    return re.split(r"[.:](?=\s|$)", " ".join(text))[0]


def _command(comment: list[str]) -> str:
    """Return the first command of a comment, in one line."""
    words: list[str] = []
    for line in comment:
        if line.startswith("   "):
            words.append(line.strip().removesuffix("\\").strip())
            if not line.rstrip().endswith("\\"):
                break
        elif words:
            break
    return " ".join(words)
