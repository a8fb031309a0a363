"""Tab: training runs as they go, one or several in one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr
from gradio.events import api  # gr.api is the same, which type checkers do not see

from postgen.apps.errors import said
from postgen.apps.run_plots import COLOURS, COLUMNS, GROUPS, Group, group_lines, metric_lines, others, table
from postgen.apps.runs import Checkpoint, Run, Runs, Sample, Standing
from postgen.apps.sample_copies import SampleCopies
from postgen.apps.state import App
from postgen.apps.status import duration, line
from postgen.errors import UserError
from postgen.grpo.curves import Points
from postgen.video import VideoError, read_picture

EVERY = 3.0
"""Seconds between two looks at runs that are shown."""
_COLUMNS = 6
"""Steps whose samples stand side by side."""
_MOST_RUNS = 6
_NO_RUN = "No run here yet: a run appears when it has written config.yaml or metrics.jsonl."


@dataclass(kw_only=True)
class _Page:
    """The components of the tab."""

    runs: Any
    refresh: Any
    timer: Any
    status: Any
    plots: list[Any] = field(default_factory=list)
    other: Any = None
    other_keys: Any = None
    other_plot: Any = None
    gallery: Any = None
    left: Any = None
    right: Any = None
    slider: Any = None
    videos: list[Any] = field(default_factory=list)
    samples: Any = None
    warnings: Any = None
    checkpoints: Any = None
    recipe: Any = None
    seen: Any = None

    @property
    def drawn(self) -> list[Any]:
        """What changes with new lines of a run."""
        return [
            *self.plots,
            self.other,
            self.other_keys,
            self.other_plot,
            self.warnings,
            self.checkpoints,
            self.recipe,
        ]

    @property
    def pictured(self) -> list[Any]:
        """What changes with new samples."""
        return [self.samples, self.gallery, self.left, self.right, self.slider, *self.videos]


def tab(app: App) -> None:
    """Build the tab."""
    runs, copies = Runs(app.settings.runs), SampleCopies()
    page = _layout(runs)
    _wire(app, runs, copies, page)
    api(_api(runs), api_name="run")


def _api(runs: Runs) -> Any:
    """Return the function that clients of the HTTP API call as `/run`."""

    def run(name: str) -> dict[str, Any]:
        """Return how far a run is, and its newest numbers."""
        one = said(lambda: runs.get(name))
        standing = one.standing()
        return {
            "run": one.name,
            "step": standing.step,
            "max_steps": standing.total,
            "writes": standing.writes,
            "seconds_left": standing.seconds_left,
            "metrics": one.newest(),
        }

    return run


def _layout(runs: Runs) -> _Page:
    with gr.Row(equal_height=False):
        chosen = gr.Dropdown(
            runs.names(),
            multiselect=True,
            max_choices=_MOST_RUNS,
            label="Runs",
            info="Several are drawn into one plot; samples and recipe are those of the first.",
            elem_id="runs",
            scale=5,
            min_width=260,
        )
        refresh = gr.Button("Look for runs", size="sm", scale=1, min_width=120, elem_id="runs-refresh")
    page = _Page(runs=chosen, refresh=refresh, timer=gr.Timer(EVERY), status=gr.HTML(elem_id="run-status"))
    with gr.Row(elem_classes="plots"):
        for number, group in enumerate(GROUPS):
            with gr.Column(visible=False) as box:
                head = gr.HTML(_head(group.title, group.about), elem_classes="plot-head")
                plot = _plot(f"plot-{number}")
            page.plots += [box, head, plot]
    with gr.Accordion("Other metrics", open=False):
        page.other = gr.Dropdown([], label="Metric", elem_id="other-metric")
        page.other_keys = gr.HTML(elem_classes="plot-head")
        page.other_plot = _plot("plot-other")
    with gr.Column(visible=False, elem_id="samples") as page.samples:
        _samples(page)
    page.warnings = gr.HTML(elem_id="run-warnings")
    page.checkpoints = gr.HTML(elem_id="run-checkpoints")
    with gr.Accordion("Recipe", open=False):
        page.recipe = gr.Code(language="yaml", interactive=False, show_label=False, max_lines=40, elem_id="recipe")
    page.seen = gr.State(None)
    return page


def _samples(page: _Page) -> None:
    about = "The same noise at each step: what differs, training has changed."
    gr.HTML(_head("Samples of fixed seeds", about))
    page.gallery = gr.Gallery(
        label="Samples, step by step",
        show_label=False,
        columns=_COLUMNS,
        height="auto",
        object_fit="contain",
        interactive=False,
        elem_id="sample-steps",
        buttons=["fullscreen"],
    )
    with gr.Row():
        page.left = gr.Dropdown([], label="Left: step", elem_id="left-step", min_width=120)
        page.right = gr.Dropdown([], label="Right: step", elem_id="right-step", min_width=120)
    page.slider = gr.ImageSlider(
        label="Two steps, one over the other",
        show_label=False,
        interactive=False,
        buttons=["fullscreen"],
        elem_id="sample-slider",
    )
    with gr.Row(elem_id="sample-videos"):
        page.videos = [
            gr.Video(label=side, interactive=False, autoplay=True, loop=True, buttons=[], min_width=150, height=220)
            for side in ("Left", "Right")
        ]


def _plot(elem_id: str) -> Any:
    return gr.LinePlot(
        x=COLUMNS[0],
        y=COLUMNS[1],
        color=COLUMNS[2],
        x_title="step",
        y_title=" ",
        color_title=" ",
        color_map=COLOURS,
        colors_in_legend=[],
        height=240,
        x_axis_format=",.9~r",  # ",d" would call two ticks between steps the same
        y_axis_format=".4~g",
        show_label=False,
        tooltip=list(COLUMNS[:2]),
        min_width=300,
        elem_id=elem_id,
        buttons=[],
    )


def _head(title: str, about: str, labels: Sequence[str] = ()) -> str:
    """Return a title, a line below it, and what the lines of a plot are called, in their colours."""
    return f'<h3>{escape(title)}</h3><p class="note">{escape(about)}</p>{_keys(labels)}'


def _keys(labels: Sequence[str]) -> str:
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{escape(label)}</span>'
        for colour, label in zip(COLOURS.values(), labels, strict=False)
    )
    return f'<p class="keys">{keys}</p>' if keys else ""


def _wire(app: App, runs: Runs, copies: SampleCopies, page: _Page) -> None:
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def look(names: list[str], metric: str | None, seen: list[str] | None) -> list[Any]:
        found = _chosen(runs, names)
        marks = [run.mark() for run in found]
        standing = _told(found) if found else _nothing(runs)
        if marks == seen:
            return [standing, seen, *_same(page.drawn), *_same(page.pictured)]
        return [standing, marks, *_drawn(found, metric), *_pictured(found, copies, None, None)]

    def listed(names: list[str]) -> Any:
        known = runs.names()
        kept = [name for name in names or [] if name in known]
        return gr.update(choices=known, value=kept or known[:1])

    def compared(names: list[str], left: Any, right: Any) -> list[Any]:
        found = _chosen(runs, names)
        return _pictured(found, copies, left, right)[4:] if found else _same(page.pictured[4:])

    def other(names: list[str], metric: str | None) -> list[Any]:
        curves = {run.name: run.curves() for run in _chosen(runs, names)}
        return _other(metric, curves)

    shown = [page.status, page.seen, *page.drawn, *page.pictured]
    inputs = [page.runs, page.other, page.seen]
    page.timer.tick(look, inputs, shown, **private)
    page.runs.change(lambda names, metric: look(names, metric, None), inputs[:2], shown, **private)
    page.refresh.click(listed, page.runs, page.runs, **private)
    app.page.load(listed, page.runs, page.runs, **private)
    for side in (page.left, page.right):
        side.input(compared, [page.runs, page.left, page.right], page.pictured[4:], **private)
    page.other.input(other, [page.runs, page.other], [page.other_keys, page.other_plot], **private)


def _chosen(runs: Runs, names: Any) -> list[Run]:
    """Return the runs that the page names, without those that were removed meanwhile."""
    found = []
    for name in names[:_MOST_RUNS] if isinstance(names, list) else []:
        with suppress(UserError):
            found.append(runs.get(name))
    return found


def _same(components: Sequence[Any]) -> list[Any]:
    return [gr.skip() for _ in components]


def _drawn(found: Sequence[Run], metric: str | None) -> list[Any]:
    """Return the values of `_Page.drawn`."""
    curves = {run.name: run.curves() for run in found}
    names = others(name for own in curves.values() for name in own)
    chosen = metric if metric in names else next(iter(names), None)
    first = found[0] if found else None
    drawn = [(group, group_lines(group, curves)) for group in GROUPS]
    return [
        *(value for group, lines in drawn for value in _group(group, lines)),
        gr.update(choices=names, value=chosen),
        *_other(chosen, curves),
        "" if first is None else warnings_of(first.warnings()),
        "" if first is None else checkpoints_of(first.checkpoints()),
        "" if first is None else first.recipe(),
    ]


def _group(group: Group, lines: Sequence[tuple[str, Points]]) -> list[Any]:
    """Return the values of a group's box, head and plot."""
    labels = [label for label, _ in lines]
    head = _head(group.title, group.about, labels if len(labels) > 1 else [])
    return [gr.update(visible=bool(lines)), head, table(lines)]


