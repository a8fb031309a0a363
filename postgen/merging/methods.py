"""Methods of merging, as factors of the merged tensors: averages, interpolation, task vectors, slerp.

The averages are those of Model Merging in Pre-training (arXiv:2505.12082). All methods but `slerp` are affine: one
factor for each source and one for the base, with sum 1. `slerp` has its own factors for each tensor, because they
depend on the angle between the two sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from postgen.errors import SettingError, UserError, check_number, did_you_mean, is_number, shown
from postgen.training.curves import ALPHA, KINDS, check_alpha, normalised, weights_of, weights_of_curve

from .posthoc_ema import gamma_of, power_weights

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of the dtypes in which a merge can be written, and their names in safetensors files."""

_AVERAGES = (*KINDS, "curve", "power", "posthoc_ema", "soup")
METHODS: dict[str, frozenset[str]] = {
    **dict.fromkeys(_AVERAGES, frozenset({"eta"})),
    "ema": frozenset({"eta", "alpha"}),
    "curve": frozenset({"eta", "curve"}),
    "power": frozenset({"eta", "sigma_rel"}),
    "posthoc_ema": frozenset({"eta", "sigma_rel"}),
    "soup": frozenset({"eta", "weights"}),
    "add": frozenset({"weights"}),
    "negate": frozenset({"weights"}),
    "slerp": frozenset({"t"}),
    "ties": frozenset({"weights", "density"}),
    "dare_linear": frozenset({"weights", "density", "seed"}),
    "dare_ties": frozenset({"weights", "density", "seed"}),
    "magnitude_prune": frozenset({"weights", "density"}),
}
"""Methods, and the settings that each of them uses besides `dtype` and `rank`."""

ORDERED = ("wma", "ema", "cosine", "1-sqrt", "curve", "power")
"""Methods for checkpoints of one run, whose steps must increase."""

