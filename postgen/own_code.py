"""Import functions of the user that a recipe or an option names, such as rewards and prompt datasets."""

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
    """Return whether a text has one of the forms that `own_function` accepts."""
    return bool(_FILE.fullmatch(text) or _PLACE.fullmatch(text))


def own_function(text: str, what: str) -> Any:
    """Import the object that a text names: `package.module.name`, `module:name` or `folder/file.py:name`.

    Modules in the current folder can be imported too, no matter how the program was started. Installed modules have
    precedence.

    Args:
        text: the name.
        what: purpose of the object, for error messages.

    Raises:
        UserError: the text has another form; the file, module or name does not exist; or the code cannot be imported.
    """
    if found := _FILE.fullmatch(text):
        module = _from_file(Path(found["file"]).expanduser(), f"{what} {text!r}")
    elif text.endswith(".py"):
        raise UserError(f"{what} {text!r} is a file: add the name of the function, {text}:name")
    elif found := _PLACE.fullmatch(text):
        here = os.getcwd()
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)
        module = _loaded(lambda: import_module(found["module"]), f"{what} {text!r}")
    else:
        raise UserError(f"{what} {text!r} cannot be imported: write package.module.name, module:name or file.py:name")
    if not hasattr(module, found["name"]):
        raise UserError(f"{what} {text!r} cannot be imported: its module has no {found['name']}")
    return getattr(module, found["name"])


def _from_file(file: Path, label: str) -> ModuleType:
    if not file.is_file():
        raise UserError(f"{label} cannot be imported: the file {file} does not exist")
    path = file.resolve()
    # The path is part of the module's name: files with the same name become different modules, and a file is imported
    # only once.
    name = f"own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{label} cannot be imported: {path} is not a Python file")
    loader, module = spec.loader, module_from_spec(spec)
    # Dataclasses and pickle look up their module in sys.modules.
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
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UserError(f"{label} cannot be imported: {kind}{' '.join(str(error).split())[:200]}") from error
