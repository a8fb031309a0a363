"""The public names of postgen, found in the sources without importing them.

A name is public if a package lists it in `__all__`, if it is a trainer of `postgen.training.METHODS` or the
configuration of one, or if README.md, CONTRIBUTING.md or a page of docs/ names it: in `from postgen.x import y`, or as
`postgen.x.y` in a sentence.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_IMPORT = re.compile(r"^ *from (postgen[\w.]*) import (\([^)]*\)|[^\n(]*)", re.MULTILINE)
_DOTTED = re.compile(r"(?<![\w./])postgen(?:\.[A-Za-z_]\w*)+")
_GENERATED = ("configuration.md",)
"""Pages that are generated from the public names, so they must not add names."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True, kw_only=True, slots=True)
class Public:
    """A public name."""

    package: str
    """The package on whose page the name is listed, for example "postgen.lit"."""
    name: str
    """The dotted name to import, for example "postgen.lit.convert"."""
    home: str
    """The dotted name of the definition, for example "postgen.lit.convert.convert"."""
    documented: bool
    """Whether the definition has a docstring."""


def public_names() -> list[Public]:
    """Return all public names sorted by package: first the exports of a package, then the names of its modules."""
    found: dict[str, Public] = {}
    for package in packages():
        for name in exported(package):
            _add(found, f"{package}.{name}")
    for name in (*trainers(), *configurations(), *_named_by_pages()):
        _add(found, name)
    return sorted(found.values(), key=lambda each: (each.package, each.name.count("."), each.name.lower()))


def packages() -> list[str]:
    """Return "postgen" and its direct subpackages."""
    folders = sorted(path.parent.name for path in (ROOT / "postgen").glob("*/__init__.py"))
    return ["postgen", *(f"postgen.{name}" for name in sorted([*folders, "kernels"]))]


def docstring_of(module: str) -> str:
    """Return the docstring of a module, or an empty string."""
    path = _file(module)
    return (ast.get_docstring(_tree(path)) or "") if path else ""


def _add(found: dict[str, Public], name: str) -> None:
    """Add a name under its definition; of several names of one definition the shortest import is kept."""
    home = _home(name)
    if home is None or (name.rpartition(".")[2].startswith("_") and not name.endswith("__version__")):
        return
    if home in found and (len(found[home].name), found[home].name) <= (len(name), name):
        return
    owner = name if name.count(".") > 1 else home  # an export of postgen itself is listed under its package
    package = ".".join(owner.split(".")[:2])
    if package not in packages():
        package = "postgen"
    module, _, last = home.rpartition(".")
    node, told = _definitions(module)[last]
    documented = bool(told or (not isinstance(node, ast.Assign | ast.AnnAssign) and ast.get_docstring(node)))
    found[home] = Public(package=package, name=name, home=home, documented=documented)


def _home(name: str) -> str | None:
    """Return the dotted name of the definition of a name; None for a module and for a name outside postgen."""
    for _ in range(8):
        module, _, last = name.rpartition(".")
        if not module or _file(module) is None:
            return None
        if last in _definitions(module):
            return name
        target = _imports(module).get(last)
        if target is None or target == name:
            return None
        name = target
    return None


@cache
def _file(module: str) -> Path | None:
    place = ROOT / Path(*module.split("."))
    tries = (place / "__init__.py", place.with_suffix(".py"))
    return next((path for path in tries if path.is_file()), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _definitions(module: str) -> dict[str, tuple[Definition, bool]]:
    """Return name -> (definition, whether a docstring follows an assignment) for a module."""
    path = _file(module)
    found: dict[str, tuple[Definition, bool]] = {}
    body = _tree(path).body if path else []
    for node, below in zip(body, [*body[1:], None], strict=True):
        told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node, False
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node, told
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node, told
    return found


@cache
def _imports(module: str) -> dict[str, str]:
    """Return name -> dotted name for the imports of a module from postgen, including those for type checkers."""
    path = _file(module)
    found: dict[str, str] = {}
    for node in ast.walk(_tree(path)) if path else ():
        if isinstance(node, ast.ImportFrom):
            base = module.split(".") if path and path.name == "__init__.py" else module.split(".")[:-1]
            head = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (head, node.module) if part)
            if source.partition(".")[0] == "postgen":
                found |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
    return found


def exported(package: str) -> list[str]:
    """Return the names of `__all__`; if it is computed from a table, also the names imported for type checkers."""
    place = _definitions(package).get("__all__") if _file(package) else None
    if (
        place is None
        or (value := place[0].value if isinstance(place[0], ast.Assign | ast.AnnAssign) else None) is None
    ):
        return []
    names = [node.value for node in ast.walk(value) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    plain = isinstance(value, ast.List) and all(isinstance(each, ast.Constant) for each in value.elts)
    return names if plain else [*names, *_imports(package)]


def trainers() -> dict[str, str]:
    """Return the dotted name of each trainer of `postgen.training.METHODS` -> its method."""
    methods = _definitions("postgen.training.recipe")["METHODS"][0]
    assert isinstance(methods, ast.Assign)
    return {place.replace(":", "."): method for method, place in ast.literal_eval(methods.value).items()}


def configurations() -> dict[str, str]:
    """Return the dotted name of the configuration class of each method -> the method."""
    found = {}
    for place, method in trainers().items():
        module, _, name = place.rpartition(".")
        trainer = _definitions(module)[name][0]
        for node in trainer.body if isinstance(trainer, ast.ClassDef) else ():
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.target.id == "config_class"
            ):
                assert isinstance(node.value, ast.Name)
                home = _home(f"{module}.{node.value.id}")
                assert home is not None
                found[home] = method
    return found


def _named_by_pages() -> Iterator[str]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        text = page.read_text(encoding="utf-8") if page.name not in _GENERATED else ""
        for module, names in _IMPORT.findall(text):
            for name in re.findall(r"(\w+)(?: as \w+)?", re.sub(r"#.*|[()]", "", names)):
                yield f"{module}.{name}"
        for name in _DOTTED.findall(text):
            yield name
            path = _file(name)
            if path is not None and path.name != "__init__.py":
                yield from (f"{name}.{each}" for each, (node, _) in _definitions(name).items() if _is_code(node))


def _is_code(node: Definition) -> bool:
    return not isinstance(node, ast.Assign | ast.AnnAssign)
