"""Comparison of two settings with one prompt and seed: check the request, make both videos, report the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from postgen.apps.history import Entry
from postgen.apps.jobs import Task, Work
from postgen.apps.making import Form, hide_places, job_of, shown_model
from postgen.apps.scoring import known
from postgen.apps.state import App
from postgen.apps.status import duration
from postgen.compare import PairPaths, compare_videos, pair_paths
from postgen.errors import UserError
from postgen.families.lora import parse_lora
from postgen.generate import Job
from postgen.plug_ins import known_plug_ins
from postgen.reading import read_json
from postgen.request import portable

KIND = "compare"
"""Kind of the results in the history."""
VIDEO = "compare.mp4"
"""File name of the side-by-side video."""
CHANGES = ("steps", "guidance", "model", "lora", "lora_scale", "plug_ins")
"""Fields of a form that may differ between the two sides."""
SIDES = ("Before", "After")
_PARTS = ("video", "frames", "settings")
_LABELS = {"num_inference_steps": "{} steps", "guidance_scale": "guidance {:g}", "model": "{}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PairForm:
    """A requested comparison, unchecked, with the values that the page or a client sent."""

    before: Form
    """Settings of the left video; the right video uses them too, except for `changes`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changed fields of the right video, by a name of `CHANGES`. None or "" keeps the value of `before`; `plug_ins`
    replaces all plug-ins."""
    reward: Any = None
    """A name of `rewards_here`; with None or "" no reward is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two checked jobs."""

    a: Job
    b: Job
    reward: str | None

    @property
    def labels(self) -> tuple[str, str]:
        """Labels that describe the differences between the two jobs."""
        return labels_of(portable(self.a.config), portable(self.b.config))


def pair_of(app: App, form: PairForm) -> Pair:
    """Check the request before it enters the queue, and return its two jobs.

    Raises:
        UserError: a value is invalid (the message is about the first one), or the two sides are the same.
    """
    given = {name: value for name, value in form.changes.items() if value not in (None, "")}
    if unknown := given.keys() - {*CHANGES}:
        raise UserError(f"the two videos cannot differ in {sorted(unknown)[0]}, only in: {', '.join(CHANGES)}")
    reward = form.reward or None
    if reward is not None and reward not in rewards_here():
        raise UserError(f"this server has no reward of that name. Choose one of: {', '.join(rewards_here())}")
    a = job_of(app, form.before)
    try:
        b = job_of(app, dataclasses.replace(form.before, **given))
    except UserError as error:
        raise UserError(f"the After video: {error}") from None
    if a.config == b.config:
        raise UserError("Before and After are the same: change a plug-in, the LoRA, the model or a number of After")
    return Pair(a=a, b=b, reward=reward)


def rewards_here() -> tuple[str, ...]:
    """Return the names of the rewards that need only a prompt and a clip, and that are available on this machine."""
    return tuple(row.name for row in known() if row.lacks is None)


def work_of(app: App, pair: Pair) -> Work:
    """Return the work of a queued job that makes both videos, measures them and adds them to the history.

    The work returns the id of the new history entry.
    """

    def work(task: Task) -> str:
        first = pair.a.config.num_inference_steps or 0
        sides = iter(SIDES)

        def step(done: int, total: int) -> None:
            if done == 1 or done == first + 1:
                task.tell(f"{next(sides, SIDES[1])}: making the video")
            task.step(done, total)

        @contextmanager
        def lend(job: Job) -> Iterator[Any]:
            task.tell(f"Loading {shown_model(job.config.model)}")
            with app.models.pipeline(job) as pipe:
                yield pipe

        with app.history.adding(KIND) as new:
            paths = pair_paths(new.folder / VIDEO, report=True)
            runner = None if pair.reward is None else _runner(pair.reward, pair.a.config.device)
            compare_videos(pair.a, pair.b, paths, labels=pair.labels, on_step=step, rewards=runner, lend=lend)
            task.check()
            hide_places(new.folder)
            new.poster  # noqa: B018 - written here, so that the list of results does not wait for it later
        return new.id

    return work


def _runner(reward: str, device: str) -> Any:
    from postgen.commands.score import reward_device
    from postgen.rewards import RewardRunner

    return RewardRunner([reward], device=reward_device(device), offload=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A comparison in the history."""

    entry: Entry
    paths: PairPaths
    report: Mapping[str, Any]
    """The report that `postgen.compare` writes."""
    settings: tuple[Mapping[str, Any], Mapping[str, Any]]
    """Settings from the two sidecars: before, after."""

    @property
    def labels(self) -> tuple[str, str]:
        """Labels that describe the differences between the two videos."""
        return labels_of(*self.settings)

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.settings[0].get("fps") or 8.0)

    @property
    def files(self) -> list[tuple[str, Path]]:
        """All files, each with its label on the page."""
        found = [("Side by side, video", self.paths.both), ("Side by side, frames", self.paths.sheet)]
        for side, paths in zip(SIDES, (self.paths.a, self.paths.b), strict=True):
            found += [(f"{side}, {what}", path) for what, path in zip(_PARTS, paths.files, strict=True)]
        return found if self.paths.report is None else [*found, ("Measurements", self.paths.report)]


