"""Long videos: check a request of the page, and the jobs that make, continue and branch a long video.

The module does not import diffusers at the top, so the page opens without waiting for that import.
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
"""Value of `LongForm.adapter` for the adapter inside the model folder, or no adapter if the model has none."""
_NUMBERS = {"steps": "num_inference_steps", "width": "width", "height": "height", "guidance": "guidance_scale"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LongForm:
    """A request for a long video as the page sent it; no value is checked yet."""

    prompt: Any = ""
    segments: Any = ()
    """Rows (second, prompt): from this second on, the prompt replaces the previous one. Empty rows are ignored."""
    seconds: Any = None
    seed: Any = 0
    model: Any = None
    """A name of `App.model_names`."""
    adapter: Any = OWN
    """A name of `adapters`."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Values of steps, width, height and guidance; None and 0 mean the default of the adapter or the model."""


def adapters(app: App) -> dict[str, Path]:
    """Return the folders of WorldWeaver adapters in the training runs, by their name on the page."""
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
    """Check a request before it enters the queue, and return the request for the pipeline and its job.

    Raises:
        UserError: a value is invalid; the message is about the first one.
    """
    from postgen.generate_long import LongRequest, prepare_long

    model = app.model(form.model)
    numbers = {_NUMBERS[name]: _number(value) for name, value in form.numbers.items() if value not in (None, "", 0)}
    config = app.request(_text(form.prompt), model=model, seed=_seed(form.seed), **numbers)
    adapter = _adapter(app, form.adapter)
    rate = float(app.facts(model).default("fps") or 8.0)
    seconds = _seconds(form.seconds, app.settings.long_seconds)
    schedule = schedule_of(form.prompt, form.segments, seconds, rate)
    request = LongRequest(config=config, schedule=schedule, seconds=seconds, adapter=adapter, depth=False)
    return (request := dataclasses.replace(request, depth=_has_depth(request))), prepare_long(request)


def schedule_of(prompt: str, segments: Any, seconds: float, rate: float) -> tuple[tuple[int, str], ...]:
    """Return pairs (frame, prompt): each prompt applies from its frame on.

    Args:
        prompt: prompt at frame 0.
        segments: rows (second, prompt) in any order; empty rows are ignored.
        seconds: length of the video.
        rate: frames per second.

    Raises:
        UserError: a row is not a second and a prompt, a second is outside the video, or two rows have the same frame.
    """
    found = {0: prompt}
    rows = segments if isinstance(segments, Sequence) and not isinstance(segments, str) else ()
    for number, row in enumerate(rows, 1):
        second, text, *more = (*row, None, None)[: max(2, len(row))] if isinstance(row, list | tuple) else (None, row)
        if any(each not in (None, "") for each in more):
            raise UserError(f"row {number} of the prompts must have a second and a prompt, and no other values")
        at = _second(second)
        if not isinstance(text, str) or not text.strip():
            if at > 0 or (isinstance(second, str) and second.strip()):
                raise UserError(f"row {number} of the prompts has no prompt: write one, or delete its second")
            continue
        if not 0 < at < seconds:
            raise UserError(
                f"row {number} of the prompts: the second must be above 0 and below {seconds:g}, got {shown(second)}"
            )
        frame = max(1, round(at * rate))
        if frame in found:
            raise UserError(f"row {number} of the prompts: another prompt starts at {at:g} s: change one of the two")
        check_prompts(text)
        found[frame] = text.strip()
    return tuple(sorted(found.items()))


def begin_work(app: App, request: LongRequest, job: Job) -> Work:
    """Return the work of a queued job that makes a new long video; it returns the id of the history entry."""

    def work(task: Task) -> str:
        from postgen.generate_long import LongVideo, places_of

        with _lent(app, task, request, job) as pipe, _Keeping(app) as keeping:
            video = LongVideo(pipe, request, job, places_of(keeping.entry.folder / VIDEO, None, request))
            keeping.make(task, video, {})
        return keeping.finished()

    return work


def go_on_work(app: App, id: Any, seconds: Any) -> Work:
    """Return the work of a job that extends a long video of the history and replaces it by the longer video.

    Args:
        app: the server.
        id: id of the video's history entry.
        seconds: length to add.

    Raises:
        UserError: the video does not exist, or it would exceed the longest length that the server allows.
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
            except CancelledError:  # new chunks stay in the video, so "nothing was kept" would be wrong
                if video.files.frames == made.frames:
                    raise
            finally:
                note_down(video, made.entry.folder)
            (made.entry.folder / POSTER).unlink(missing_ok=True)
        return made.entry.id

    return work


def branch_work(app: App, id: Any, frame: Any, seconds: Any, prompt: Any = None, seed: Any = None) -> Work:
    """Return the work of a job that continues a long video from an earlier frame, as a new result beside the old one.

    Args:
        app: the server.
        id: id of the video's history entry.
        frame: frame of the branch, one of `LongMade.points`.
        seconds: length to add after that frame.
        prompt: prompt after the branch; None or "" keeps the prompts of the video.
        seed: seed of the noise after the branch; None continues the noise of the video.

    Raises:
        UserError: the video does not exist, it has no state at this frame, or a value is invalid.
    """
    from postgen.generate_long import LongVideo, places_of, prepare_long, read_request

    made = made_of(app.history.get(id))
    points = made.points
    if not is_whole(frame, 0) or frame not in points:
        raise UserError("this video cannot branch at that time: reload the page and choose a time from its list")
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
    """The user stopped the video early; its chunks are kept."""


class _Keeping:
    """A new history entry that is kept once the video has a first chunk, also if the job is stopped or fails later."""

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
            self._error = UserError(f"{error}; the part made before the error is kept")
        if not video.files.frames:
            raise CancelledError
        with suppress(UserError):
            video.write_sheet()
        note_down(video, self.entry.folder)
        self.entry.poster  # noqa: B018 - written here, so that the page does not wait for it later

    def finished(self) -> str:
        """Return the id of the entry, or raise the error of `make`; call this after the entry has its final folder."""
        if self._error is not None:
            raise self._error
        return self.entry.id


def _make(task: Task, video: LongVideo, changes: Mapping[str, Any], entry: Entry) -> None:
    """Make chunks until the video has its full length or the user stops it."""
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
    """Whether the adapter of a request predicts depth."""
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
        raise UserError("this server has no adapter of that name: reload the page and choose one from its list")
    return str(found)


def _second(value: Any) -> float:
    """Return the second in a table cell, given as a number or a text; 0 for every other value.

    0 is not a valid second of a row, so the caller refuses it.
    """
    with suppress(ValueError, OverflowError):
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    return 0.0


def _text(prompt: Any) -> str:
    check_prompts(prompt)
    return str(prompt)


def _number(value: Any) -> Any:
    """Return a whole float as an int and every other value unchanged; the settings check type and range."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _seed(seed: Any) -> int:
    if not is_whole(seed, 0, LARGEST_SEED):
        raise UserError(f"the seed must be a whole number from 0 to {LARGEST_SEED:,}, got {shown(seed)}")
    return int(seed)


def _seconds(seconds: Any, most: float, before: float = 0.0) -> float:
    """Check a length in seconds and return it; `before` is the length of the part that exists already."""
    left = math.floor((most - before) * 10) / 10
    if left <= 0:
        raise UserError(
            f"the video has {before:.1f} s, and this server allows {most:g} s at most (postgen demo --long-seconds)"
        )
    if not is_number(seconds) or not 0 < seconds <= left:
        raise UserError(f"the seconds must be above 0 and at most {left:g}, got {shown(seconds)}")
    return float(seconds)
