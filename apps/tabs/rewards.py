"""Tab "Rewards": scores of a clip, and the findings of the judge of the synthetic world."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from postgen.apps import making, scoring
from postgen.apps.errors import raise_failed, said
from postgen.apps.history import SIDECAR
from postgen.apps.jobs import Progress, Task
from postgen.apps.scoring import Known, Scored
from postgen.apps.state import App
from postgen.apps.status import status
from postgen.apps.uploads import discarding, uploaded_settings, uploaded_video
from postgen.errors import UserError, cut

IDLE = "Choose a clip and the rewards to score it with."
_OFFERED = 50
"""Most results of the history that the tab offers."""
_OWN = ""
"""Value of the list of results that means the uploaded clip."""


@dataclass(kw_only=True)
class _Page:
    """The components of the tab."""

    clip: Any
    made: Any
    facts: Any
    note: Any
    prompt: Any
    rewards: Any
    start: Any
    cancel: Any
    status: Any
    scores: Any
    judge: Any
    data: Any
    job: Any

    @property
    def told(self) -> list[Any]:
        """Components that change while a job runs."""
        return [self.job, self.status, self.start, self.cancel, self.scores, self.judge, self.data]


def tab(app: App) -> None:
    """Build the tab."""
    known = scoring.known()
    page = _layout(app, known)
    _wire_clip(app, page)
    _wire_job(app, page, {one.name: one for one in known})


def _layout(app: App, known: Sequence[Known]) -> _Page:
    here = [one for one in known if one.lacks is None]
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            clip = gr.Video(label="Clip", sources=["upload"], height=260, buttons=[], elem_id="score-clip")
            made = gr.Dropdown(
                _results(app), value=_OWN, label="Or a result from the history", elem_id="score-made", filterable=False
            )
            facts = gr.HTML(elem_id="score-facts")
            prompt = gr.Textbox(
                label="Prompt",
                info="What the clip should show. A clip made by postgen, or its JSON file, fills this in.",
                lines=2,
                max_lines=6,
                max_length=making.LONGEST,
                elem_id="score-prompt",
            )
            note = gr.UploadButton("Load prompt from JSON", file_types=[".json"], size="sm", elem_id="score-note")
        with gr.Column(scale=6, min_width=320):
            rewards = gr.CheckboxGroup(
                [one.name for one in here],
                value=[one.name for one in here if one.name in scoring.FIRST],
                label="Rewards",
                elem_id="score-rewards",
            )
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Score", variant="primary", elem_id="score", scale=3, min_width=110)
                cancel = gr.Button("Cancel", interactive=False, elem_id="score-cancel", scale=1, min_width=70)
            told = gr.HTML(status(None, IDLE), elem_id="score-status")
            scores = gr.HTML(elem_id="scores")
            judge = gr.HTML(elem_id="judge")
            with gr.Accordion("As JSON", open=False):
                data = gr.JSON(show_label=False, elem_id="score-data")
    _meanings(here, [one for one in known if one.lacks is not None])
    return _Page(
        clip=clip,
        made=made,
        facts=facts,
        note=note,
        prompt=prompt,
        rewards=rewards,
        start=start,
        cancel=cancel,
        status=told,
        scores=scores,
        judge=judge,
        data=data,
        job=gr.State(None),
    )


def _meanings(here: Sequence[Known], away: Sequence[Known]) -> None:
    """Build the descriptions of the available and of the unavailable rewards."""
    with gr.Accordion("What each reward means", open=False):
        gr.HTML(about_of(here), elem_id="rewards-here")
    if away:
        with gr.Accordion(f"{len(away)} more rewards that are not available on this machine yet", open=False):
            gr.HTML(away_of(away), elem_id="rewards-away")


def _wire_clip(app: App, page: _Page) -> None:
    """Register the events that show the facts of a chosen clip and fill in its prompt."""
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def uploaded(path: str | None) -> list[Any]:
        if not path:
            return ["", gr.skip(), gr.skip()]
        footage = said(lambda: _clip(app, path))
        return [facts_of(footage.info), _prompt_in(app, path), _OWN]

    def made(id: str) -> list[Any]:
        if id == _OWN:
            return ["", gr.skip(), gr.skip()]
        entry = said(lambda: app.history.get(id))
        prompt = said(lambda: making.note_of(entry.file(SIDECAR))).get("prompt")
        return [facts_of(said(lambda: _info(entry.video))), prompt if isinstance(prompt, str) else "", None]

    def noted(path: str) -> str:
        def read() -> Any:
            with discarding(path):
                return uploaded_settings(path, app.settings).get("prompt")

        prompt = said(read)
        if not isinstance(prompt, str):
            raise gr.Error("the settings have no prompt: describe what the clip should show", print_exception=False)
        return prompt

    page.clip.change(uploaded, page.clip, [page.facts, page.prompt, page.made], **private)
    page.made.input(made, page.made, [page.facts, page.prompt, page.clip], **private)
    page.made.focus(lambda: gr.update(choices=_results(app)), None, page.made, **private)
    page.note.upload(noted, page.note, page.prompt, **private)


def _wire_job(app: App, page: _Page, known: Mapping[str, Known]) -> None:
    """Register the events that start, follow and cancel a job, and the endpoint `/score`."""

    async def begin(clip: str | None, made: str, prompt: str, rewards: list[str]) -> AsyncIterator[list[Any]]:
        task = said(lambda: _submitted(app, clip, made, prompt, rewards))
        yield _told(task, app.jobs.progress(task), known)
        async for progress in app.jobs.follow(task):
            yield _told(task, progress, known)
            raise_failed(progress)

    async def called(clip: str | None, made: str, prompt: str, rewards: list[str]) -> AsyncIterator[dict[str, Any]]:
        """Score a clip or a result of the history. Yields the state of the job, at the end with the scores."""

        def submitted() -> Task:
            with discarding(clip):  # a refused upload is of no use: the next call uploads its own clip
                return _submitted(app, clip, made, prompt, rewards)

        task = said(submitted)
        try:
            async for progress in app.jobs.follow(task):
                yield _stands(task, progress)
        finally:
            app.jobs.cancel(task.id)  # no effect if the job has ended

    inputs = [page.clip, page.made, page.prompt, page.rewards]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    page.start.click(begin, inputs, page.told, **private)
    page.cancel.click(lambda id: app.jobs.cancel(id), page.job, None, **private)
    # An endpoint that takes an upload needs components as inputs: they restrict files to the folder of uploads. A
    # dropdown would accept only the results at the start of the server, so a client names a result in a text field.
    by_id = gr.Textbox(visible=False)
    inputs = [page.clip, by_id, page.prompt, page.rewards]
    gr.Button(visible=False).click(called, inputs, page.data, api_name="score", show_progress="hidden")


def _submitted(app: App, clip: Any, made: Any, prompt: Any, names: Any) -> Task:
    """Check the request and put its job into the queue.

    Raises:
        UserError: a value is invalid (the message is about the first one), or the queue is full.
    """
    from postgen.video import Footage

    rewards = scoring.chosen_rewards(names)
    text = scoring.checked_prompt(prompt, rewards)
    if made not in (None, _OWN):
        if clip is not None:
            raise UserError("both a clip and a result of the history are given: choose one of them")
        video = app.history.get(made).video
        footage = Footage(video, _info(video))
    else:
        footage = _clip(app, clip)
    return app.jobs.submit("scores of a clip", scoring.work_of(app, footage, text, rewards))


def _clip(app: App, path: Any) -> Any:
    """Return an uploaded clip as `Footage`; delete an upload that is refused."""
    with discarding(path):
        return uploaded_video(path, app.settings, "clip")


def _info(video: Any) -> Any:
    from postgen.video import VideoError, probe

    try:
        return probe(video)
    except VideoError as error:
        raise UserError(f"the result cannot be read: {str(error).replace(str(video), video.name)}") from error


def _told(task: Task, progress: Progress, known: Mapping[str, Known]) -> list[Any]:
    """Return the values of `_Page.told` for the state of a job."""
    live = not progress.ended
    found: Scored | None = progress.result
    shown: list[Any] = ["", "", None]
    if found is not None:
        shown = [scores_of(found, known), judge_of(found), found.to_dict()]
    buttons = [gr.update(interactive=not live), gr.update(interactive=live)]
    return [task.id if live else None, status(progress), *buttons, *shown]


def _stands(task: Task, progress: Progress) -> dict[str, Any]:
    if progress.error is not None:
        raise gr.Error(progress.error, print_exception=False)
    names = ("state", "position", "text", "done", "total", "seconds_left")
    found: Scored | None = progress.result
    return {
        "job": task.id,
        **{name: getattr(progress, name) for name in names},
        "result": None if found is None else found.to_dict(),
    }


def _results(app: App) -> list[tuple[str, str]]:
    """Return label and id of the results in the history, newest first, after an entry for the uploaded clip."""
    found = [("the uploaded clip", _OWN)]
    for entry in app.history.entries()[:_OFFERED]:
        try:
            prompt = str(making.note_of(entry.file(SIDECAR)).get("prompt"))
        except UserError:  # a result of another tab, or a file of the result is missing
            continue
        found.append((f"{entry.made:%d %b %H:%M}  {cut(prompt, 60)}", entry.id))
    return found


def _prompt_in(app: App, path: str) -> Any:
    """Return the prompt in the metadata of a video made by postgen; no change for other videos."""
    try:
        prompt = uploaded_settings(path, app.settings).get("prompt")
    except UserError:
        return gr.skip()
    return prompt if isinstance(prompt, str) else gr.skip()


def facts_of(info: Any) -> str:
    """Return HTML with frames, size, frame rate and duration of a video."""
    rate = f"{info.fps:.3g} frames per second" if info.fps else "no frame rate"
    told = [f"{info.frames} frames", f"{info.width} x {info.height}", rate, f"{info.seconds:.1f} s"]
    return f'<p class="about-facts">{"".join(f"<span>{escape(one)}</span>" for one in told)}</p>'


def scores_of(found: Scored, known: Mapping[str, Known]) -> str:
    """Return HTML with the table of scores."""
    rows = []
    for name, value in found.scores.items():
        one = known[name]
        shown = "-" if value is None else f"{value:.4f}"
        note = f'<p class="note wrong">{escape(found.notes[name])}</p>' if name in found.notes else ""
        rows.append(
            f'<tr><td><b>{escape(name)}</b><p class="note">{escape(one.says)}</p>{note}</td>'
            f'<td class="number"><b>{shown}</b><p class="note">{escape(one.range)}</p></td></tr>'
        )
    head = '<tr><th>Reward, and the meaning of a high score</th><th class="number">Score</th></tr>'
    return f'<table class="plain">{head}{"".join(rows)}</table>'


def judge_of(found: Scored) -> str:
    """Return HTML with the findings of the world's judge: the clauses of the prompt, and the checks of the clip."""
    if not found.clauses and not found.checks:
        return ""
    read = "".join(_verdict(text, why or "can be judged", not why) for text, why in found.clauses)
    words = f'<h3>The prompt, as the judge reads it</h3><table class="plain">{read}</table>' if read else ""
    if not found.checks:
        return f'{words}<p class="note">The clip is too short or too small for the judge: 5 frames, 32 px a side.</p>'
    seen = "".join(_verdict(one["what"], _against(one), one["right"]) for one in found.checks)
    verdict = (
        "The clip shows everything in the prompt."
        if found.all_right
        else "A part of the prompt is not shown, or cannot be judged."
    )
    head = "<h3>The clip, as the judge sees it</h3>"
    return f'{words}{head}<p class="note">{verdict}</p><table class="plain">{seen}</table>'


