"""Long videos: from what the page asks for to a request, and the jobs that begin one, go on with it and branch.

Light to import: the page is there before diffusers, which takes seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.apps.history import POSTER, Entry
from postgen.apps.jobs import CancelledError, Task, Work
from postgen.apps.long_kept import KIND, VIDEO, Growing, keep_point, made_of, note_down
from postgen.apps.making import LARGEST_SEED, check_prompts, shown_model
from postgen.apps.state import App
from postgen.errors import UserError, is_number, is_whole, shown
from postgen.generate import Job
from postgen.reading import read_json

if TYPE_CHECKING:
    from postgen.generate_long import LongRequest, LongVideo

OWN = ""
"""Stands for the adapter that comes with a model, or none."""
_NUMBERS = {"steps": "num_inference_steps", "width": "width", "height": "height", "guidance": "guidance_scale"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LongForm:
    """What somebody asks for, as it came."""

    prompt: Any = ""
    segments: Any = ()
    """Rows (second, prompt) of further prompts; empty ones are left out."""
    seconds: Any = None
    seed: Any = 0
    model: Any = None
    """A name of `App.model_names`."""
    adapter: Any = OWN
    """A name of `adapters`."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """steps, width, height, guidance; None is the adapter's, or the model's."""


def adapters(app: App) -> dict[str, Path]:
    """Return the folders of adapters among the training runs, by the name that the page shows."""
    found: dict[str, Path] = {}
    if not (runs := app.runs()):
        return found
    from postgen.worldweaver.adapter import CONFIG

    for name, folder in runs.items():
        for file in sorted([*folder.glob(CONFIG), *folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")]):
            if app.of_runs(file):
                found[str(Path(name) / file.parent.relative_to(folder))] = file.parent
    return found


def request_of(app: App, form: LongForm) -> tuple[LongRequest, Job]:
    """Check all that can be checked before the queue.

    Raises:
        UserError: the first thing that is wrong.
    """
    from postgen.generate_long import LongRequest, prepare_long

    model = app.model(form.model)
    numbers = {_NUMBERS[name]: _number(value) for name, value in form.numbers.items() if value not in (None, "")}
    config = app.request(_text(form.prompt), model=model, seed=_seed(form.seed), **numbers)
    adapter = _adapter(app, form.adapter)
    rate = float(app.facts(model).default("fps") or 8.0)
    seconds = _seconds(form.seconds, app.settings.long_seconds)
    schedule = schedule_of(form.prompt, form.segments, seconds, rate)
    request = LongRequest(config=config, schedule=schedule, seconds=seconds, adapter=adapter, depth=False)
    return (request := dataclasses.replace(request, depth=_has_depth(request))), prepare_long(request)


def schedule_of(prompt: str, segments: Any, seconds: float, rate: float) -> tuple[tuple[int, str], ...]:
    """Return the prompts by the frame from which on each is told.

    Args:
        prompt: from the beginning on.
        segments: rows (second, prompt), in any order; empty ones are left out.
        seconds: length of the video.
        rate: frames per second.

    Raises:
        UserError: a row that is none, a second outside of the video, or two for one frame.
    """
    found = {0: prompt}
    rows = segments if isinstance(segments, Sequence) and not isinstance(segments, str) else ()
    for number, row in enumerate(rows, 1):
        second, text, *more = (*row, None, None)[: max(2, len(row))] if isinstance(row, list | tuple) else (None, row)
        if any(each not in (None, "") for each in more):
            raise UserError(f"row {number} of the prompts must have a second and a prompt, and nothing more")
        at = _second(second)
        if not isinstance(text, str) or not text.strip():
            if at > 0 or (isinstance(second, str) and second.strip()):
                raise UserError(f"row {number} of the prompts has no prompt: write one, or take its second out")
            continue
        if not 0 < at < seconds:
            raise UserError(
                f"row {number} of the prompts: the second must be above 0 and below {seconds:g}, got {shown(second)}"
            )
        frame = max(1, round(at * rate))
        if frame in found:
            raise UserError(f"row {number} of the prompts: another one begins at {at:g} s: change one of the two")
        check_prompts(text)
        found[frame] = text.strip()
    return tuple(sorted(found.items()))


def begin_work(app: App, request: LongRequest, job: Job) -> Work:
    """Return the job of the queue that makes a new long video; its result is the id of the entry."""

    def work(task: Task) -> str:
        from postgen.generate_long import LongVideo, places_of

        with _lent(app, task, request, job) as pipe, _Keeping(app) as keeping:
            video = LongVideo(pipe, request, job, places_of(keeping.entry.folder / VIDEO, None, request))
            keeping.make(task, video, {})
        return keeping.finished()

    return work


def go_on_work(app: App, id: Any, seconds: Any) -> Work:
    """Return the job that makes a long video of the history longer, in its place.

    Raises:
        UserError: no such video, or it would be longer than the server allows.
    """
    from postgen.generate_long import LongVideo, prepare_long, read_request

    made = made_of(app.history.get(id))
    length = made.seconds + _seconds(seconds, app.settings.long_seconds, made.seconds)
    request, places = read_request(made.places.state)
    request = dataclasses.replace(request, seconds=length)
    job = prepare_long(request, begins=False)

    def work(task: Task) -> str:
        with _lent(app, task, request, job) as pipe:
            video = LongVideo(pipe, request, job, places, pipe.load_state(places.state))
            try:
                _make(task, video, {}, made.entry)
            except CancelledError:  # what was written stays in the video, so it is no "nothing was kept"
                if video.files.frames == made.frames:
                    raise
            finally:
                note_down(video, made.entry.folder)
            (made.entry.folder / POSTER).unlink(missing_ok=True)
        return made.entry.id

    return work


def branch_work(app: App, id: Any, frame: Any, seconds: Any, prompt: Any = None, seed: Any = None) -> Work:
    """Return the job that goes on from an earlier place of a long video, as a new result; the old one stays.

    Args:
        app: the server.
        id: of the video.
        frame: one of `LongMade.points`.
        seconds: how much is added behind that place.
        prompt: from there on; None or "" goes on with those of the video.
        seed: of the noise from there on; None goes on as the video did.

    Raises:
        UserError: no such video or place, or a wrong setting.
    """
    from postgen.generate_long import LongVideo, places_of, prepare_long, read_request

    made = made_of(app.history.get(id))
    points = made.points
    if not is_whole(frame, 0) or frame not in points:
        raise UserError("this video has no such place to branch from: reload the page for the present list")
    begun = frame / float(made.note["fps"])
    length = begun + _seconds(seconds, app.settings.long_seconds, begun)
    request, source = read_request(made.places.state)
    schedule = tuple(entry for entry in request.schedule if entry[0] < max(1, frame))
    changes: dict[str, Any] = {}
    if prompt not in (None, ""):
        schedule = (*(entry for entry in schedule if frame), (frame, _text(prompt)))
        changes = {"prompt": list(schedule), "negative_prompt": request.config.negative_prompt}
    else:
        schedule = request.schedule
    config = dataclasses.replace(request.config, prompt=schedule[0][1])
    if seed is not None:
        config = dataclasses.replace(config, seed=_seed(seed))
    request = dataclasses.replace(request, config=config, schedule=schedule, seconds=length)
    job = prepare_long(request, begins=False)

    def work(task: Task) -> str:
        import torch

        with _lent(app, task, request, job) as pipe, _Keeping(app) as keeping:
            if seed is not None:
                changes["generator"] = torch.Generator().manual_seed(config.seed)
            places = places_of(keeping.entry.folder / VIDEO, None, request)
            video = LongVideo(pipe, request, job, places, pipe.load_state(points[frame]), source)
            keeping.make(task, video, changes)
        return keeping.finished()

    return work


class _Stopped(Exception):
    """The video was stopped, and what there is is kept."""


class _Keeping:
    """A new entry of the history, which is kept as soon as there is something to watch, whatever ends the work."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._adding = app.history.adding(KIND)
        self._error: UserError | None = None

    def __enter__(self) -> _Keeping:
        self.entry = self._adding.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._adding.__exit__(*error)

    def make(self, task: Task, video: LongVideo, changes: Mapping[str, Any]) -> None:
        try:
            _make(task, video, changes, self.entry)
        except UserError as error:
            if not video.files.frames:
                raise
            self._error = UserError(f"{error}; what was made until then is kept")
        if not video.files.frames:
            raise CancelledError
        with suppress(UserError):
            video.write_sheet()
        note_down(video, self.entry.folder)
        self.entry.poster  # noqa: B018 - made now, and not while somebody waits for it

    def finished(self) -> str:
        """Return the id; say what went wrong after the entry is in its place."""
        if self._error is not None:
            raise self._error
        return self.entry.id


