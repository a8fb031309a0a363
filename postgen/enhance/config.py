"""Settings of Enhance-A-Video."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from postgen.errors import SettingError, UserError, is_number, shown, why_no_pattern
from postgen.families import Grid

FrameCount = int | Callable[[Mapping[str, Any]], int | Grid]
"""Number of latent frames, or a function from the forward arguments of the transformer to that number or a `Grid`."""

STRONGEST = 1000.0
"""Largest weight and gain. Videos degrade far below this value: the weights of the authors are below 10."""

_FROM_TO = f"from -{STRONGEST:g} to {STRONGEST:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EnhanceAVideoConfig:
    """Settings of Enhance-A-Video: how strongly, in which layers and at which steps the method acts.

    The gain of a layer is min(max(1, (T + w) (1 - d) / (T - 1)), max_gain) for T latent frames and weight w. d is the
    mean share of its attention that a frame gives to itself (arXiv:2502.07508, eq. 6-8).
    """

    weight: float | Mapping[str, float] | Literal["auto"] = "auto"
    """The weight w, from -1000 to 1000. `auto` is the recommended strength of the model, scaled to the clip length. A
    mapping assigns weights to layers: its keys are regular expressions that match full layer names; layers without a
    match are not changed."""
    relative_weight: float | None = None
    """w/T instead of w, for the same strength at every clip length. `weight` must then stay at `auto`."""
    start: float = 0.0
    """The method acts from this fraction of the denoising steps on, 0 to 1."""
    stop: float = 1.0
    """The method stops at this fraction of the denoising steps, above `start` and at most 1."""
    reduction: Literal["sample", "batch"] = "sample"
    """`sample`: one gain per sample. `batch`: one gain for the whole batch, as in the code of the authors."""
    max_gain: float | None = None
    """Upper bound of the gain, above 1 and at most 1000; None sets no bound."""
    min_frames: int = 2
    """Smallest number of latent frames for which the method acts; at least 2."""
    num_frames: FrameCount | None = None
    """Number of latent frames, for calls whose arguments do not contain it (packed tokens without `num_frames`)."""
    max_locations: int | None = None
    """d is measured on at most this many evenly spaced locations of a frame; None measures on all locations."""
    chunk_size: int | None = None
    """Number of locations measured at once; None takes as many as fit into 64 MiB."""
    progress: Callable[[], float] | None = None
    """Function that returns the denoising progress, from 0 to 1, for `start` and `stop`. None reads the progress from
    the scheduler of the pipeline."""
    train: bool = False
    """Whether the method also acts while the transformer is in training mode."""

    def __post_init__(self) -> None:
        self._check_weights()
        if not (is_number(self.start) and is_number(self.stop) and 0 <= self.start < self.stop <= 1):
            raise UserError(
                f"0 <= start < stop <= 1 is required, got start={shown(self.start)}, stop={shown(self.stop)}"
            )
        if self.reduction not in ("sample", "batch"):
            raise UserError(f"unknown reduction {shown(self.reduction)}. Known: sample, batch")
        if self.max_gain is not None and not (is_number(self.max_gain) and 1 < self.max_gain <= STRONGEST):
            raise UserError(
                f"max_gain must be above 1 and at most {STRONGEST:g}, or None, got max_gain={shown(self.max_gain)}"
            )
        for name, least in (("min_frames", 2), ("max_locations", 1), ("chunk_size", 1), ("num_frames", 1)):
            value = getattr(self, name)
            if value is None or (name == "num_frames" and callable(value)):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                raise UserError(f"{name} must be a whole number of at least {least}, below 2**31, got {shown(value)}")
        if self.progress is not None and not callable(self.progress):
            raise UserError(f"progress must be a function that returns 0 to 1, got {shown(self.progress)}")
        if not isinstance(self.train, bool):
            raise UserError(f"train must be True or False, got {shown(self.train)}")

    def _check_weights(self) -> None:
        if self.relative_weight is not None:
            if not _is_weight(self.relative_weight):
                raise UserError(
                    f"relative_weight must be a finite number {_FROM_TO}, got {shown(self.relative_weight)}"
                )
            if self.weight != "auto":
                raise UserError(
                    f"weight={shown(self.weight)} and relative_weight={self.relative_weight}: give only one of them"
                )
        weights = self.weight.values() if isinstance(self.weight, Mapping) else [self.weight]
        named = isinstance(self.weight, Mapping)
        if not all(_is_weight(weight) or (weight == "auto" and not named) for weight in weights):
            raise UserError(
                "weight must be a finite number, auto, or a mapping from layer patterns to numbers, each"
                f" {_FROM_TO}, got {shown(self.weight)}"
            )
        for key in self.weight if isinstance(self.weight, Mapping) else ():
            _check_pattern(key)
        if named and not weights:
            raise UserError("weight is an empty mapping: give at least one layer pattern, or a number for all layers")

    @property
    def whole_range(self) -> bool:
        """Whether the method acts at every denoising step, so that the progress is not needed."""
        return self.start == 0 and self.stop == 1

    def covers(self, progress: float) -> bool:
        """Return whether the method acts at a step with this progress, from 0 to 1."""
        return self.whole_range or self.start <= progress < self.stop


def enhance_setting(text: str | None) -> float | str:
    """Parse a setting from the command line or a sidecar file: auto or a weight; 0 and None switch the method off.

    Raises:
        UserError: the text is neither auto nor a valid weight.

    >>> enhance_setting("2.5")
    2.5
    """
    if text == "auto":
        return text
    try:
        weight = 0.0 if text is None else float(text)
    except ValueError:
        weight = math.nan
    if not _is_weight(weight):
        raise SettingError("enhance", f" must be auto or a number {_FROM_TO}, got {shown(text)}")
    return weight


def _check_pattern(key: object) -> None:
    if reason := why_no_pattern(key):
        raise UserError(f"the keys of weight must be layer patterns (regular expressions), got {shown(key)}: {reason}")


def _is_weight(value: object) -> bool:
    return is_number(value) and -STRONGEST <= cast(float, value) <= STRONGEST
