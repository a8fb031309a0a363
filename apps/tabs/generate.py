"""Tab "Generate": a video from a prompt, and the history of results."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from postgen.apps import controls, links, making
from postgen.apps.errors import raise_failed, said
from postgen.apps.jobs import Progress, Task
from postgen.apps.making import FIELDS, Form
from postgen.apps.state import App
from postgen.apps.status import line, status
from postgen.apps.tabs.results import Results
from postgen.errors import UserError

IDLE = "Ready. Enter a prompt and press Generate."
_NUMBERS = ("steps", "width", "height", "frames", "guidance")
"""Fields that are set by a preset."""


@dataclass(frozen=True, kw_only=True)
class _Page:
    """The components of the tab."""

    fields: dict[str, Any]
    """Name in `FIELDS` -> component."""
    plug_ins: list[Any]
    preset: Any
    randomise: Any
    start: Any
    cancel: Any
    keep: Any
    status: Any
    preview: Any
    job: Any
    """Session state with the id of the job that the page follows."""
    browser: Any
    """Browser storage for the values of the controls and the job, so that a reload of the page restores them."""
    results: Results

    @property
    def values(self) -> list[Any]:
        """Components with the values of a request, in the order that `_form` expects."""
        return [*(self.fields[name] for name in FIELDS), *self.plug_ins]

    @property
    def told(self) -> list[Any]:
        """Components that change while a job runs."""
        return [self.job, self.status, self.preview, self.start, self.cancel, self.keep, *self.results.shown]


def tab(app: App) -> None:
    """Build the tab."""
    page = _layout(app)
    _wire_settings(app, page)
    _wire_jobs(app, page)
    page.results.wire(lambda note: _reused(app, page, note), [page.preset, page.randomise, *page.values])


def _layout(app: App) -> _Page:
    fields: dict[str, Any] = {}
    # Three boxes, one below the other on a narrow screen: request, result, further settings.
    with gr.Row(elem_id="make"):
        with gr.Column(elem_id="ask"):
            fields["prompt"] = gr.Textbox(
                label="Prompt",
                placeholder="Describe the video",
                lines=2,
                max_lines=6,
                elem_id="prompt",
                autofocus=True,
            )
            _examples(app, fields["prompt"])
            names = list(controls.presets(app.facts(app.settings.model)))
            preset = gr.Radio(names, value="balanced", label="Preset", elem_id="preset")
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=100)
                keep = gr.Button("Stop and keep", interactive=False, elem_id="keep", scale=2, min_width=100)
                cancel = gr.Button("Cancel", interactive=False, elem_id="cancel", scale=1, min_width=70)
            told = gr.HTML(status(None, IDLE), elem_id="status")
            preview = gr.HTML(visible=False, elem_id="preview")
        with gr.Column(elem_id="made"):
            results = Results(app)
        with gr.Column(elem_id="settings"):
            with gr.Row():
                fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120)
                randomise = gr.Checkbox(True, label="New seed each time", elem_id="randomise", min_width=120)
            with gr.Accordion("Plug-ins", open=True):
                plug_ins = controls.plug_in_controls()
            fields |= _more(app)
    return _Page(
        fields=fields,
        plug_ins=plug_ins,
        preset=preset,
        randomise=randomise,
        start=start,
        cancel=cancel,
        keep=keep,
        status=told,
        preview=preview,
        job=gr.State(None),
        browser=gr.BrowserState(None, storage_key="postgen-generate", secret="postgen"),
        results=results,
    )


def _examples(app: App, prompt: Any) -> None:
    """Offer example prompts if the first model has a closed vocabulary."""
    if known := app.facts(app.settings.model).closed_vocabulary:
        gr.Examples([[text] for text in known], inputs=[prompt], label="Example prompts for this model")


def _more(app: App) -> dict[str, Any]:
    """Build the controls under "More settings"."""
    facts = app.facts(app.settings.model)
    first = controls.presets(facts)["balanced"]
    fields: dict[str, Any] = {}
    with gr.Accordion("More settings", open=False):
        names = app.model_names
        fields["model"] = gr.Dropdown(
            names, value=names[0], label="Model", allow_custom_value=app.settings.any_model, elem_id="model"
        )
        fields["negative_prompt"] = gr.Textbox(label="Negative prompt", info="Needs a guidance scale above 1.")
        with gr.Row(elem_classes="numbers"):
            for name, label in zip(_NUMBERS, ("Steps", "Width", "Height", "Frames", "Guidance"), strict=True):
                own: dict[str, Any] = {"value": (value := getattr(first, name)), "visible": value is not None}
                own["precision"] = None if name == "guidance" else 0
                fields[name] = gr.Number(**own, label=label, minimum=0, min_width=90, elem_id=name)
        with gr.Row():
            offered = [("none", ""), *((name, name) for name in app.loras())]
            fields["lora"] = gr.Dropdown(offered, value="", label="LoRA", elem_id="lora", visible=len(offered) > 1)
            fields["lora_scale"] = gr.Number(1.0, label="LoRA scale", visible=len(offered) > 1)
        fields["image"] = gr.Image(
            label="First frame",
            type="filepath",
            format="png",
            sources=["upload", "clipboard"],
            height=200,
            visible=_takes_image(app, names[0]),
            elem_id="first-frame",
        )
    return fields


def _wire_settings(app: App, page: _Page) -> None:
    """Register the events of model and preset: a new model or preset sets the numbers."""
    numbers = [page.fields[name] for name in _NUMBERS]

    def model_chosen(name: str, preset: str | None) -> list[Any]:
        own = said(lambda: controls.presets(app.facts(app.model(name))))
        chosen = own[preset or "balanced"]
        image = gr.update(visible=_takes_image(app, name))
        return [image, *_numbers(chosen)]

    def preset_chosen(preset: str, name: str) -> list[Any]:
        chosen = said(lambda: controls.presets(app.facts(app.model(name))))[preset]
        return _numbers(chosen)

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    page.fields["model"].input(
        model_chosen, [page.fields["model"], page.preset], [page.fields["image"], *numbers], **private
    )
    page.preset.input(preset_chosen, [page.preset, page.fields["model"]], numbers, **private)
    for number in numbers:
        number.input(lambda: None, None, page.preset, **private)  # own numbers: no preset is selected


def _numbers(preset: controls.Preset) -> list[Any]:
    """Return the updates of the number fields for a preset."""
    return [_number(getattr(preset, name)) for name in _NUMBERS]


def _number(value: Any) -> Any:
    """Return the update of a number field; a number that the model does not have is hidden.

    The browser turns an empty number field that is visible into 0.
    """
    return gr.update(value=value, visible=value is not None)


def _filled(app: App, form: Form) -> list[Any]:
    """Return the updates of all fields and plug-ins for a form.

    Raises:
        UserError: the model of the form cannot be read.
    """
    default = controls.presets(app.facts(app.model(form.model)))["balanced"]
    values = making.values_of(form, controls.plug_in_values(form.plug_ins))
    for name in _NUMBERS:
        place, own = FIELDS.index(name), getattr(form, name)
        values[place] = _number(getattr(default, name) if own is None else own)
    return values


def _wire_jobs(app: App, page: _Page) -> None:
    """Register the events that start, follow, stop and cancel a job."""

    async def start(randomise: bool, preset: str | None, *values: Any) -> AsyncIterator[list[Any]]:
        values = (*values[:_SEED], making.drawn_seed() if randomise else values[_SEED], *values[_SEED + 1 :])
        try:
            task = making.submitted(app, _form(values))
        except UserError as error:
            yield [_same(), _same(), *_refused(page, str(error))]
            return
        yield [values[_SEED], _kept(task.id, randomise, preset, values), *_told(app, page, task, None)]
        async for progress in app.jobs.follow(task):
            yield [_same(), _same(), *_told(app, page, task, progress)]
            raise_failed(progress)

    async def again(kept: Any, request: gr.Request) -> AsyncIterator[list[Any]]:
        task = app.jobs.find(kept.get("job") if isinstance(kept, dict) else None)
        before = _linked(app, request) or _restored(page, kept)
        yield [*before, *_told(app, page, None, None)]
        if task is not None and not app.jobs.progress(task).ended:
            async for progress in app.jobs.follow(task):
                yield [*(_same() for _ in before), *_told(app, page, task, progress)]
                raise_failed(progress)

    def cancel(id: Any) -> None:
        app.jobs.cancel(id)

    def keep(id: Any) -> None:
        app.jobs.finish_early(id)

    inputs = [page.randomise, page.preset, *page.values]
    begin: dict[str, Any] = {"inputs": inputs, "outputs": [page.fields["seed"], page.browser, *page.told]}
    # With preprocessing, Gradio would decode the first frame before its size is checked, and store a copy.
    begin["preprocess"] = False
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    page.start.click(start, **begin, **private)
    page.fields["prompt"].submit(start, **begin, **private)
    page.cancel.click(cancel, page.job, None, **private)
    page.keep.click(keep, page.job, None, **private)
    app.page.load(again, page.browser, [page.preset, page.randomise, *page.values, *page.told], **private)


_SEED = FIELDS.index("seed")
_FOLDED = {FIELDS.index(name) for name in FIELDS if name not in ("prompt", "seed")}
"""Indices of the fields under "More settings", which may be closed."""


def _form(values: tuple[Any, ...]) -> Form:
    own = dict(zip(FIELDS, values[: len(FIELDS)], strict=True))
    if isinstance(own["image"], dict):  # the browser sends a file as an object with its path
        own["image"] = own["image"].get("path") or ""
    return Form(**own, plug_ins=controls.plug_in_texts(values[len(FIELDS) :]))


def _refused(page: _Page, why: str) -> list[Any]:
    """Return the values of `_Page.told` for a refused form: the reason in the status line.

    Gradio's `validator` is not used, because its messages disappear with the next event of any tab, for example the
    timer of the training plots.
    """
    folded = "More settings: " if making.place_of(why) in _FOLDED else ""
    said = line("failed", f"{folded}{why}", "")
    return [said if part is page.status else _same() for part in page.told]


def _told(app: App, page: _Page, task: Task | None, progress: Progress | None) -> list[Any]:
    """Return the values of `_Page.told` for the state of a job; without a job, only the results change."""
    if task is None:  # the user may have started a job while the page was loading: leave its components unchanged
        kept = len(page.told) - len(page.results.shown)
        return [*(_same() for _ in range(kept)), *page.results.newest()]
    live = progress is None or not progress.ended
    running = progress is not None and progress.state == "running"
    picture = progress.preview if progress is not None else None
    buttons = [gr.update(interactive=not live), gr.update(interactive=live), gr.update(interactive=running)]
    made = progress is not None and progress.state == "done"
    return [
        task.id if live else None,
        status(progress if progress is not None else app.jobs.progress(task)),
        gr.update(value=picture, visible=picture is not None),
        *buttons,
        *(page.results.newest(progress.result) if made and progress is not None else page.results.unchanged()),
    ]


def _kept(job: str, randomise: bool, preset: str | None, values: tuple[Any, ...]) -> dict[str, Any]:
    own = {name: value for name, value in zip(FIELDS, values, strict=False) if name != "image"}
    return {"job": job, "randomise": randomise, "preset": preset, "fields": own, "plug_ins": values[len(FIELDS) :]}


def _linked(app: App, request: gr.Request) -> list[Any] | None:
    """Return the values of preset, randomise and all controls for the parameters in the address of the page.

    Returns:
        None if the address has no parameters of a video, or invalid ones; the page then shows a warning.
    """
    try:
        found = links.form_in(app, dict(request.query_params))
        filled = _filled(app, found[0]) if found is not None else []
    except UserError as error:
        gr.Warning(f"The link is not valid: {escape(str(error))}", duration=None)
        return None
    if found is None:
        return None
    _, preset, randomise = found
    return [preset, randomise, *filled]


def _restored(page: _Page, kept: Any) -> list[Any]:
    """Return the stored values of preset, randomise and all controls; no change if they do not fit this page."""
    fields = kept.get("fields") if isinstance(kept, dict) else None
    if not isinstance(fields, dict) or len(kept.get("plug_ins") or ()) != len(page.plug_ins):
        return [_same()] * (2 + len(page.values))
    own = {**dict.fromkeys(FIELDS, _same()), **fields, "image": _same()}
    values = [_number(own[name]) if name in _NUMBERS and name in fields else own[name] for name in FIELDS]
    return [kept.get("preset"), bool(kept.get("randomise")), *values, *kept["plug_ins"]]


def _reused(app: App, page: _Page, settings: Any) -> list[Any]:
    """Return the values of preset, randomise and all controls for the settings of a result."""
    form, missing = said(lambda: making.form_of(app, settings))
    if missing:
        gr.Warning(f"Not available on this server: {', '.join(missing)}. All other settings are loaded.")
    return [None, False, *said(lambda: _filled(app, form))]


def _takes_image(app: App, name: str) -> bool:
    facts = said(lambda: app.facts(app.model(name)))
    return facts.takes_image or facts.image_pipeline is not None


def _same() -> Any:
    return gr.skip()
