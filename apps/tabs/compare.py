"""Tab "Before and after": two videos with the same prompt and seed and different settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from postgen.apps import controls, making
from postgen.apps.comparing import KIND, SIDES, Made, Pair, PairForm, made_of, measured, pair_of, rewards_here, work_of
from postgen.apps.errors import raise_failed, said
from postgen.apps.history import Entry
from postgen.apps.jobs import Progress, Task
from postgen.apps.making import Form
from postgen.apps.players import Clip, downloads, players, shown
from postgen.apps.state import App
from postgen.apps.status import status
from postgen.apps.tabs.earlier import PRIVATE, Earlier
from postgen.errors import UserError

IDLE = "Change at least one setting for After, then press Compare."
_TITLE, _CAPTION = 60, 46
"""Most characters of the title of a job and of the caption of a result."""
_NUMBERS = {"steps": "Steps", "width": "Width", "height": "Height", "frames": "Frames", "guidance": "Guidance"}
_BEFORE = ("prompt", "model", "negative_prompt", *_NUMBERS, "lora", "lora_scale")
_AFTER = ("steps", "guidance", "model", "lora", "lora_scale")
_BOTH = ("steps", "guidance")
"""Numbers that both sides have. The numbers of After follow those of Before until the user changes them."""


@dataclass(frozen=True, kw_only=True)
class _Page:
    """The components of the tab."""

    before: dict[str, Any]
    after: dict[str, Any]
    plug_ins: list[Any]
    """Controls of Before, then controls of After."""
    seed: Any
    randomise: Any
    preset: Any
    reward: Any
    start: Any
    cancel: Any
    status: Any
    job: Any
    browser: Any
    result: _Result

    @property
    def values(self) -> list[Any]:
        """Components with the values of a request, in the order that `_form` expects."""
        return [self.seed, self.reward, *self.before.values(), *self.after.values(), *self.plug_ins]

    @property
    def told(self) -> list[Any]:
        """Components that change while a job runs."""
        return [self.job, self.status, self.start, self.cancel, *self.result.shown]


class _Result(Earlier):
    """The part of the tab that shows a comparison; built in the open Gradio layout."""

    def __init__(self, app: App) -> None:
        super().__init__(app, KIND)
        self.chosen = gr.State(None)
        with gr.Column(visible=False) as self.place:
            self.players = players(elem_id="compare-players")
            self.measured = gr.HTML(elem_id="compare-measured", apply_default_css=False)
            with gr.Accordion("Compare one frame", open=True):
                self.slider = gr.ImageSlider(
                    label="Before | After", type="pil", interactive=False, elem_id="compare-frame", max_height=420
                )
                self.frame = gr.Slider(0, 1, value=0, step=1, label="Frame", elem_id="compare-frame-number")
            with gr.Accordion("Side-by-side video and all files", open=False):
                self.both = gr.Video(
                    label="Side-by-side video", loop=True, elem_id="compare-both", buttons=["download"]
                )
                self.files = gr.HTML(elem_id="compare-files", apply_default_css=False)
            self.remove = gr.Button("Remove this comparison", size="sm", elem_id="compare-remove")
        self.list = gr.Dropdown(label="Earlier comparisons", choices=[], value=None, elem_id="compare-list")
        frame = [self.slider, self.frame]
        self.shown = [self.chosen, self.place, self.players, self.measured, *frame, self.both, self.files, self.list]

    def wire(self) -> None:
        """Register the events."""
        super().wire()
        # `release` fires when the user lets go of the slider, `input` when the user types a number.
        for event in (self.frame.release, self.frame.input):
            event(
                lambda id, n: said(lambda: self.pictures(id, n)),
                [self.chosen, self.frame],
                self.slider,
                trigger_mode="always_last",
                **PRIVATE,
            )

    def one(self, id: Any) -> list[Any]:
        """Return the values of `shown` for a comparison.

        Raises:
            UserError: the comparison does not exist or is damaged.
        """
        made = made_of(self.app.history.get(id))
        last = min(note["num_frames"] for note in made.settings) - 1
        middle = last // 2
        return [
            id,
            gr.update(visible=True),
            _players(made),
            measured(made),
            _pictures(made, middle),
            gr.update(maximum=max(1, last), value=middle, interactive=last > 0),
            str(made.paths.both),
            downloads(made.files),
            self.listed(id),
        ]

    def nothing(self) -> list[Any]:
        """Return the values of `shown` if there is no comparison."""
        return [None, gr.update(visible=False), "", "", None, gr.skip(), None, "", self.listed(None)]

    def pictures(self, id: Any, number: Any) -> Any:
        """Return the frame with this number from both videos, as two pictures.

        Raises:
            UserError: the comparison does not exist, or the number is invalid.
        """
        return _pictures(made_of(self.app.history.get(id)), number)

    def caption(self, entry: Entry) -> str:
        """Return the label of the video After and the prompt, cut to the length of a caption."""
        made = made_of(entry)
        text = f"{made.labels[1]}: {made.report.get('prompt')}"
        return text if len(text) <= _CAPTION else f"{text[:_CAPTION]}..."


def _players(made: Made) -> str:
    videos = zip(SIDES, made.labels, (made.paths.a, made.paths.b), strict=True)
    clips = [Clip(label=f"{side}: {label}", path=paths.video) for side, label, paths in videos]
    return shown(clips, fps=made.fps, key=made.entry.id)


def _pictures(made: Made, number: Any) -> Any:
    """Return one frame of both videos as pictures of equal size; the second is scaled to the size of the first."""
    from PIL import Image

    from postgen.video import read_video

    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 2**31:
        raise UserError("the frame must be a whole number of at least 0")
    found = []
    for paths, note in zip((made.paths.a, made.paths.b), made.settings, strict=True):
        at = min(int(number), note["num_frames"] - 1)
        frame = read_video(paths.video, start=at, count=1)[0]
        found.append(Image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().numpy()))
    return found[0], found[1].resize(found[0].size)


def tab(app: App) -> None:
    """Build the tab."""
    facts = app.facts(app.settings.model)
    first = controls.presets(facts)["draft"]
    page: dict[str, Any] = {"job": gr.State(None)}
    # Three boxes, one below the other on a narrow screen: request, result, further settings.
    with gr.Row(elem_classes="make"):
        with gr.Column(elem_classes="ask"):
            prompt = gr.Textbox(
                label="Prompt", placeholder="Describe both videos", lines=2, max_lines=6, elem_id="compare-prompt"
            )
            if known := facts.closed_vocabulary:
                gr.Examples([[text] for text in known], inputs=[prompt], label="Example prompts for this model")
            with gr.Accordion("Settings of After", open=True):
                after, ours = _after(app, first)
            with gr.Row(elem_classes="buttons"):
                page["start"] = gr.Button("Compare", variant="primary", elem_id="compare", scale=3, min_width=100)
                page["cancel"] = gr.Button(
                    "Cancel", interactive=False, elem_id="compare-cancel", scale=1, min_width=70
                )
            page["status"] = gr.HTML(status(None, IDLE), elem_id="compare-status")
        with gr.Column(elem_classes="made"):
            result = _Result(app)
        with gr.Column(elem_classes="settings"):
            page["preset"] = gr.Radio(list(controls.presets(facts)), value="draft", label="Preset")
            with gr.Row():
                page["seed"] = gr.Number(
                    0, label="Seed", precision=0, minimum=0, elem_id="compare-seed", min_width=120
                )
                page["randomise"] = gr.Checkbox(True, label="New seed each time", min_width=120)
            page["reward"] = gr.Dropdown([("none", "")], value="", label="Reward to measure", elem_id="compare-reward")
            with gr.Accordion("Settings of Before", open=False):
                before, theirs = _before(app, first)
    before["prompt"] = prompt
    browser = app.remembered[__name__]
    whole = _Page(before=before, after=after, plug_ins=[*theirs, *ours], browser=browser, result=result, **page)
    _wire(app, whole)
    result.wire()


def _after(app: App, first: controls.Preset) -> tuple[dict[str, Any], list[Any]]:
    """Build the settings of After; return the fields in the order of `_AFTER`, and the plug-in controls."""
    plug_ins = controls.plug_in_controls("after")
    after: dict[str, Any] = dict.fromkeys(_AFTER)
    with gr.Row():
        for name in _BOTH:
            after[name] = _number(first, name, "after")
    after["lora"], after["lora_scale"] = _lora(app, "after")
    after["model"] = gr.Dropdown(
        [("same", ""), *((name, name) for name in app.model_names)],
        value="",
        label="Model",
        allow_custom_value=app.settings.any_model,
        visible=len(app.model_names) > 1 or app.settings.any_model,
        elem_id="after-model",
    )
    return after, plug_ins


def _before(app: App, first: controls.Preset) -> tuple[dict[str, Any], list[Any]]:
    """Build the settings of Before; return the fields in the order of `_BEFORE`, and the plug-in controls."""
    before: dict[str, Any] = dict.fromkeys(_BEFORE)
    names = app.model_names
    before["model"] = gr.Dropdown(
        names, value=names[0], label="Model", allow_custom_value=app.settings.any_model, elem_id="before-model"
    )
    with gr.Row():
        for name in _NUMBERS:
            before[name] = _number(first, name, "before")
    before["negative_prompt"] = gr.Textbox(label="Negative prompt", info="Needs a guidance scale above 1.")
    before["lora"], before["lora_scale"] = _lora(app, "before")
    return before, controls.plug_in_controls("before")


def _lora(app: App, side: str) -> tuple[Any, Any]:
    names = app.loras()
    with gr.Row(visible=bool(names)):
        choices = [("none", "") if side == "before" else ("same", ""), *((name, name) for name in names)]
        lora = gr.Dropdown(choices, value="", label="LoRA", elem_id=f"{side}-lora")
        scale = gr.Number(1.0, label="LoRA scale", min_width=90, elem_id=f"{side}-lora-scale")
    return lora, scale


def _number(first: controls.Preset, name: str, side: str) -> Any:
    whole = None if name == "guidance" else 0
    value = getattr(first, name)
    return gr.Number(
        value,
        label=_NUMBERS[name],
        precision=whole,
        minimum=0,
        min_width=90,
        elem_id=f"{side}-{name}",
        visible=value is not None,
    )


def _wire(app: App, page: _Page) -> None:
    own = [page.before[name] for name in _NUMBERS]
    numbers = [*own, *(page.after[name] for name in _BOTH)]

    def chosen(name: str, preset: str | None) -> list[Any]:
        found = said(lambda: controls.presets(app.facts(app.model(name))))[preset or "draft"]
        values = [getattr(found, number) for number in (*_NUMBERS, *_BOTH)]
        return [gr.update(value=value, visible=value is not None) for value in values]

    async def start(randomise: bool, *values: Any) -> AsyncIterator[list[Any]]:
        seed = making.drawn_seed() if randomise else values[0]
        task = said(lambda: _submitted(app, _form((seed, *values[1:]))))
        yield [seed, task.id, *_told(app, page, task, app.jobs.progress(task))]
        async for progress in app.jobs.follow(task):
            yield [gr.skip(), gr.skip(), *_told(app, page, task, progress)]
            raise_failed(progress)

    async def again(id: Any) -> AsyncIterator[list[Any]]:
        rewards = gr.update(choices=[("none", ""), *((name, name) for name in rewards_here())])
        # The other components keep their values: the user may have started a job while the page was loading.
        rest = [gr.skip()] * (len(page.told) - len(page.result.shown))
        yield [rewards, *rest, *page.result.newest()]
        if (task := app.jobs.find(id)) is not None and not app.jobs.progress(task).ended:
            async for progress in app.jobs.follow(task):
                yield [gr.skip(), *_told(app, page, task, progress)]
                raise_failed(progress)

    def cancel(id: Any) -> None:
        app.jobs.cancel(id)

    page.before["model"].input(chosen, [page.before["model"], page.preset], numbers, **PRIVATE)
    page.preset.input(chosen, [page.before["model"], page.preset], numbers, **PRIVATE)
    for number in own:
        number.input(lambda: None, None, page.preset, **PRIVATE)  # own numbers: no preset is selected
    for name in (*_BOTH, "lora_scale"):
        page.before[name].input(lambda value: value, page.before[name], page.after[name], **PRIVATE)
    page.start.click(start, [page.randomise, *page.values], [page.seed, page.browser, *page.told], **PRIVATE)
    page.cancel.click(cancel, page.job, None, **PRIVATE)
    app.page.load(again, page.browser, [page.reward, *page.told], **PRIVATE)


def _form(values: tuple[Any, ...]) -> PairForm:
    """Return the request for the values of `_Page.values`."""
    seed, reward, *rest = values
    count = len(_BEFORE)
    before = dict(zip(_BEFORE, rest[:count], strict=True))
    after = dict(zip(_AFTER, rest[count : count + len(_AFTER)], strict=True))
    texts = rest[count + len(_AFTER) :]
    theirs, ours = (controls.plug_in_texts(part) for part in (texts[: len(texts) // 2], texts[len(texts) // 2 :]))
    form = Form(**before, seed=seed, plug_ins=theirs)
    return PairForm(before=form, changes={**after, "plug_ins": {**theirs, **ours}}, reward=reward)


def _submitted(app: App, form: PairForm) -> Task:
    pair: Pair = pair_of(app, form)
    return app.jobs.submit(pair.a.config.prompt[:_TITLE], work_of(app, pair))


def _told(app: App, page: _Page, task: Task, progress: Progress) -> list[Any]:
    """Return the values of `_Page.told` for the state of a job."""
    live = not progress.ended
    buttons = [gr.update(interactive=not live), gr.update(interactive=live)]
    result = [gr.skip() for _ in page.result.shown]
    if progress.state == "done":
        result = page.result.one(progress.result)
    return [task.id if live else None, status(progress), *buttons, *result]
