"""Tab "Long video": a video that appears chunk by chunk, and that can be stopped, continued and branched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from postgen.apps import making
from postgen.apps.errors import raise_failed, said
from postgen.apps.history import Entry
from postgen.apps.jobs import Progress, Task, Work
from postgen.apps.long_kept import KIND, Growing, LongMade, made_of
from postgen.apps.long_making import OWN, LongForm, adapters, begin_work, branch_work, go_on_work, request_of
from postgen.apps.players import Clip, downloads, players, shown
from postgen.apps.state import App
from postgen.apps.status import status
from postgen.apps.tabs.earlier import PRIVATE, Earlier

IDLE = "Ready. You can watch the first seconds while the rest is being made."
_TITLE, _CAPTION = 60, 40
"""Most characters of the title of a job and of the caption of a result."""
_FIRST, _ROWS = 6, 3
"""Default length in seconds, and number of empty rows for further prompts."""
_NUMBERS = {"steps": "Steps", "guidance": "Guidance", "width": "Width", "height": "Height"}


@dataclass(frozen=True, kw_only=True)
class _Page:
    """The components of the tab."""

    fields: dict[str, Any]
    """Field of `LongForm` -> component, without the fields in `numbers`."""
    numbers: dict[str, Any]
    randomise: Any
    start: Any
    stop: Any
    cancel: Any
    status: Any
    job: Any
    browser: Any
    result: _Result

    @property
    def told(self) -> list[Any]:
        """Components that change while a job runs."""
        result = self.result
        return [self.job, self.status, self.start, self.stop, self.cancel, result.more, result.branch, *result.shown]


class _Result(Earlier):
    """The part of the tab that shows a long video; built in the open Gradio layout."""

    def __init__(self, app: App) -> None:
        super().__init__(app, KIND)
        most = app.settings.long_seconds
        self.chosen = gr.State(None)
        self.players = players(elem_id="long-players")
        with gr.Column(visible=False) as self.place:
            self.about = gr.HTML(elem_id="long-about")
            with gr.Row(elem_classes="beside"):
                self.seconds = gr.Number(
                    min(4, most), label="Seconds to add", minimum=0.1, maximum=most, min_width=100, elem_id="long-more"
                )
                self.more = gr.Button("Continue", elem_id="long-continue", min_width=100)
            with gr.Accordion("Branch from an earlier time", open=False):
                self.points = gr.Dropdown(label="Branch at", choices=[], elem_id="long-points")
                self.prompt = gr.Textbox(
                    label="Prompt after the branch", placeholder="Unchanged", elem_id="long-branch-prompt"
                )
                with gr.Row():
                    self.seed = gr.Number(1, label="Seed after the branch", precision=0, minimum=0, min_width=100)
                    self.length = gr.Number(
                        min(4, most), label="Seconds to add", minimum=0.1, maximum=most, min_width=100
                    )
                self.branch = gr.Button("Branch", elem_id="long-branch")
            with gr.Accordion("Files", open=False):
                self.files = gr.HTML(elem_id="long-files", apply_default_css=False)
            self.remove = gr.Button("Remove this video", size="sm", elem_id="long-remove")
        self.list = gr.Dropdown(
            label="Earlier long videos", choices=[], value=None, elem_id="long-list", visible=False
        )
        self.shown = [self.chosen, self.players, self.place, self.about, self.points, self.files, self.list]

    def one(self, id: Any) -> list[Any]:
        """Return the values of `shown` for a long video.

        Raises:
            UserError: the video does not exist or is damaged.
        """
        made = made_of(self.app.history.get(id))
        points = [(f"{frame / made.growing.fps:.1f} s", frame) for frame in made.points]
        places = made.places
        return [
            id,
            _watched(made.growing),
            gr.update(visible=True),
            about(made),
            gr.update(choices=points, value=points[-1][1] if points else None),
            downloads([("Video", places.video), ("Depth, video", places.depth), ("Frames", places.sheet)]),
            self.listed(id),
        ]

    def growing(self, growing: Growing) -> list[Any]:
        """Return the values of `shown` for a video that is being made."""
        return [gr.skip(), _watched(growing), gr.update(visible=False), *(gr.skip() for _ in self.shown[3:])]

    def nothing(self) -> list[Any]:
        """Return the values of `shown` if there is no long video."""
        return [None, "", gr.update(visible=False), "", gr.skip(), "", self.listed(None)]

    def caption(self, entry: Entry) -> str:
        """Return the prompt and the length."""
        made = made_of(entry)
        return f"{str(made.note.get('prompt'))[:_CAPTION]} ({made.seconds:.1f} s)"


def about(made: LongMade) -> str:
    """Return HTML with the prompts and the settings of a long video."""
    note = made.note
    prompts = "".join(
        f'<p class="about-prompt">{f"{frame / made.growing.fps:.1f} s: " if frame else ""}{escape(str(text))}</p>'
        for frame, text in note["schedule"]
    )
    facts = [("Seed", note.get("seed")), ("Length", f"{made.seconds:.1f} s, {made.frames} frames")]
    facts += [("Model", note.get("model")), ("Adapter", note.get("adapter") or "none (not trained for long videos)")]
    said = "".join(f"<span><b>{escape(str(k))}</b> {escape(str(v))}</span>" for k, v in facts if v is not None)
    return f'{prompts}<p class="about-facts">{said}</p>'


def _watched(growing: Growing) -> str:
    clips = [Clip(label=f"Video, {growing.frames / growing.fps:.1f} s", path=growing.video, version=growing.frames)]
    if growing.depth is not None and growing.depth.is_file():
        clips.append(Clip(label="Depth: near is bright", path=growing.depth, version=growing.frames))
    return shown(clips, fps=growing.fps, key=growing.key)


def tab(app: App) -> None:
    """Build the tab."""
    facts = app.facts(app.settings.model)
    fields: dict[str, Any] = {}
    page: dict[str, Any] = {"job": gr.State(None)}
    # Three boxes, one below the other on a narrow screen: request, result, further settings.
    with gr.Row(elem_classes="make"):
        with gr.Column(elem_classes="ask"):
            fields["prompt"] = gr.Textbox(
                label="Prompt", placeholder="Describe the video", lines=2, max_lines=6, elem_id="long-prompt"
            )
            if known := facts.closed_vocabulary:
                gr.Examples(
                    [[text] for text in known], inputs=[fields["prompt"]], label="Example prompts for this model"
                )
            most = app.settings.long_seconds
            fields["seconds"] = gr.Slider(
                min(1, most), most, value=min(_FIRST, most), step=0.5, label="Seconds", elem_id="long-seconds"
            )
            with gr.Row(elem_classes="buttons"):
                page["start"] = gr.Button("Start", variant="primary", elem_id="long-begin", scale=3, min_width=100)
                page["stop"] = gr.Button(
                    "Stop and keep", interactive=False, elem_id="long-stop", scale=2, min_width=100
                )
                page["cancel"] = gr.Button("Cancel", interactive=False, elem_id="long-cancel", scale=1, min_width=70)
            page["status"] = gr.HTML(status(None, IDLE), elem_id="long-status")
        with gr.Column(elem_classes="made"):
            result = _Result(app)
        with gr.Column(elem_classes="settings"):
            with gr.Accordion("Change the prompt over time", open=False):
                fields["segments"] = gr.Dataframe(
                    [[None, ""] for _ in range(_ROWS)],
                    headers=["From second", "Prompt"],
                    datatype=["number", "str"],
                    type="array",
                    column_count=2,
                    row_count=_ROWS,
                    column_widths=["30%", "70%"],
                    interactive=True,
                    show_label=False,
                    elem_id="long-segments",
                )
            with gr.Row():
                fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="long-seed", min_width=120)
                page["randomise"] = gr.Checkbox(True, label="New seed each time", min_width=120)
            with gr.Accordion("More settings", open=False):
                page["numbers"] = _more(app, fields)
    browser = app.remembered[__name__]
    whole = _Page(fields=fields, browser=browser, result=result, **page)
    _wire(app, whole)
    result.wire()


def _more(app: App, fields: dict[str, Any]) -> dict[str, Any]:
    """Build the controls under "More settings" and return the number fields."""
    names, own = app.model_names, [("the model's own adapter, if any", OWN), *((name, name) for name in adapters(app))]
    fields["model"] = gr.Dropdown(
        names, value=names[0], label="Model", allow_custom_value=app.settings.any_model, elem_id="long-model"
    )
    fields["adapter"] = gr.Dropdown(
        own, value=OWN, label="WorldWeaver adapter", visible=len(own) > 1, elem_id="long-adapter"
    )
    with gr.Row():
        return {
            name: gr.Number(
                0,  # the browser turns an empty number field into 0, so 0 is the default here
                label=label,
                info="0: default",
                precision=None if name == "guidance" else 0,
                minimum=0,
                min_width=90,
                elem_id=f"long-{name}",
            )
            for name, label in _NUMBERS.items()
        }


def _wire(app: App, page: _Page) -> None:
    result = page.result

    async def followed(task: Task) -> AsyncIterator[list[Any]]:
        seen: Any = None
        async for progress in app.jobs.follow(task):
            new = progress.preview is not seen
            seen = progress.preview
            yield _told(page, task, progress, new)
            raise_failed(progress)

    async def start(randomise: bool, seed: Any, *values: Any) -> AsyncIterator[list[Any]]:
        seed = making.drawn_seed() if randomise else seed
        task = said(lambda: _begun(app, page, {**dict(zip(names, values, strict=True)), "seed": seed}))
        async for told in _first(followed(task), seed, task.id):
            yield told

    async def more(id: Any, seconds: Any) -> AsyncIterator[list[Any]]:
        task = said(lambda: _submitted(app, "continue a long video", lambda: go_on_work(app, id, seconds)))
        async for told in _first(followed(task), task.id):
            yield told

    async def branch(id: Any, *asked: Any) -> AsyncIterator[list[Any]]:
        task = said(lambda: _submitted(app, "branch a long video", lambda: branch_work(app, id, *asked)))
        async for told in _first(followed(task), task.id):
            yield told

    async def again(id: Any) -> AsyncIterator[list[Any]]:
        yield _loaded(page)
        if (task := app.jobs.find(id)) is not None and not app.jobs.progress(task).ended:
            async for told in followed(task):
                yield told

    def stop(id: Any) -> None:
        app.jobs.finish_early(id)

    def cancel(id: Any) -> None:
        app.jobs.cancel(id)

    names = [*(name for name in page.fields if name != "seed"), *page.numbers]
    values = [*(page.fields[name] for name in page.fields if name != "seed"), *page.numbers.values()]
    seed = page.fields["seed"]
    page.start.click(start, [page.randomise, seed, *values], [seed, page.browser, *page.told], **PRIVATE)
    result.more.click(more, [result.chosen, result.seconds], [page.browser, *page.told], **PRIVATE)
    asked = [result.points, result.length, result.prompt, result.seed]
    result.branch.click(branch, [result.chosen, *asked], [page.browser, *page.told], **PRIVATE)
    page.stop.click(stop, page.job, None, **PRIVATE)
    page.cancel.click(cancel, page.job, None, **PRIVATE)
    app.page.load(again, page.browser, page.told, **PRIVATE)


async def _first(told: AsyncIterator[list[Any]], *values: Any) -> AsyncIterator[list[Any]]:
    """Prefix the first list of updates with values, and the later lists with "no change"."""
    async for one in told:
        yield [*values, *one]
        values = tuple(gr.skip() for _ in values)


def _begun(app: App, page: _Page, values: dict[str, Any]) -> Task:
    numbers = {name: values.pop(name) for name in page.numbers}
    request, job = request_of(app, LongForm(**values, numbers=numbers))
    return app.jobs.submit(request.config.prompt[:_TITLE], begin_work(app, request, job))


def _submitted(app: App, title: str, work: Callable[[], Work]) -> Task:
    return app.jobs.submit(title, work())


def _told(page: _Page, task: Task, progress: Progress, new: bool) -> list[Any]:
    """Return the values of `_Page.told` for the state of a job; `new` tells whether a new chunk can be watched."""
    live = not progress.ended
    off, on = gr.update(interactive=not live), gr.update(interactive=live)
    result = [gr.skip() for _ in page.result.shown]
    if progress.state == "done":
        result = page.result.one(progress.result)
    elif not live:
        result = page.result.newest()
    elif new and progress.preview is not None:
        result = page.result.growing(progress.preview)
    return [task.id if live else None, status(progress), off, on, on, off, off, *result]


def _loaded(page: _Page) -> list[Any]:
    """Return the values of `_Page.told` for a loaded page: only the results change.

    The user may have started a job while the page was loading, so its components keep their values.
    """
    kept = len(page.told) - len(page.result.shown)
    return [*(gr.skip() for _ in range(kept)), *page.result.newest()]
