"""Files that come with the package: recipes, prompts, and configurations for `accelerate launch`. Light to import."""

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
"""Folder of the shipped files; in a checkout, the folder `recipes` at the root."""

_KINDS = {"": "recipe", "accelerate": "accelerate", "prompts": "prompts"}
_NEEDS = "Needs: "
"""Prefix of the line in the comment of a recipe that names its hardware and its time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """A file that comes with the package."""

    name: str
    """Name of the file, such as `dancegrpo-tiny`, `accelerate/ddp` or `prompts/two-bodies`."""
    kind: str
    """`recipe`, `accelerate` (for `accelerate launch --config_file`) or `prompts`."""
    path: Path
    """Path of the file."""
    method: str
    """Training method of a recipe; empty for other kinds."""
    about: str
    """Description in one line; empty for prompts."""
    needs: str
    """Hardware and time of a recipe, from its comment."""
    command: str
    """Command of a recipe, from its comment. It runs in a folder that contains the recipe as `recipes/NAME.yaml`."""
    reads: tuple[str, ...]
    """Shipped files that a recipe reads or is launched with, relative to the folder of the recipe."""
    lacks: tuple[str, ...]
    """Datasets that a recipe reads and that the user must provide."""


def shipped() -> list[Shipped]:
    """Return all shipped files: recipes, then configurations for accelerate, then prompts, each sorted by name."""
    return [_read(name, path) for name, path in _files().items()]


def find_shipped(name: str) -> Shipped:
    """Return the shipped file with a name, which may include the suffix.

    Raises:
        UserError: no shipped file has this name; the message suggests the most similar name.
    """
    files = _files()
    plain = name.removesuffix(".yaml").removesuffix(".jsonl")
    if plain not in files:
        ends = {known.rpartition("/")[2]: known for known in files}
        near = f" Did you mean {ends[plain]!r}?" if plain in ends else did_you_mean(plain, files)
        raise UserError(f"there is no shipped recipe or file {shown(name)}.{near} `postgen recipes` lists all names.")
    return _read(plain, files[plain])


def recipe_file(given: str | Path) -> Path:
    """Return the file of a recipe that a user names by its path or by the name of a shipped recipe.

    A file in the current folder has precedence over a shipped recipe of the same name.

    Raises:
        UserError: a name without a suffix is neither a file nor a shipped recipe; or a path does not exist, and a
            shipped recipe has its name.
    """
    text, path = str(given), Path(given)
    recipes = {name: file for name, file in _files().items() if "/" not in name}
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    if text.strip() and not {"/", os.sep, "\0"} & set(text) and path.suffix not in (".yaml", ".yml"):
        if text in recipes:
            return recipes[text]
        if os.path.isdir(path):
            return path  # reading it raises an error that says that it is a folder
        own = path.with_name(f"{path.name}.yaml")
        near = f" Did you mean {str(own)!r}?" if os.path.isfile(own) else did_you_mean(text, recipes)
        raise UserError(
            f"Recipe {shown(text)} cannot be read: there is neither such a file nor a shipped recipe of this name."
            f"{near} `postgen recipes` lists the shipped recipes."
        )
    if (found := _files().get(text.removesuffix(".yaml"))) is not None and not os.path.lexists(path):
        use = f"accelerate launch --config_file {found} -m postgen.train RECIPE"
        what = "a file of prompts" if found.suffix == ".jsonl" else f"a configuration for `accelerate launch`: {use}"
        raise UserError(f"{text} is not a recipe but {what}")
    if path.stem in recipes and not os.path.lexists(path):
        raise UserError(
            f"Recipe {path} cannot be read: there is no such file. For the shipped recipe of this name, write"
            f" {path.stem!r}."
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
    """Return the number of comment lines at the beginning of a file."""
    return next((n for n, line in enumerate(text.split("\n")) if not line.startswith("#")), 0)


def _texts(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, text) for all text values of a recipe, including nested ones."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _texts(value)
        elif isinstance(value, str):
            yield key, value


def _is_own(key: str, value: str, beside: list[str]) -> bool:
    return key in ("train_dataset", "eval_dataset") and value not in beside


def _first_words(comment: list[str]) -> str:
    """Return the beginning of a comment, up to the first colon, the end of a sentence, or the indented command."""
    text: list[str] = []
    for line in comment:
        if line.startswith("   ") or line.strip().startswith(_NEEDS):
            break
        text.append(line.strip())
    return re.split(r"[.:](?=\s|$)", " ".join(text))[0]


def _command(comment: list[str]) -> str:
    """Return the first command of a comment as one line."""
    words: list[str] = []
    for line in comment:
        if line.startswith("   "):
            words.append(line.strip().removesuffix("\\").strip())
            if not line.rstrip().endswith("\\"):
                break
        elif words:
            break
    return " ".join(words)
