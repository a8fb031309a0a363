"""`postgen compare`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from postgen.commands import options as o
from postgen.errors import NUMBERS, UserError, did_you_mean, shown
from postgen.files import check_apart, named

_OF_BOTH = ("size", "seed", "fps")
"""Settings that both videos must share."""

Prompt = Annotated[str, typer.Argument(help="Prompt of both videos.", show_default=False)]
A = Annotated[
    list[str] | None,
    typer.Option(
        "--a",
        metavar="KEY=VALUE",
        help="Setting of the left video, such as steps=10; can be repeated. KEY is an option of this command, such as"
        " guidance, lora or enhance, or prompt.",
    ),
]
B = Annotated[
    list[str] | None,
    typer.Option("--b", metavar="KEY=VALUE", help="Setting of the right video, such as steps=50; can be repeated."),
]
Vs = Annotated[
    str | None,
    typer.Option(
        "--vs",
        metavar="MODEL",
        help="Compare --model (left) with its student MODEL (right), instead of --a and --b. MODEL is the output of"
        " convert lit or train, or a pipeline.",
    ),
]
Reward = Annotated[
    str | None,
    typer.Option(
        "--reward",
        help="Rewards that score both videos, separated by commas, such as motion_floor; see `postgen score --help`."
        " \\[default: none]",
    ),
]
Output = Annotated[
    str,
    typer.Option(
        *("-o", "--output"),
        metavar="PATH",
        help="Side-by-side video. The names of the two single videos get -a and -b. Existing files are overwritten.",
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
    """Generate one seed with two settings: two videos, a side-by-side video, and a contact sheet of both.

    With --vs, compare two models (a teacher and its student), and write measurements of both videos (JSON).
    """
    sides = [parse_side("--a", a or []), parse_side("--b", b or [])]
    if vs is not None and (a or b):
        raise UserError(
            "--vs compares two models with the same settings: omit --a and --b, or omit --vs (other options, such as"
            " --steps 10, apply to both videos)"
        )
    if vs is None and not (a or b):
        raise UserError(
            "there is nothing to compare: give settings that differ, such as --a guidance=1 --b guidance=5, or a"
            " student with --vs MODEL"
        )
    if vs is None and sides[0] == sides[1]:
        raise UserError("--a and --b are the same: give a setting that differs, such as --a guidance=1 --b guidance=5")
    labels = [" ".join(texts or []) or "as is" for texts in (a, b)]
    if vs is not None:
        labels = [given.get("model", "embedded"), vs]
    place = named(output, folder=format == "frames")
    _make({"prompt": prompt} | given, sides, labels, place, format, vs, reward)


def parse_side(option: str, texts: list[str]) -> dict[str, Any]:
    """Convert `key=value` texts to settings for `GenerateConfig.of`; keys are options of the command line.

    Raises:
        UserError: a text without an equals sign, an unknown or repeated key, or a value of a wrong type.

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
            raise UserError(f"{said}: both videos must have the same {key}, set it with --{key}")
        if name is None:
            hint = did_you_mean(key.replace("_", "-"), keys)
            raise UserError(f"{said} is not a setting.{hint} Known keys: {', '.join(keys)}")
        if name == "lora":
            side[name] = (*side.get(name, ()), value)
        elif name in side:
            raise UserError(f"{option} gives {key} twice: give it once")
        else:
            side[name] = _value(said, kind, value)
    return side


def _keys() -> dict[str, tuple[type, str]]:
    """Return the keys of `--a` and `--b`: key -> type of the value, and field of `GenerateConfig`."""
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
        raise UserError(f"{said}: the value must be {NUMBERS[kind.__name__]}") from None


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
    from postgen.enhancing import enhanced_jobs
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
    jobs = enhanced_jobs(jobs)
    for label, job in zip(labels, jobs, strict=True):
        if job.config.enhanced_prompt is not None:
            typer.echo(f"{label}: enhanced prompt: {job.config.enhanced_prompt}")
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
    """Return the runner of the rewards. All errors, including missing weights, are raised here."""
    from postgen.commands.score import reward_device
    from postgen.compat import quiet_libraries
    from postgen.rewards import RewardRunner, split_rewards

    runner = RewardRunner(split_rewards(reward), device=reward_device(device), offload=True)
    for one in runner.rewards:
        one.check_columns(())
    with quiet_libraries():
        runner.load()
    for one in runner.rewards:
        one.offload()  # free the memory for the video model
    return runner


def _tell(report: Path) -> None:
    """Print the measurements of a report."""
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
