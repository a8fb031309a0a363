"""Find the private names of model libraries that a module uses. Only `postgen.compat` may use them.

A private name belongs to the project if the project defines it: `self._name` if a related class of the project (a base
class or a subclass) defines the name; `other._name` and `getattr(other, "_name")` if a class of the same module does.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module

from tests.parsed import tree_of

MODEL_LIBRARIES = {"accelerate", "diffusers", "peft", "transformers", "trl"}
MAY = "postgen.compat"

NO_LIBRARY = {
    # Methods of named tuples.
    *("_asdict", "_fields", "_make", "_replace"),
    # A documented key of config.json and model_index.json of diffusers.
    "_class_name",
}
"""Names that begin with an underscore but are not private."""
TORCH = {"_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_overloadpacket", "_version"}
TORCH |= {"_scaled_dot_product_flash_attention_for_cpu"}
"""Private names of torch, to which the rule does not apply."""

_SELF = {"self", "cls"}
_BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "__setattr__", "__getattribute__", "__delattr__"}
_DOTTED = re.compile(r"\.*[A-Za-z_]\w*([.:][A-Za-z_]\w*)*")


def is_private(name: str) -> bool:
    """Return whether a name is private: it begins with an underscore, but is neither `__dunder__` nor `_`."""
    return name.startswith("_") and bool(name.strip("_")) and not (name.startswith("__") and name.endswith("__"))


def defined(tree: ast.AST) -> dict[str, set[str]]:
    """Return class name -> private names that the body or the methods of the class (`self._name = ...`) define."""
    return {node.name: set(_defined_by(node)) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _defined_by(kind: ast.ClassDef) -> Iterator[str]:
    for node in kind.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from names
        if "__slots__" in names:
            yield from (item.value for item in ast.walk(node) if isinstance(item, ast.Constant))
    for node in ast.walk(kind):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def kin(trees: Iterable[ast.AST]) -> dict[str, set[str]]:
    """Return class name -> private names of the class, of all its base classes and of all its subclasses."""
    names: dict[str, set[str]] = {}
    bases: list[tuple[str, str]] = []
    for tree in trees:
        for name, own in defined(tree).items():
            names.setdefault(name, set()).update(own)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases += [(node.name, _last(base)) for base in node.bases]
    for child, parent in bases:
        if parent in names and names[parent] is not names[child]:
            # Merge both sets for all classes that have one of them.
            both = names[parent] | names[child]
            old = (id(names[parent]), id(names[child]))
            names.update({name: both for name, own in names.items() if id(own) in old})
    return names


def replaced(module: str, source: str) -> list[str]:
    """Return the private names of a library's class that a subclass in the module redefines, one line each."""
    if module == MAY or module.startswith(f"{MAY}."):
        return []
    tree = tree_of(source)
    own, places = defined(tree), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODEL_LIBRARIES:
            places.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
        elif isinstance(node, ast.Import):
            names = [alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] in MODEL_LIBRARIES]
            places.update({name: (name, "") for name in names})
    found = []
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        names = {name for name in own[kind.name] if is_private(name)} - NO_LIBRARY - TORCH
        for base in kind.bases if names else ():
            place, name = places.get(ast.unparse(base).split(".")[0], ("", ""))
            if place:
                parent = getattr(import_module(place), name or _last(base))
                both = sorted(names & {*dir(parent)} - {*dir(object)})
                found += [f"{module}:{kind.lineno}: {kind.name} defines {each} of {parent.__name__}" for each in both]
    return found


def touched(module: str, source: str, related: Mapping[str, set[str]] | None = None) -> list[str]:
    """Return the lines of a module that use private names of a library, one line each.

    Args:
        module: dotted name of the module.
        source: text of the module.
        related: result of `kin` for the project; None: only the classes of this module.
    """
    if module == MAY or module.startswith(f"{MAY}."):
        return []
    tree = tree_of(source)
    finder = _Finder(tree, kin([tree]) if related is None else related)
    finder.visit(tree)
    return [f"{module}:{line}: private {what}: only {MAY} may" for line, what in sorted(finder.found)]


