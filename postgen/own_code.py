"""Functions of the user's own that a recipe or the command line names: rewards, rows of prompts."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from postgen.errors import UserError

_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
_PLACE = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:[.:])(?P<name>[A-Za-z_]\w*)")


def names_own_code(text: str) -> bool:
    """Whether a text has the form of a name that `own_function` takes."""
    return bool(_FILE.fullmatch(text) or _PLACE.fullmatch(text))


def own_function(text: str, what: str) -> Any:
    """Import what a text names: `package.module.name`, `module:name` or `folder/file.py:name`.

    Modules of the current folder are found too, after those that are installed, whichever way the program was started.

    Args:
        text: the name.
        what: what it is for, for messages.

    Raises:
        UserError: another form, no such file, module or name, or code that cannot be imported.
    """
    if found := _FILE.fullmatch(text):
        module = _from_file(Path(found["file"]).expanduser(), f"{what} {text!r}")
    elif text.endswith(".py"):
        raise UserError(f"{what} {text!r} is a file: say which function of it, as {text}:name")
    elif found := _PLACE.fullmatch(text):
        here = os.getcwd()
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)
        module = _loaded(lambda: import_module(found["module"]), f"{what} {text!r}")
    else:
        raise UserError(f"{what} {text!r} names no code: write package.module.name, module:name or file.py:name")
    if not hasattr(module, found["name"]):
        raise UserError(f"{what} {text!r} cannot be imported: there is no {found['name']} in it")
    return getattr(module, found["name"])


def _from_file(file: Path, label: str) -> ModuleType:
    if not file.is_file():
        raise UserError(f"{label} cannot be imported: there is no file {file}")
    path = file.resolve()
    # Two files of one name are two modules; one file is one, however often it is named.
    name = f"own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{label} cannot be imported: {path} is no Python file")
    loader, module = spec.loader, module_from_spec(spec)
    # Dataclasses and pickles look for their module there.
    sys.modules[name] = module
    try:
        _loaded(lambda: loader.exec_module(module), label)
    except UserError:
        del sys.modules[name]
        raise
    return module


def _loaded(load: Any, label: str) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # foreign code raises all kinds
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UserError(f"{label} cannot be imported: {kind}{' '.join(str(error).split())[:200]}") from error