def _make(task: Task, video: LongVideo, changes: Mapping[str, Any], entry: Entry) -> None:
    """Make chunks until the video has its length or somebody stops it."""
    task.tell("Making the video")

    def report(done: int, total: int | None) -> None:
        if done:
            keep_point(video, entry.folder, done)
            depth = video.places.depth if video.request.depth else None
            task.show(Growing(video=video.places.video, depth=depth, frames=done, fps=video.rate, key=entry.id))
        task.step(done, total or 0, "frame")
        on_call()

    def on_call() -> None:
        task.check()
        if task.early and video.files.frames:
            raise _Stopped

    with suppress(_Stopped):
        video.make(report, on_call=on_call, **changes)


def _lent(app: App, task: Task, request: LongRequest, job: Job) -> Any:
    from postgen.generate_long import load_long

    task.tell(f"Loading {shown_model(request.config.model)}")
    key = ("long", job.loading, request.adapter_folder)
    return app.models.lent(key, lambda: load_long(request, job))


def _has_depth(request: LongRequest) -> bool:
    """Whether the adapter of a request makes depth."""
    folder = request.adapter_folder
    if folder is None:
        return False
    from postgen.worldweaver.adapter import CONFIG

    note = read_json(folder / CONFIG, f"the adapter {folder.name} cannot be read")
    return isinstance(note, dict) and "depth" in (note.get("modalities") or ())


def _adapter(app: App, name: Any) -> str | None:
    if name in (None, OWN):
        return None
    found = adapters(app).get(name) if isinstance(name, str) else None
    if found is None:
        raise UserError("this server has no adapter of that name: reload the page for the present list")
    return str(found)


def _second(value: Any) -> float:
    """Return a second that a table has, as a number or as it was typed; 0, which is none, for anything else."""
    with suppress(ValueError, OverflowError):
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    return 0.0


def _text(prompt: Any) -> str:
    check_prompts(prompt)
    return str(prompt)


def _number(value: Any) -> Any:
    """Return a number as settings take it, which hold it to its type and its range."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _seed(seed: Any) -> int:
    if not is_whole(seed, 0, LARGEST_SEED):
        raise UserError(f"the seed must be a whole number from 0 to {LARGEST_SEED:,}, got {shown(seed)}")
    return int(seed)


def _seconds(seconds: Any, most: float, before: float = 0.0) -> float:
    """Check a length; `before` is what is there already."""
    left = math.floor((most - before) * 10) / 10
    if left <= 0:
        raise UserError(f"the video is {before:.1f} s long, and no more than {most:g} are allowed here")
    if not is_number(seconds) or not 0 < seconds <= left:
        raise UserError(f"the seconds must be above 0 and at most {left:g}, got {shown(seconds)}")
    return float(seconds)
