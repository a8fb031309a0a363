"""`postgen compare`."""

import dataclasses
import json
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
Vs = Annotated[
    str | None,
    typer.Option(
        "--vs",
        metavar="MODEL",
        help="Instead of --a and --b: a student of --model (what convert lit or train wrote, or a pipeline), right.",
    ),
]
Reward = Annotated[
    str | None,
    typer.Option("--reward", help="Scores both; names as of `postgen score`. \\[default: none]"),
]
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
    vs: Vs = None,
    reward: Reward = None,
    output: Output = "compare.mp4",
    *,
    given: dict[str, Any],
    format: o.Format = None,
) -> None:
    """Make the same seed under two settings: both videos, one side by side, and a contact sheet of both rows.

    With --vs: with two models, a teacher and its student, and with what was measured of both (JSON).
    """
    sides = [parse_side("--a", a or []), parse_side("--b", b or [])]
    if vs is not None and (a or b):
        raise UserError(
            "--vs takes both videos with the same settings: leave --a and --b out, or --vs (--steps 10 is for both)"
        )
    if vs is None and sides[0] == sides[1]:
        raise UserError("--a and --b say the same: give a setting that differs, as --a guidance=1 --b guidance=5")
    labels = [" ".join(texts or []) or "as is" for texts in (a, b)]
    if vs is not None:
        labels = [given.get("model", "embedded"), vs]
    place = named(output, folder=format == "frames")
    _make({"prompt": prompt} | given, sides, labels, place, format, vs, reward)


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
    shared: dict[str, Any],
    sides: list[dict[str, Any]],
    labels: list[str],
    output: Path,
    format: str | None,
    vs: str | None,
    reward: str | None,
) -> None:
    from postgen.compare import compare_videos, pair_paths, student
    from postgen.generate import check_rate, prepare, read_by
    from postgen.request import GenerateConfig

    if not output.suffix and format is None:
        format = "mp4"
    paths = pair_paths(output, format, report=vs is not None or reward is not None)
    configs = [GenerateConfig.of(shared | side) for side in sides]
    if vs is not None:
        configs[1] = dataclasses.replace(configs[1], model=vs)
    check_apart(paths.files, [file for config in configs for file in read_by(config)])
    first = prepare(configs[0])
    jobs = [first, prepare(configs[1]) if vs is None else student(first, vs)]
    check_rate(jobs[0], paths.kind)
    runner = None if reward is None else _runner(reward, jobs[0].config.device)

    from postgen.commands.progress import steps

    with steps("Comparing") as on_step:
        compare_videos(jobs[0], jobs[1], paths, labels=(labels[0], labels[1]), on_step=on_step, rewards=runner)
    typer.echo(f"Side by side {paths.both}, contact sheet {paths.sheet}")
    for label, side in zip(labels, (paths.a, paths.b), strict=True):
        typer.echo(f"{label}: video {side.video}, contact sheet {side.sheet}, settings {side.sidecar}")
    if paths.report is not None:
        _tell(paths.report)


def _runner(reward: str, device: str) -> Any:
    """Return what scores two clips; every mistake of it, weights that are not there among them, is found now."""
    from postgen.commands.score import reward_device
    from postgen.compat import quiet_libraries
    from postgen.rewards import RewardRunner, split_rewards

    runner = RewardRunner(split_rewards(reward), device=reward_device(device), offload=True)
    for one in runner.rewards:
        one.check_columns(())
    with quiet_libraries():
        runner.load()
    for one in runner.rewards:
        one.offload()  # the model needs the memory first
    return runner


def _tell(report: Path) -> None:
    """Say what was measured."""
    found = json.loads(report.read_text(encoding="utf-8"))
    both = found["a"], found["b"]
    same = "the same clip" if found["largest_difference"] == 0 else "clips of other sizes"
    told = [same if found["psnr"] is None else f"PSNR {found['psnr']:.2f} dB"]
    told.append("seconds {} and {}".format(*(f"{side['seconds']:.1f}" for side in both)))
    told.append("motion {} and {} pixels a frame".format(*(_number(side["motion"]) for side in both)))
    for name in found["a"].get("rewards", ()):
        told.append("{} {} and {}".format(name, *(_number(side["rewards"][name]) for side in both)))
    typer.echo(f"{', '.join(told)}: {report}")
    for side in both:
        for name, why in side.get("no_score", {}).items():
            typer.echo(f"postgen: {name} has no score for {side['video']}: {why}", err=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