LORA_ONLY = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods of peft, for LoRA files only. All other methods but `WHOLE_ONLY` merge LoRA files exactly."""

WHOLE_ONLY = ("slerp", "posthoc_ema")
"""Methods for full weights only."""

_NEEDED = {"curve": "curve", "power": "sigma_rel", "posthoc_ema": "sigma_rel"}
_SMALL = 1e-6
"""Angle in radians below which slerp is the linear interpolation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Settings of a merge. A setting that the method does not use must be None.

    Raises:
        UserError: the method is unknown, a setting is missing, does not belong to the method or is outside its range.
    """

    method: str = "sma"
    """A key of `METHODS`."""

    weights: tuple[float, ...] | None = None
    """For `soup` and the methods of peft: relative weights of the sources, by default equal. For `add` and `negate`:
    scale of each task vector, by default 1."""

    curve: tuple[float, ...] | None = None
    """For `curve`: multiplier of the learning rate for each increment between two sources, from 1 to 0."""

    alpha: float | None = None
    """For `ema`: weight of each new checkpoint, by default 0.2."""

    sigma_rel: float | None = None
    """For `power` and `posthoc_ema`: relative width of the profile, above 0 and at most 0.2887."""

    t: float | None = None
    """For `slerp`: position between the first source (0) and the second (1), by default 0.5."""

    eta: float | None = None
    """For averages: the merge is base + eta * (average - base), by default 1. Above 1 it extrapolates."""

    dtype: str | None = None
    """A key of `DTYPES`; None keeps the dtype of the sources, which must then be equal. Not for LoRA files."""

    rank: int | None = None
    """Rank of the merged LoRA; None keeps all of the merge. Only for LoRA files."""

    density: float | None = None
    """For the methods of peft on LoRA files: share of the values that they keep, above 0 and at most 1, by default
    0.5."""

    seed: int | None = None
    """For `dare_linear` and `dare_ties`: seed of the random choice, by default 0."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.method not in METHODS:
            near = did_you_mean(self.method, METHODS) if isinstance(self.method, str) else ""
            raise SettingError("method", f" must be one of {', '.join(METHODS)}, got {shown(self.method)}.{near}")
        used = METHODS[self.method] | {"method", "dtype", "rank"}
        for field in fields(self):
            if getattr(self, field.name) is not None and field.name not in used:
                users = [name for name, uses in METHODS.items() if field.name in uses]
                raise SettingError(field.name, f" is not used by method {self.method}, only by {', '.join(users)}")
        if (name := _NEEDED.get(self.method)) and getattr(self, name) is None:
            raise SettingError(name, f" is missing: method {self.method} needs it")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise SettingError("dtype", f" must be one of {', '.join(DTYPES)}, got {shown(self.dtype)}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name, least, most in (("t", 0, 1), ("eta", -10, 10)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), least, most)
        if self.rank is not None:
            check_number("rank", self.rank, 1, 10**6, whole=True)
        if self.seed is not None:
            check_number("seed", self.seed, 0, 2**63 - 1, whole=True)
        if self.density is not None and (not is_number(self.density) or not 0 < self.density <= 1):
            raise SettingError("density", f" must be above 0 and at most 1, got {shown(self.density)}")
        if self.alpha is not None:
            check_alpha(self.alpha)
        if self.sigma_rel is not None:
            gamma_of(self.sigma_rel)
        for value in (*(self.weights or ()), *(self.curve or ())):
            if not is_number(value) or abs(value) > 10**6:
                name = "weights" if self.weights else "curve"
                raise SettingError(name, f" must be numbers of at most 1,000,000, got {shown(value)}")

    @property
    def needs_base(self) -> bool:
        """Whether the method is about differences from a base."""
        return self.method in ("add", "negate") or self.eta not in (None, 1)

    @property
    def takes_base(self) -> bool:
        """Whether the method can use a base."""
        return self.method in ("add", "negate", "slerp") or self.eta is not None


def source_factors(config: MergeConfig, count: int, steps: Sequence[int | None] = ()) -> list[float]:
    """Return the factor of each source for an affine method: of its difference from the base, if there is a base.

    Args:
        config: the settings; the method is neither `slerp` nor `posthoc_ema`.
        count: number of sources.
        steps: for `power`, the step of each source.

    Raises:
        UserError: the number of sources does not fit the settings.
    """
    method, eta = config.method, 1.0 if config.eta is None else config.eta
    if method in ("add", "negate"):
        scales = config.weights or (1.0,) * count
        if len(scales) != count:
            raise SettingError("weights", f" must be {count} numbers, one for each source; got {len(scales)}")
        return [-scale if method == "negate" else scale for scale in map(float, scales)]
    if method == "soup" or method in LORA_ONLY:
        weights = normalised(config.weights or (1.0,) * count, count)
    elif method == "curve":
        weights = weights_of_curve(config.curve or ())
        if len(weights) != count:
            raise SettingError(
                "curve",
                f" must have {count - 1} numbers for {count} sources, one for each increment; got {len(weights) - 1}",
            )
    elif method == "power":
        known = [step for step in steps if step is not None]
        if len(known) != count:
            raise UserError("method power needs checkpoints of a run (checkpoint-N), because it uses their steps")
        weights = power_weights(known, gamma_of(config.sigma_rel or 0.1))
    else:
        weights = weights_of(method, count, alpha=ALPHA if config.alpha is None else config.alpha)
    return [eta * weight for weight in weights]


def slerp_factors(t: float, first: float, second: float, dot: float) -> tuple[float, float]:
    """Return the factors of two vectors in their spherical interpolation.

    Args:
        t: position, from 0 (first vector) to 1 (second vector).
        first: length of the first vector.
        second: length of the second vector.
        dot: inner product of the vectors.

    Returns:
        sin((1 - t) angle) / sin(angle) and sin(t angle) / sin(angle); 1 - t and t if the vectors are parallel,
        opposite or 0.

    >>> slerp_factors(0.5, 1.0, 1.0, 1.0)
    (0.5, 0.5)
    """
    if not first or not second:
        return 1 - t, t
    angle = math.acos(max(-1.0, min(1.0, dot / (first * second))))
    if angle < _SMALL or math.pi - angle < _SMALL:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
