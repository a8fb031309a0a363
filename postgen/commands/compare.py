"""`postgen compare`."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from postgen.commands import options as o
from postgen.errors import UserError, did_you_mean, shown
from postgen.files import check_apart, named

_OF_BOTH = ("size", "seed", "fps")
"""Settings that are not of one side alone."""

Prompt = Annotated[str, typer.Argument(help="What both videos show.", show_default=False)]
A = Annotated[list[str] | None, typer.Option("--a", help="Setting of the left one, as steps=10; repeatable.")]
B = Annotated[list[str] | None, typer.Option("--b", help="Setting of the right one, as steps=50; repeatable.")]
Output = Annotated[
    str,
    typer.Option(
        *("-o", "--output"),
        metavar="PATH",
        help="The side-by-side video; -a and -b stand beside.",
        rich_help_panel=o.FILES,
    ),
]


def compare(
    prompt: Prompt,
    a: A = None,
    b: B = None,
    output: Output = "compare.mp4",
    *,
    given: dict[str, Any],
    format: o.Format = None,
) -> None:
    """Make the same seed under two settings: both videos, one side by side, and a contact sheet of both rows."""
    sides = [parse_side("--a", a or []), parse_side("--b", b or [])]
    if sides[0] == sides[1]:
        raise UserError("--a and --b say the same: give a setting that differs, as --a guidance=1 --b guidance=5")
    labels = [" ".join(texts or []) or "as is" for texts in (a, b)]
    place = named(output, folder=format == "frames")
    _make({"prompt": prompt} | given, sides, labels, place, format)


def parse_side(option: str, texts: list[str]) -> dict[str, Any]:
    """Turn `key=value` texts into settings for `GenerateConfig.of`; keys are the options of the command line.

    Raises:
        UserError: no equals sign, an unknown key, a value that is no number.

    >>> parse_side("--a", ["steps=10", "guidance=1"])
    {'num_inference_steps': 10, 'guidance_scale': 1.0}
    """
    side: dict[str, Any] = {}
    keys = _keys()
    for text in texts:
        key, equals, value = text.partition("=")
        said = f"{option} {shown(text)}"
        kind, name = keys.get(key.replace("_", "-"), (str, None))
        if not equals:
            raise UserError(f"{said} must be key=value. Known keys: {', '.join(keys)}")
        if key in _OF_BOTH:
            raise UserError(f"{said}: both videos have one {key}, which --{key} sets")
        if name is None:
            hint = did_you_mean(key.replace("_", "-"), keys)
            raise UserError(f"{said} names no setting.{hint} Known keys: {', '.join(keys)}")
        if name == "lora":
            side[name] = (*side.get(name, ()), value)
        elif name in side:
            raise UserError(f"{option} gives {key} twice")
        else:
            side[name] = _value(said, kind, value)
    return side


def _keys() -> dict[str, tuple[type, str]]:
    """Return what `--a` and `--b` take: key -> type of the value, and the setting it stands for."""
    keys: dict[str, tuple[type, str]] = {}
    for name, (option, field) in o.setting_options().items():
        if name not in _OF_BOTH:
            kind = next(kind for kind in get_args(get_args(option)[0]) if kind is not type(None))
            keys[name.replace("_", "-")] = kind, field
    return keys | {"prompt": (str, "prompt")}


def _value(said: str, kind: type, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{said}: the value must be {kind.__name__}") from None


def _make(
    shared: dict[str, Any], sides: list[dict[str, Any]], labels: list[str], output: Path, format: str | None
) -> None:
    from postgen.compare import compare_videos, pair_paths
    from postgen.generate import check_rate, prepare, read_by
    from postgen.request import GenerateConfig

    if not output.suffix and format is None:
        format = "mp4"
    paths = pair_paths(output, format)
    configs = [GenerateConfig.of(shared | side) for side in sides]
    check_apart(paths.files, [file for config in configs for file in read_by(config)])
    jobs = [prepare(config) for config in configs]
    check_rate(jobs[0], paths.kind)

    from postgen.commands.progress import steps

    with steps("Comparing") as on_step:
        compare_videos(jobs[0], jobs[1], paths, labels=(labels[0], labels[1]), on_step=on_step)
    typer.echo(f"Side by side {paths.both}, contact sheet {paths.sheet}")
    for label, side in zip(labels, (paths.a, paths.b), strict=True):
        typer.echo(f"{label}: video {side.video}, contact sheet {side.sheet}, settings {side.sidecar}")
