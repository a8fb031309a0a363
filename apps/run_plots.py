"""Plots of training runs: known metrics are in groups with readable labels, other metrics can be chosen by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postgen.training.run_curves import Points, thinned

PIECES = 150
"""Number of segments of a line on the page; each keeps at most two points."""
_MOST_LINES = 12
"""Most lines of one plot, equal to the number of colours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Metrics that share one plot."""

    title: str
    about: str
    """One line that helps to read the plot."""
    metrics: tuple[tuple[str, str], ...]
    """Pairs of a regular expression for the full name of a metric, and the label of its line. `{}` in the label is
    replaced by the match of the group in the expression."""

    def label(self, metric: str) -> str | None:
        """Return the label of a metric's line; None if the metric is not in this group."""
        for pattern, label in self.metrics:
            if (match := re.fullmatch(pattern, metric)) is not None:
                return label.format(*match.groups())
        return None


GROUPS = (
    Group(
        title="Reward",
        about="The training objective. It should rise, also for held-out prompts.",
        metrics=(("reward", "training"), ("eval_reward", "held-out prompts")),
    ),
    Group(
        title="Each reward",
        about="If one rises while the others fall, the policy may be hacking it.",
        metrics=((r"rewards/(.+)/mean", "{}"), (r"eval_rewards/(.+)/mean", "{}, held out")),
    ),
    Group(
        title="Held-out judge",
        about="A reward that is not used for training. If it falls while the reward rises, stop.",
        metrics=((r"eval_gold/(.+)/mean", "{}"),),
    ),
    Group(
        title="Spread of the reward",
        about="Standard deviation. Near 0 there is no training signal.",
        metrics=(("reward_std", "all"), (r"rewards/(.+)/std", "{}")),
    ),
    Group(
        title="KL",
        about="Distance of the policy from its initial weights, or from the policy of the last rollout.",
        metrics=(("kl", "to the start"), ("approx_kl", "to the rollout")),
    ),
    Group(
        title="Ratio",
        about="Probability under the new policy divided by the old one. The mean should stay near 1.",
        metrics=((r"ratio/(mean|min|max)", "{}"),),
    ),
    Group(
        title="Motion",
        about="Change between frames of the evaluation clips. Near 0 the clips are frozen.",
        metrics=(("eval_motion", "held-out prompts"),),
    ),
    Group(
        title="Loss",
        about="The loss of the training method. In reward training it need not fall.",
        metrics=(("loss", "loss"), ("eval_loss", "held out"), (r"(.+)_loss", "{}")),
    ),
    Group(title="Learning rate", about="Set by the schedule.", metrics=(("learning_rate", "learning rate"),)),
    Group(
        title="Seconds per step",
        about="Without evaluations and checkpoints.",
        metrics=(("step_time", "seconds"),),
    ),
)
"""All groups, in the order of the page. A metric belongs to the first group with a matching expression."""

_HUES = [
    *("#4f46e5", "#ea580c", "#16a34a", "#db2777", "#0891b2", "#ca8a04"),
    *("#7c3aed", "#64748b", "#dc2626", "#65a30d", "#0369a1", "#a16207"),
]
COLOURS = {str(number): hue for number, hue in enumerate(_HUES)}
"""Number of a line -> its colour, visible on light and dark backgrounds. A visible `gr.LinePlot` does not draw lines
whose names appear later. So the lines of a plot always have these numbers as names, and their labels are above it."""
COLUMNS = ("step", "value", "line")
"""Columns of a plot's table."""


def others(metrics: Iterable[str]) -> list[str]:
    """Return the metrics that belong to no group, in alphabetical order."""
    return sorted(metric for metric in set(metrics) if all(group.label(metric) is None for group in GROUPS))


def group_lines(group: Group, runs: Mapping[str, Mapping[str, Points]]) -> list[tuple[str, Points]]:
    """Return the lines of a group's plot.

    Args:
        group: one of `GROUPS`.
        runs: name of a run -> metric -> points.

    Returns:
        Label and points of each line. With several runs the label contains the name of the run.
    """
    lines = []
    for name, curves in runs.items():
        own = [(label, curves[metric]) for metric in curves if (label := _first_label(metric, group)) is not None]
        lines += [(_called(name, label, own, runs), points) for label, points in own if points]
    return lines[:_MOST_LINES]


def metric_lines(metric: str, runs: Mapping[str, Mapping[str, Points]]) -> list[tuple[str, Points]]:
    """Return label and points of one line for each run that has the metric."""
    own = {name: curves[metric] for name, curves in runs.items() if curves.get(metric)}
    return [(name if len(runs) > 1 else metric, points) for name, points in own.items()][:_MOST_LINES]


def table(lines: Sequence[tuple[str, Points]]) -> dict[str, Any]:
    """Return the lines in the format that `gr.LinePlot` sends to the page; long lines are thinned.

    Lines are named by their number. Every unused number has one row without a value, so that all names always exist.
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
