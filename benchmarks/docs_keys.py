"""Writes the page with all settings of recipes from the configuration classes of the training methods.

python -m benchmarks.docs_keys  # writes docs/configuration.md; a test checks that the page is up to date
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from postgen.files import replacing
from postgen.settings import Part
from postgen.training.nested import parts_of
from postgen.training.recipe import METHODS, find_method

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
_LONGEST = 180
"""The largest number of characters of a docstring in the table; a longer docstring is cut to its first sentence."""
_NAMES = {int: "whole number", float: "number", str: "text", bool: "true, false"}
_SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}
_TOP = """# Settings of recipes

This page lists every key of every training method with its type and default. `python -m benchmarks.docs_keys`
generates it from the dataclasses. A recipe is a YAML file with `method:` and any of these keys
([recipes](commands.md#recipes)). `postgen train RECIPE` takes the same keys as `--key value`; these values override
the recipe.

| Type | In a recipe | On the command line |
|---|---|---|
| whole number, number | `max_steps: 50`, `learning_rate: 1e-4` | `--max_steps 50 --learning_rate 1e-4` |
| true, false | `bf16: true` | `--bf16 true`, `--bf16 false` |
| text | `output_dir: runs/a` | `--output_dir runs/a` |
| one of several words | `sde_type: exact` | `--sde_type exact` |
| a list | `sde_window_range: [0, 3]` | `--sde_window_range 0 3`, `--sde_window_range '[0, 3]'` |
| an empty list | `reward_funcs: []` | `--reward_funcs []` |
| no value (types with "or `null`") | `eval_guidance_scale: null` | `--eval_guidance_scale null` |
| a mapping | `widths: {a: 1}` | not possible |

`null` is not a word: in Python it is `None`. Where the column of types contains `none` (`scale_rewards`,
`step_weighting`), this is a word like the others: `scale_rewards: none`.

The keys of a part (a heading below with a word in backticks) can be nested: `lora: {r: 32}` is `lora_r: 32`. On the
command line keys are always flat. An unknown key is an error that names the nearest known key. Long descriptions are
cut to their first sentence; the API reference of the site has the full text.

To resume a run, give every override again: `--resume` compares the settings to those of the checkpoint and refuses a
difference that would change the training. Keys marked *free* may differ. Keys marked *shared out* divide the samples
of an update over processes: they may differ if the run resumes with another number of processes and an update keeps
its number of samples ([example](faq.md#can-i-resume-on-another-number-of-gpus)). Any other difference must be named in
`allow_changed` ([more](faq.md#how-do-i-resume-a-run)).
"""


def page() -> str:
    """Return the text of the page."""
    kinds = {method: find_method(method).config_class for method in METHODS}
    shared: dict[str, dict[str, list[str]]] = {}
    for method, kind in kinds.items():
        for part, names in parts_of(kind).items():
            if part != "method":
                shared.setdefault(part, {})[method] = names
    lines = [_TOP, "## Methods", "", "| Method | Settings | Parts |", "|---|---|---|"]
    for method, kind in kinds.items():
        parts = ", ".join(f"[`{part}`](#part-{part})" for part in parts_of(kind) if part != "method")
        lines.append(f"| [`{method}`](#method-{method}) | `{kind.__name__}` | {parts} |")
    usual: dict[str, dict[str, str]] = {}
    for part, owners in shared.items():
        first = next(iter(owners))
        names = list(dict.fromkeys(name for each in owners.values() for name in each))
        having = {name: next(kinds[method] for method in owners if name in owners[method]) for name in names}
        lines += ["", f"## Part `{part}`", "", f"Methods: {', '.join(f'`{each}`' for each in owners)}.", ""]
        usual[part] = {name: _default(_base(kinds[first], name), name) for name in names}
        lines += _table(having, usual[part])
    for method, kind in kinds.items():
        lines += ["", f"## Method `{method}`", "", *_own_defaults(kind, usual), ""]
        own = dict.fromkeys(parts_of(kind)["method"], kind)
        lines += _table(own, {name: _default(kind, name) for name in own})
    return "\n".join(lines) + "\n"


def _own_defaults(kind: type[Part], usual: dict[str, dict[str, str]]) -> Iterator[str]:
    """Yield the line about keys of parts whose default in this method differs from the table of the part."""
    told = [
        f"`{name}` {value}"
        for part, names in parts_of(kind).items()
        for name in names
        if part != "method" and (value := _default(kind, name)) != usual[part][name]
    ]
    yield f"The class is `{kind.__name__}`." + (
        f" These defaults differ from those of its parts: {', '.join(told)}." if told else ""
    )


def _base(kind: type[Part], name: str) -> type[Part]:
    """Return the class that defines a key: the last class of the method resolution order that has it."""
    return [base for base in kind.__mro__ if name in getattr(base, "__dataclass_fields__", ())][-1]


def _table(owners: dict[str, type[Part]], defaults: dict[str, str]) -> list[str]:
    lines = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, kind in owners.items():
        hint = typing.get_type_hints(kind)[name]
        lines.append(f"| `{name}`{_resume(kind, name)} | {_type(hint)} | {defaults[name]} | {_told(kind, name)} |")
    return lines


def _resume(kind: type[Part], name: str) -> str:
    if name in kind.named_in("may_change") or name.startswith("eval_"):
        return " *free*"
    return " *shared out*" if name in kind.named_in("share_out") else ""


def _type(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{option}`" for option in options)
    if origin is list:
        return f"list of {_SEVERAL[options[0]]}"
    if origin is dict:
        return "mapping"
    if NoneType in options:
        (inner,) = (option for option in options if option is not NoneType)
        return f"{_type(inner)}, or `null`"
    return _NAMES[hint]


def _default(kind: type[Part], name: str) -> str:
    item = next(item for item in dataclasses.fields(kind) if item.name == name)
    value = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
    if value is dataclasses.MISSING:
        return "must be given"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == "":
        return '`""`'
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _told(kind: type[Part], name: str) -> str:
    """Return the docstring of a field for a table cell; a long one is cut to its first sentence."""
    text = next((docs[name] for base in kind.__mro__ if name in (docs := _docstrings(base))), "")
    text = re.sub(r"\bNone\b", "`null`", " ".join(text.split()))
    if len(text) > _LONGEST:
        text = text.partition(". ")[0].rstrip(".") + "."
    return text.replace("|", "\\|")


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """Return field -> docstring (the string below the field) of a dataclass."""
    if not dataclasses.is_dataclass(kind):
        return {}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found


if __name__ == "__main__":
    with replacing(PAGE) as part:
        part.write_text(page(), encoding="utf-8")
