"""What the page draws of training runs: known metrics in groups with names for people, all others by choice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postgen.grpo.curves import Points, thinned

PIECES = 150
"""Pieces of a line on the page, of which each has two points at most."""
_MOST_LINES = 12
"""Lines of one plot; as many as there are colours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Metrics that stand in one plot."""

    title: str
    about: str
    """What to look for, in one line."""
    metrics: tuple[tuple[str, str], ...]
    """Pattern of the whole name of a metric, and what its line is called; `{}` is what the pattern's brackets hold."""

    def label(self, metric: str) -> str | None:
        """Return what the line of a metric is called; None where it belongs elsewhere."""
        for pattern, label in self.metrics:
            if (match := re.fullmatch(pattern, metric)) is not None:
                return label.format(*match.groups())
        return None


GROUPS = (
    Group(
        title="Reward",
        about="What is trained on. It should rise, that of held-out prompts too.",
        metrics=(("reward", "training"), ("eval_reward", "held-out prompts")),
    ),
    Group(
        title="Each reward",
        about="If one rises while the others fall, the policy may be hacking it.",
        metrics=((r"rewards/(.+)/mean", "{}"), (r"eval_rewards/(.+)/mean", "{}, held out")),
    ),
    Group(
        title="Held-out judge",
        about="Measured and never trained on. If it falls while the reward rises, stop.",
        metrics=((r"eval_gold/(.+)/mean", "{}"),),
    ),
    Group(
        title="Spread of the reward",
        about="Standard deviation. Near 0 there is nothing to learn from.",
        metrics=(("reward_std", "all"), (r"rewards/(.+)/std", "{}")),
    ),
    Group(
        title="KL",
        about="How far the policy is from the model it began as, or from its last rollout.",
        metrics=(("kl", "to the start"), ("approx_kl", "to the rollout")),
    ),
    Group(
        title="Ratio",
        about="New to old probability. The mean should stay near 1.",
        metrics=((r"ratio/(mean|min|max)", "{}"),),
    ),
    Group(
        title="Motion",
        about="Change between frames of the evaluated clips. Near 0 they are frozen.",
        metrics=(("eval_motion", "held-out prompts"),),
    ),
    Group(
        title="Loss",
        about="Of the method. With rewards it need not fall.",
        metrics=(("loss", "loss"), ("eval_loss", "held out"), (r"(.+)_loss", "{}")),
    ),
    Group(title="Learning rate", about="As the schedule sets it.", metrics=(("learning_rate", "learning rate"),)),
    Group(
        title="Seconds a step",
        about="Evaluations and checkpoints left out.",
        metrics=(("step_time", "seconds"),),
    ),
)
"""In the order of the page. A metric belongs to the first group that knows it."""

_HUES = [
    *("#4f46e5", "#ea580c", "#16a34a", "#db2777", "#0891b2", "#ca8a04"),
    *("#7c3aed", "#64748b", "#dc2626", "#65a30d", "#0369a1", "#a16207"),
]
COLOURS = {str(number): hue for number, hue in enumerate(_HUES)}
"""Of lines, by their number; seen on light and on dark. A plot that is shown draws no line of a name that comes later,
so lines have numbers there, always the same ones, and their names stand above it."""
COLUMNS = ("step", "value", "line")
"""Of a plot's table."""


def others(metrics: Iterable[str]) -> list[str]:
    """Return the metrics that no group knows, in alphabetical order."""
    return sorted(metric for metric in set(metrics) if all(group.label(metric) is None for group in GROUPS))


def group_lines(group: Group, runs: Mapping[str, Mapping[str, Points]]) -> list[tuple[str, Points]]:
    """Return the lines of a group's plot.

    Args:
        group: one of `GROUPS`.
        runs: name of a run -> metric -> its points.

    Returns:
        What each line is called, and its points. With several runs a line is called after its run too.
    """
    lines = []
    for name, curves in runs.items():
        own = [(label, curves[metric]) for metric in curves if (label := _first_label(metric, group)) is not None]
        lines += [(_called(name, label, own, runs), points) for label, points in own if points]
    return lines[:_MOST_LINES]


def metric_lines(metric: str, runs: Mapping[str, Mapping[str, Points]]) -> list[tuple[str, Points]]:
    """Return the lines of one metric, a line for each run that has it."""
    own = {name: curves[metric] for name, curves in runs.items() if curves.get(metric)}
    return [(name if len(runs) > 1 else metric, points) for name, points in own.items()][:_MOST_LINES]


def table(lines: Sequence[tuple[str, Points]]) -> dict[str, Any]:
    """Return lines in the form in which `gr.LinePlot` sends them to the page, by their numbers, long ones thinned.

    Numbers without a line have a row without a value.
    """
    parts = [thinned(points, PIECES) for _, points in lines]
    first = min((points[0][0] for points in parts), default=0)
    rows: list[list[Any]] = [[x, y, str(number)] for number, points in enumerate(parts) for x, y in points]
    rows += [[first, None, number] for number in list(COLOURS)[len(parts) :]]
    return {
        "columns": list(COLUMNS),
        "data": rows,
        "datatypes": dict(zip(COLUMNS, ("quantitative", "quantitative", "nominal"), strict=True)),
        "mark": "line",
    }


def _first_label(metric: str, group: Group) -> str | None:
    for one in GROUPS:
        if (label := one.label(metric)) is not None:
            return label if one is group else None
    return None


def _called(run: str, label: str, own: Sequence[Any], runs: Mapping[str, Any]) -> str:
    if len(runs) == 1:
        return label
    return run if len(own) == 1 else f"{run}: {label}"
