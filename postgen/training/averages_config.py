"""Settings of averages of checkpoints: the merge at the end of a run, and the rescue from spikes of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from postgen.settings import Part

from .curves import ALPHA


@dataclass(kw_only=True)
class MergeConfig(Part):
    """The merge of the last checkpoints at the end of a run (PMA, arXiv:2505.12082).

    Raises:
        UserError: a value is outside its range, or a setting has no effect without another one.
    """

    part: ClassVar[str] = "merge"
    may_change: ClassVar[tuple[str, ...]] = (
        *("merge_last", "merge_kind", "merge_alpha", "merge_keep", "merge_metric", "merge_greater_is_better"),
    )

    merge_last: int = 0
    """At the end of the run merge the last `merge_last` checkpoints and export the result; 0: no merge. LoRA adapters
    are merged exactly: the sum of their changes, cut to their rank. At least this many checkpoints are kept, whatever
    `save_total_limit` says. A run that a signal stops does not merge."""

    merge_kind: Literal["sma", "wma", "ema", "linear", "cosine", "1-sqrt", "greedy"] = "sma"
    """Weights of the checkpoints: the mean, weights 1, 2, 3, ..., the exponential average, or the decay of the
    learning rate that they emulate. "greedy" begins with the best checkpoint, and adds each other one if the mean is
    not worse; it evaluates up to two averages for each checkpoint."""

    merge_alpha: float = ALPHA
    """Weight of each new checkpoint in the exponential average, above 0 and at most 1. Only with `merge_kind: ema`."""

    merge_keep: Literal["better", "always"] = "better"
    """Whether to export the merged weights only if `merge_metric` is better with them than with the weights that the
    run would export otherwise, or always."""

    merge_metric: str = ""
    """Metric of the run's evaluation that decides, such as eval_loss. Needed with `merge_keep: better` and with
    "greedy"; with `merge_keep: always` it is only reported. The run is then also evaluated before its first step, to
    find an unknown metric."""

    merge_greater_is_better: bool | None = None
    """Whether larger values of `merge_metric` are better. None: smaller values are, if its name ends in loss or
    error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.merge_last == 0 or 2 <= self.merge_last <= _MOST, "merge_last", f"0, or from 2 to {_MOST}")
        self.require(0 < self.merge_alpha <= 1, "merge_alpha", "above 0 and at most 1")
        for name in MergeConfig.may_change:
            self.require(self.merge_last > 0 or _is_default(self, name), name, "left out without merge_last")
        used = self.merge_kind == "ema" or _is_default(self, "merge_alpha")
        self.require(used, "merge_alpha", "left out without merge_kind: ema")
        needed = self.merge_last > 0 and (self.merge_keep == "better" or self.merge_kind == "greedy")
        reason = "greedy" if self.merge_kind == "greedy" else "merge_keep: better"
        self.require(
            bool(self.merge_metric) or not needed, "merge_metric", f"a metric of the evaluation ({reason} needs it)"
        )
        used = bool(self.merge_metric) or self.merge_greater_is_better is None
        self.require(used, "merge_greater_is_better", "left out without merge_metric")

    @property
    def metric_rises(self) -> bool:
        """Whether larger values of `merge_metric` are better."""
        if self.merge_greater_is_better is not None:
            return self.merge_greater_is_better
        return not self.merge_metric.endswith(("loss", "error"))


@dataclass(kw_only=True)
class RescueConfig(Part):
    """The rescue of a run from spikes of the loss: back to the mean of earlier checkpoints (PMA, arXiv:2505.12082).

    Raises:
        UserError: a value is outside its range, or a setting has no effect without another one.
    """

    part: ClassVar[str] = "rescue"

    rescue_spike: float = 0.0
    """A loss is a spike if it is above the median of the last `rescue_window` losses by this many standard deviations
    (estimated from the median of the absolute deviations), or not finite. After `rescue_patience` spikes in a row, or
    when the weights are not finite, the run loads the mean of the `rescue_last` checkpoints before them, resets the
    moments of the optimiser, and goes on with the next data. 0 disables this. Every step then waits for the device; 10
    is a usual value."""

    rescue_patience: int = 3
    """Number of spikes in a row; one loss that is not finite is enough. At least 1."""

    rescue_window: int = 50
    """Number of losses in the median, at least 5. Before that many steps only a loss that is not finite is a spike."""

    rescue_last: int = 3
    """Number of checkpoints in the mean, fewer if there are fewer. As many checkpoints as this needs are kept,
    whatever `save_total_limit` says."""

    rescue_limit: int = 3
    """Number of rescues in a run; the run then goes on without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rescue_spike >= 0, "rescue_spike", "at least 0")
        for name, least in (("patience", 1), ("window", 5), ("last", 1), ("limit", 1)):
            self.require(
                least <= getattr(self, f"rescue_{name}") <= _MOST, f"rescue_{name}", f"from {least} to {_MOST}"
            )
            used = self.rescue_spike > 0 or _is_default(self, f"rescue_{name}")
            self.require(used, f"rescue_{name}", "left out without rescue_spike")


_MOST = 10_000
"""Upper bound of all counts of this file, to catch mistyped values."""


def _is_default(config: Any, name: str) -> bool:
    return bool(getattr(config, name) == getattr(type(config), name))
