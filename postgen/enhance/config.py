"""Settings of Enhance-A-Video."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from postgen.errors import UserError, is_number, shown, why_no_pattern
from postgen.families import Grid

FrameCount = int | Callable[[Mapping[str, Any]], int | Grid]
"""Latent frames of a call, or a function of the transformer's forward arguments giving them or the whole grid."""

STRONGEST = 1000.0
"""Largest weight and gain, far beyond those that leave a picture: the official ones are below 10."""

_FROM_TO = f"from -{STRONGEST:g} to {STRONGEST:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EnhanceAVideoConfig:
    """How strongly, where and when attention between frames is amplified.

    A layer's gain is min(max(1, (T + w) (1 - d) / (T - 1)), max_gain) with T latent frames, weight w and d the mean
    share of itself in a frame's attention over the frames (arXiv:2502.07508, eq. 6-8).
    """

    weight: float | Mapping[str, float] | Literal["auto"] = "auto"
    """w. `auto`: the recommended strength of the model, scaled to the clip's length. A mapping gives weights by layer:
    keys are patterns that layer names match in full, a layer that none matches is left alone."""
    relative_weight: float | None = None
    """w/T instead of w: the same strength at every clip length. Leave `weight` out then."""
    start: float = 0.0
    """Fraction of the denoising steps before which nothing happens."""
    stop: float = 1.0
    """Fraction of the denoising steps from which on nothing happens."""
    reduction: Literal["sample", "batch"] = "sample"
    """One gain per sample, or one for the whole batch, as the official code has it."""
    max_gain: float | None = None
    """Upper bound of the gain, above 1; None has none."""
    min_frames: int = 2
    """Calls with fewer latent frames are left alone; at least 2."""
    num_frames: FrameCount | None = None
    """Latent frames, only where the call does not tell them (packed tokens without `num_frames`)."""
    max_locations: int | None = None
    """Measure on so many locations of the picture, evenly spread, instead of all."""
    chunk_size: int | None = None
    """Locations measured at a time; None takes as many as fit 64 MiB."""
    progress: Callable[[], float] | None = None
    """Where the denoising is, from 0 to 1; None reads it off the pipeline's scheduler. Only for start and stop."""
    train: bool = False
    """Whether to act also while the transformer is in training mode."""

    def __post_init__(self) -> None:
        self._check_weights()
        if not (is_number(self.start) and is_number(self.stop) and 0 <= self.start < self.stop <= 1):
            raise UserError(
                f"0 <= start < stop <= 1 is needed, got start={shown(self.start)}, stop={shown(self.stop)}"
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
                    f"weight={shown(self.weight)} and relative_weight={self.relative_weight}: give one of them"
                )
        weights = self.weight.values() if isinstance(self.weight, Mapping) else [self.weight]
        named = isinstance(self.weight, Mapping)
        if not all(_is_weight(weight) or (weight == "auto" and not named) for weight in weights):
            raise UserError(
                "weight must be a finite number, auto, or numbers by layer pattern, each"
                f" {_FROM_TO}, got {shown(self.weight)}"
            )
        for key in self.weight if isinstance(self.weight, Mapping) else ():
            _check_pattern(key)
        if named and not weights:
            raise UserError("weight names no layer: give a pattern, or a number for all layers")

    @property
    def whole_range(self) -> bool:
        """Whether every denoising step is meant, so that nobody needs to know the step."""
        return self.start == 0 and self.stop == 1

    def covers(self, progress: float) -> bool:
        """Whether a step at this fraction of the denoising is meant."""
        return self.whole_range or self.start <= progress < self.stop


def enhance_setting(text: str | None) -> float | str:
    """Return the setting that a text of the command line or of a sidecar names: auto or a weight; 0 and None are off.

    Raises:
        UserError: neither.

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
        raise UserError(f"enhance must be auto or a number {_FROM_TO}, got {shown(text)}")
    return weight


def _check_pattern(key: object) -> None:
    if reason := why_no_pattern(key):
        raise UserError(f"weight names layers by patterns, and {shown(key)} is none: {reason}")


def _is_weight(value: object) -> bool:
    return is_number(value) and -STRONGEST <= cast(float, value) <= STRONGEST
