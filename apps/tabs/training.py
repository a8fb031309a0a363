"""Tab "Training": live curves, samples and warnings of one or several training runs."""

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
from postgen.training.run_curves import Points
from postgen.video import VideoError, read_picture

EVERY = 3.0
"""Seconds between two updates of the chosen runs."""
_COLUMNS = 6
"""Most steps whose samples are shown side by side."""
_MOST_RUNS = 6
_NO_RUN = "No run yet: a run appears after it has written config.yaml or metrics.jsonl."


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
        """Components that change with new metrics of a run."""
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
        """Components that change with new samples."""
        return [self.samples, self.gallery, self.left, self.right, self.slider, *self.videos]


def tab(app: App) -> None:
    """Build the tab."""
    runs, copies = Runs(app.settings.runs), SampleCopies()
    page = _layout(runs)
    _wire(app, runs, copies, page)
    api(_api(runs), api_name="run")


def _api(runs: Runs) -> Any:
    """Return the function of the endpoint `/run`."""

    def run(name: str) -> dict[str, Any]:
        """Return the progress and the newest metrics of a training run."""
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
            info="The plots show all chosen runs; samples, warnings, checkpoints and recipe are of the first one.",
            elem_id="runs",
            scale=5,
            min_width=260,
        )
        refresh = gr.Button("Refresh the list", size="sm", scale=1, min_width=120, elem_id="runs-refresh")
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
    about = "All steps use the same noise, so every difference comes from training."
    gr.HTML(_head("Samples with fixed seeds", about))
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
        x_axis_format=",.9~r",  # ",d" would give ticks between two steps the same label
        y_axis_format=".4~g",
        show_label=False,
        tooltip=list(COLUMNS[:2]),
        min_width=300,
        elem_id=elem_id,
        buttons=[],
    )


def _head(title: str, about: str, labels: Sequence[str] = ()) -> str:
    """Return HTML with a title, a line of text, and the labels of a plot's lines in their colours."""
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
    """Return the runs with these names, without runs that have been removed."""
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
    """Return the legend and the plot of the metric chosen under "Other metrics"."""
    lines = metric_lines(metric, curves) if metric else []
    return [_keys([label for label, _ in lines] if len(lines) > 1 else []), table(lines)]


def _pictured(found: Sequence[Run], copies: SampleCopies, left: Any, right: Any) -> list[Any]:
    """Return the values of `_Page.pictured`.

    Args:
        found: the chosen runs; the samples are those of the first run.
        copies: copies of sample videos for the players.
        left: step on the left; the first step if the run has no such samples.
        right: step on the right; the last step if the run has no such samples.
    """
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
    """Return at most `_COLUMNS` evenly spread steps, including the first and the last one."""
    if len(steps) <= _COLUMNS:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (_COLUMNS - 1))] for place in range(_COLUMNS)]


def _picture(sample: Sample) -> Any:
    try:
        return read_picture(sample.sheet)
    except (VideoError, UserError, OSError):  # the picture was removed, or is still being written
        return None


def _nothing(runs: Runs) -> str:
    return line("idle", _NO_RUN if not runs.names() else "Choose a run.", "")


def _told(found: Sequence[Run]) -> str:
    return "".join(_standing(run.name, run.standing(), run.newest()) for run in found)


def _standing(name: str, standing: Standing, newest: Mapping[str, Any]) -> str:
    """Return HTML with the progress of a run: one line and a bar."""
    steps = f"step {standing.step:,} of {standing.total:,}" if standing.total else f"step {standing.step:,}"
    parts = [steps]
    if standing.step_time is not None and standing.writes:
        parts.append(f"{standing.step_time:.3g} s per step")
    if (left := standing.seconds_left) is not None:
        parts.append(f"{duration(left)} left")
    if standing.done:
        parts.append("all steps are done")
    elif standing.age is None:
        parts = ["no metrics yet"]
    elif standing.writes:
        parts.append(f"last update {duration(standing.age)} ago")
    else:
        parts.append(f"no update for {duration(standing.age)}: the run has ended or hangs")
    if "loss" in newest and newest["loss"] is None:
        parts.append("the last loss was NaN or infinite")
    state = "done" if standing.done else "running" if standing.writes else "idle"
    share = min(1.0, standing.step / standing.total) if standing.total else None
    return line(state, name, ", ".join(parts), share)


def warnings_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return HTML with the last warnings of a run."""
    if not rows:
        return '<h3>Warnings</h3><p class="about-facts">No warnings.</p>'
    items = []
    for row in rows:
        times = f" ({row['times']} times)" if row["times"] > 1 else ""
        items.append(f"<li><b>step {escape(str(row.get('step', '?')))}</b> {escape(str(row['text']))}{times}</li>")
    return f'<h3>Warnings</h3><ul class="warned">{"".join(items)}</ul>'


def checkpoints_of(found: Sequence[Checkpoint]) -> str:
    """Return HTML with the table of a run's checkpoints."""
    if not found:
        return '<h3>Checkpoints</h3><p class="about-facts">No checkpoints yet.</p>'
    rows = "".join(
        f"<tr><td>{one.step:,}</td><td>{one.bytes / 2**20:,.1f} MiB</td>"
        f"<td>{'complete' if one.sound else 'damaged, or still being written'}</td></tr>"
        for one in found
    )
    head = "<tr><th>Step</th><th>Size</th><th>State</th></tr>"
    return f'<h3>Checkpoints</h3><table class="plain">{head}{rows}</table>'