def _other(metric: str | None, curves: Mapping[str, Mapping[str, Points]]) -> list[Any]:
    """Return the keys and the plot of a metric by choice."""
    lines = metric_lines(metric, curves) if metric else []
    return [_keys([label for label, _ in lines] if len(lines) > 1 else []), table(lines)]


def _pictured(found: Sequence[Run], copies: SampleCopies, left: Any, right: Any) -> list[Any]:
    """Return the values of `_Page.pictured`; the first and the last step are compared where none is named."""
    samples = {sample.step: sample for sample in found[0].samples()} if found else {}
    if not samples:
        return [gr.update(visible=False), [], *(gr.update(choices=[], value=None),) * 2, None, None, None]
    steps = list(samples)
    sides = [left if left in samples else steps[0], right if right in samples else steps[-1]]
    pictures = {step: picture for step in _spread(steps) if (picture := _picture(samples[step])) is not None}
    both = [_picture(samples[step]) for step in sides]
    videos = [copies.of(samples[step]) for step in sides]
    return [
        gr.update(visible=True),
        gr.update(value=[(picture, f"step {step}") for step, picture in pictures.items()], columns=len(pictures) or 1),
        gr.update(choices=steps, value=sides[0]),
        gr.update(choices=steps, value=sides[1]),
        tuple(both) if all(both) else None,
        *(
            gr.update(value=video, label=f"Step {step}", visible=video is not None)
            for step, video in zip(sides, videos, strict=True)
        ),
    ]


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most `_COLUMNS` steps over the run, its first and its last among them."""
    if len(steps) <= _COLUMNS:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (_COLUMNS - 1))] for place in range(_COLUMNS)]


def _picture(sample: Sample) -> Any:
    try:
        return read_picture(sample.sheet)
    except (VideoError, UserError, OSError):  # removed, or half of it is there
        return None


def _nothing(runs: Runs) -> str:
    return line("idle", _NO_RUN if not runs.names() else "Choose a run.", "")


def _told(found: Sequence[Run]) -> str:
    return "".join(_standing(run.name, run.standing(), run.newest()) for run in found)


def _standing(name: str, standing: Standing, newest: Mapping[str, Any]) -> str:
    """Return one line and a bar that say how far a run is."""
    steps = f"step {standing.step:,} of {standing.total:,}" if standing.total else f"step {standing.step:,}"
    parts = [steps]
    if standing.step_time is not None and standing.writes:
        parts.append(f"{standing.step_time:.3g} s a step")
    if (left := standing.seconds_left) is not None:
        parts.append(f"{duration(left)} left")
    if standing.done:
        parts.append("all steps are done")
    elif standing.age is None:
        parts = ["nothing is written yet"]
    elif standing.writes:
        parts.append(f"last line {duration(standing.age)} ago")
    else:
        parts.append(f"no new line for {duration(standing.age)}: it has ended, or stands still")
    if "loss" in newest and newest["loss"] is None:
        parts.append("its last loss was no number")
    state = "done" if standing.done else "running" if standing.writes else "idle"
    share = min(1.0, standing.step / standing.total) if standing.total else None
    return line(state, name, ", ".join(parts), share)


def warnings_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return HTML of the last warnings."""
    if not rows:
        return '<h3>Warnings</h3><p class="about-facts">None was written.</p>'
    items = []
    for row in rows:
        times = f" ({row['times']} times)" if row["times"] > 1 else ""
        items.append(f"<li><b>step {escape(str(row.get('step', '?')))}</b> {escape(str(row['text']))}{times}</li>")
    return f'<h3>Warnings</h3><ul class="warned">{"".join(items)}</ul>'


def checkpoints_of(found: Sequence[Checkpoint]) -> str:
    """Return HTML of the checkpoints."""
    if not found:
        return '<h3>Checkpoints</h3><p class="about-facts">None yet.</p>'
    rows = "".join(
        f"<tr><td>{one.step:,}</td><td>{one.bytes / 2**20:,.1f} MiB</td>"
        f"<td>{'complete' if one.sound else 'damaged, or being written'}</td></tr>"
        for one in found
    )
    head = "<tr><th>Step</th><th>Size</th><th>State</th></tr>"
    return f'<h3>Checkpoints</h3><table class="plain">{head}{rows}</table>'
