"""Registration of a quantisation method with diffusers, which has tables but no function for it.

diffusers looks its tables up by the name that a checkpoint stores, so a method must be registered before the
checkpoint is loaded. The import of this module is cheap and does not import diffusers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

_TABLES = "diffusers.quantizers.auto"


def register_quantizer(method: str, home: str, quantizer: str, config: str) -> None:
    """Register a quantisation method, at once if diffusers' tables are imported, else right after their import.

    The module of the classes imports the tables itself. It must therefore call this function at its end, for programs
    that import it first.

    Args:
        method: name of the method, as checkpoints store it.
        home: module of both classes, which is imported together with the tables. If that fails, a warning says so.
        quantizer: name of the quantiser class, see `compat.quantizer.Quantizer`.
        config: name of the config class.
    """

    def add(tables: ModuleType) -> None:
        try:
            found = import_module(home)
        except (ImportError, AttributeError) as error:
            # A version of diffusers with other names must not make the import of diffusers itself fail.
            warnings.warn(f"diffusers cannot load {method} checkpoints: {error}", stacklevel=2)
            return
        if not hasattr(found, quantizer):
            return  # its import has led here, and it will call `register_quantizer` at its end
        tables.AUTO_QUANTIZER_MAPPING[method] = getattr(found, quantizer)
        tables.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = getattr(found, config)

    if _TABLES in sys.modules:
        add(sys.modules[_TABLES])
    else:
        sys.meta_path.insert(0, _Finder(_TABLES, add))


def registered_config(method: str) -> Any:
    """Return the config class of a quantisation method that diffusers knows, its own or a registered one.

    Raises:
        KeyError: the method is unknown.
    """
    return import_module(_TABLES).AUTO_QUANTIZATION_CONFIG_MAPPING[method]


class _Finder:
    """Calls a function once, after the import of a module. Other finders find the module."""

    def __init__(self, name: str, after: Callable[[ModuleType], None]) -> None:
        self.name, self.after = name, after

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for each in others if (found := each.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec


class _Loader:
    """Loads a module with its own loader, which the module keeps, and then calls the function of a finder."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self.loader.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        self.finder.after(module)