def made_of(entry: Entry) -> Made:
    """Read a comparison from the history.

    Raises:
        UserError: a file of the comparison is missing or damaged.
    """
    paths = pair_paths(entry.folder / VIDEO, report=True)
    for file in paths.files:
        entry.file(file.name)
    hint = "this comparison cannot be read"
    assert paths.report is not None
    report, *notes = (read_json(file, hint) for file in (paths.report, paths.a.sidecar, paths.b.sidecar))
    try:
        settings = (dict(notes[0]["settings"]), dict(notes[1]["settings"]))
        made = Made(entry=entry, paths=paths, report=report, settings=settings)
        measured(made)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{hint}: its JSON files were not written by postgen, or are damaged") from None
    return made


def labels_of(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, str]:
    """Return labels that describe the differences between two videos.

    Args:
        a: settings of the first video, as in its sidecar.
        b: settings of the second video, as in its sidecar.

    >>> labels_of({"num_inference_steps": 10, "lora": []}, {"num_inference_steps": 20, "lora": []})
    ('10 steps', '20 steps')
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for name, form in _LABELS.items():
        if a.get(name) != b.get(name):
            for side, settings in zip(sides, (a, b), strict=True):
                value = shown_model(settings.get(name)) if name == "model" else settings.get(name)
                text = form.format(value) if value is not None else f"default {name.replace('_', ' ')}"
                side.append("1 step" if text == "1 steps" else text)
    if a.get("lora") != b.get("lora"):
        for side, settings in zip(sides, (a, b), strict=True):
            side.append(_lora_label(settings.get("lora") or ()))
    for row in known_plug_ins():
        if a.get(row.option) != b.get(row.option):
            for side, settings in zip(sides, (a, b), strict=True):
                own = settings.get(row.option)
                side.append(f"without {row.title}" if own is None else f"{row.title} {own}")
    return ", ".join(sides[0]), ", ".join(sides[1])


def _lora_label(loras: Any) -> str:
    names = [(Path(choice.path).name, choice.scale) for choice in map(parse_lora, loras)]
    return ", ".join(f"LoRA {name}" + ("" if scale == 1 else f" at {scale:g}") for name, scale in names) or "no LoRA"


def measured(made: Made) -> str:
    """Return HTML with the measurements of both videos, and the difference between the videos."""
    report = made.report
    both = report["a"], report["b"]
    rows = [("Time", *(_took(side["seconds"]) for side in both))]
    rows.append(("Motion, pixels per frame", *(_number(side["motion"]) for side in both)))
    for name in both[0].get("rewards") or {}:
        rows.append((name, *(_number(side["rewards"][name]) for side in both)))
    head = "".join(f"<th scope='col'>{escape(text)}</th>" for text in ("", *SIDES))
    body = "".join(
        f"<tr><th scope='row'>{escape(what)}</th><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for what, a, b in rows
    )
    why = [f"{name}: {text}" for side in both for name, text in (side.get("no_score") or {}).items()]
    notes = "".join(f"<p>No score from {escape(text)}</p>" for text in dict.fromkeys(why))
    return (
        f'<p class="about-prompt">{escape(str(report.get("prompt")))}</p>'
        f'<p class="about-facts"><span><b>Seed</b> {report["seed"]}</span>{_distance(report)}</p>'
        f'<table class="measured"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}'
    )


def _distance(report: Mapping[str, Any]) -> str:
    largest, psnr = report["largest_difference"], report["psnr"]
    if largest is None:
        return "<span>The two videos differ in size, so no difference is measured</span>"
    if psnr is None:
        return "<span>The two videos are identical bit by bit: the change has no effect here</span>"
    return (
        f'<span title="Higher values mean more similar videos; above 40 dB differences are hardly visible">'
        f"<b>PSNR</b> {psnr:.1f} dB</span><span><b>Largest difference</b> {largest:.2f} of 1</span>"
    )


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