def _against(check: Mapping[str, Any]) -> str:
    parts = {"expected": check["wanted"], "found": check["found"]}
    return ", ".join(f"{word}: {value}" for word, value in parts.items() if value is not None)


def _verdict(what: str, more: str, right: bool) -> str:
    mark = ("right", "yes", "&#10003;") if right else ("wrong", "no", "&#10007;")
    return (
        f'<tr><td class="mark {mark[0]}" aria-label="{mark[1]}">{mark[2]}</td>'
        f'<td>{escape(what)}<p class="note">{escape(more)}</p></td></tr>'
    )


def about_of(known: Sequence[Known]) -> str:
    """Return an HTML table of the given rewards, each with its meaning and its range."""
    return _listed([(one.name, one.says, one.range + "; needs a prompt" * one.needs_prompt) for one in known])


def away_of(known: Sequence[Known]) -> str:
    """Return an HTML table of the given rewards, each with what this machine lacks for it."""
    return _listed([(one.name, one.says, one.lacks or "") for one in known])


def _listed(rows: Sequence[tuple[str, str, str]]) -> str:
    told = "".join(
        f'<tr><td><b>{escape(name)}</b><p class="note">{escape(more)}</p></td><td>{escape(says)}</td></tr>'
        for name, says, more in rows
    )
    return f'<table class="plain">{told}</table>'
