"""Wrong numbers on the command line, generated from the parameters of all commands, including new options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from PIL import Image

from postgen.cli import build
from postgen.commands.compare import _keys
from postgen.commands.options import SETTINGS
from tests.bad_inputs.row import Row

WRONG = ("inf", "-inf", "nan", "1e30", "-1e30", "9" * 5000, "-" + "9" * 5000, "0x10", "", " ", "true", "1,5", "five")
"""Texts that no numeric option accepts."""
FRACTIONS = ("1.5", "1e3")
"""Texts that no option for a whole number accepts."""
LARGE = "1000000000000"
"""10^12, which only seeds may have."""
BY_CHANCE = ("1_0", "\u0661\u0662", " 16 ", "+16", "0016")
"""Texts that Python reads as numbers, and that a user may mean as numbers: they must be accepted as such or
refused."""

RIGHT = {
    "width": "32",
    "height": "32",
    "frames": "5",
    "steps": "3",
    "guidance": "4.5",
    "true_cfg": "4.5",
    "seed": LARGE,
    "fps": "12.5",
    "count": "2",
    "long": "2.5",
    "budget": "0.5",
    **{"rotate": "8", "rank": "2", "points": "4", "guidance_scale": "4.5", "train_steps": "3"},
}
"""A text that must be accepted, for each numeric option of the commands that generate or convert."""

_TRUE = ("--model", "{hunyuan}")  # the model that has this option
BASES: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "a"),
    "compare": ("compare", "a", "--b", "steps=2"),
    "convert lit": ("convert", "lit", "{wan}", "-o", "out"),
    "convert quant": (
        *("convert", "quant", "{wan}", "-o", "out", "--weight", "int4:g8"),
        *("--recipe", "omniquant", "--prompt", "a", "--prompt", "b"),
    ),
    "merge": ("merge", "{wan}", "-o", "out"),
    "score": ("score", "frames", "--prompt", "a"),
    "serve-reward": ("serve-reward", "world"),
    "demo": ("demo",),
}
"""Correct arguments for each command that has numeric options."""


MERGE = {"alpha": "ema", "sigma_rel": "power", "t": "slerp", "density": "ties", "seed": "dare_ties"}
"""Option of `postgen merge` -> the method that has it."""


def _picture(path: Path) -> None:
    Image.new("RGB", (32, 32)).save(path)


FILES = {"frames/frame_00000.png": _picture}


def numeric(annotation: Any) -> type | None:
    """Return int or float for the annotation of a numeric parameter, otherwise None."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float) else None


def commands(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the commands of a group and of its subgroups."""
    for each in group.registered_commands:
        assert each.callback is not None
        yield " ".join((*path, each.name or each.callback.__name__.replace("_", "-"))), each.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance, (*path, str(inner.name)))


def options() -> Iterator[tuple[str, str, str, type]]:
    """Yield (command, parameter, option, int or float) for each numeric option."""
    for command, function in commands(build()):
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if (kind := numeric(parameter.annotation)) is not None:
                (info,) = parameter.annotation.__metadata__
                # Without a default in the annotation, typer stores the first option name in place of the default.
                option = next(word for word in (info.default, *info.param_decls) if str(word).startswith("--"))
                yield command, parameter.name, option, kind


def rows() -> Iterator[Row]:
    """Yield the rows of all numeric options, and of the keys of `--a` and `--b`."""
    for command, name, option, kind in options():
        own = _TRUE if name == "true_cfg" else ("--model", "{wan}")
        base = BASES[command] + (own if command in ("generate", "compare") else ())
        if command == "convert lit" and name != "budget":
            base += ("--budget", "1") if name == "steps" else ("--layers", "all:lit")
        if command == "merge" and name in MERGE:
            base += ("--method", MERGE[name])
        yield from _of(command, name, kind, lambda text, base=base, option=option: (*base, f"{option}={text}"))
    for key, (kind, _) in _keys().items():
        if kind in (int, float):
            own = _TRUE if key == "true-cfg" else ("--model", "{wan}")
            base = ("compare", "a", *own, "--a")
            name = key.replace("-", "_")
            yield from _of("compare --a", name, kind, lambda text, base=base, key=key: (*base, f"{key}={text}"))


def _of(command: str, name: str, kind: type, words: Callable[[str], tuple[str, ...]]) -> Iterator[Row]:
    field = SETTINGS[name][1] if name in SETTINGS else name
    says = f"{name.replace('_', '[_ -]')}|{field}"
    for text in (*WRONG, *(FRACTIONS if kind is int else ()), *(() if name == "seed" else (LARGE,))):
        yield Row(name=f"{command} {name}={_short(text)}", words=words(text), files=FILES, says=says)
    if command in ("score", "serve-reward", "demo", "merge"):
        return  # with correct values these commands would run; other tests do that
    yield Row(name=f"{command} {name} right", words=words(RIGHT[name]), wrong=False)
    for text in BY_CHANCE:
        yield Row(name=f"{command} {name}={text!r}", words=words(text), wrong=False, either=True)


def _short(text: str) -> str:
    return text if len(text) < 30 else f"{text[:2]}... ({len(text)} digits)"