class _Finder(ast.NodeVisitor):
    def __init__(self, tree: ast.AST, related: Mapping[str, set[str]]) -> None:
        self.related = related
        self.here: set[str] = set().union(*defined(tree).values())
        self.classes: list[str] = []
        self.libraries = dict(_libraries(tree))
        self.parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        self.found: set[tuple[int, str]] = set()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append(node.name)
        self.generic_visit(node)
        self.classes.pop()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._path(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._path(node, f"{node.module or ''}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_private(node.attr) and not self._own(node.value, node.attr):
            self.found.add((node.lineno, ast.unparse(node)))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        by_name = _last(node.func) in _BY_NAME and len(node.args) > 1
        # A composed name never belongs to the project: f"_{name}", "_" + name.
        if by_name and not isinstance(node.args[1], ast.Constant) and _begins(node.args[1]).startswith("_"):
            self.found.add((node.lineno, ast.unparse(node)))
        if by_name and isinstance(node.args[1], ast.Constant):
            name = str(node.args[1].value)
            if is_private(name) and not self._own(node.args[0], name):
                self.found.add((node.lineno, ast.unparse(node)))
            # The remaining cases would be reported twice, or are names of the class itself.
            node = ast.Call(node.func, [node.args[0], *node.args[2:]], node.keywords)
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if is_private(node.arg or "") and node.arg not in self.parameters | self.here:
            self.found.add((node.value.lineno, f"{node.arg}="))
        self.generic_visit(node)

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        names = [name for name in node.kwd_attrs if is_private(name) and name not in self.here]
        self.found.update((node.lineno, f"{name}=") for name in names)
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        start = _begins(node)
        if start.split(".")[0] in MODEL_LIBRARIES and "._" in start:
            self.found.add((node.lineno, ast.unparse(node)))
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                self.visit(value)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Collect private names in a text, such as `for name in ("_a", "_b")` or `attrgetter("x._a")`."""
        text = node.value
        if not isinstance(text, str) or not _DOTTED.fullmatch(text) or text.startswith("torch."):
            return
        parts = [part for part in re.split("[.:]", text) if is_private(part) and not part.startswith("_postgen")]
        if any(part not in self.here | NO_LIBRARY | TORCH for part in parts):
            self.found.add((node.lineno, repr(text)))

    def _path(self, node: ast.stmt, path: str) -> None:
        if path.split(".")[0] in MODEL_LIBRARIES and any(map(is_private, path.split("."))):
            self.found.add((node.lineno, path))

    def _own(self, holder: ast.expr, name: str) -> bool:
        if name in NO_LIBRARY | TORCH:
            return True
        if _is_self(holder) and self.classes:
            return any(name in self.related.get(kind, ()) for kind in self.classes)
        library = self.libraries.get(ast.unparse(holder).split(".")[0].split("(")[0])
        # The rule applies to the model libraries, not to torch, os and other packages.
        return name in self.here if library in (None, "postgen") else library not in MODEL_LIBRARIES


def _is_self(node: ast.expr) -> bool:
    """Return whether an expression is `self`, `cls`, `super()`, `type(self)` or `self.__class__`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("super", "type"):
        return all(map(_is_self, node.args))
    if isinstance(node, ast.Attribute) and node.attr == "__class__":
        return _is_self(node.value)
    return isinstance(node, ast.Name) and node.id in _SELF


def _begins(node: ast.expr) -> str:
    """Return the constant beginning of a composed text; empty if it is unknown."""
    if isinstance(node, ast.BinOp):
        return _begins(node.left)
    if isinstance(node, ast.JoinedStr) and node.values:
        return _begins(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _libraries(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Return name in the module -> library from which it was imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            top = "postgen" if node.level else (node.module or "").split(".")[0]
            yield from ((alias.asname or alias.name, top) for alias in node.names)


def _last(node: ast.expr) -> str:
    """Return `name` for `name`, `x.name`, `name[T]` and `x.name[T]`."""
    if isinstance(node, ast.Subscript):
        return _last(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
