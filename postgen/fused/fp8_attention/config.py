"""When and where self-attention runs in E4M3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from postgen.errors import UserError, cut_words, shown, why_no_pattern

USUAL = "key_mean+balance+rotation+value_mean"
"""The preparation where none is named: `str(postgen.kernels.attention_fp8.preparation.Preparation())`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8AttentionConfig:
    """Which steps and layers stay exact, and how the others are prepared.

    Layers are attention modules by their names in the transformer (`blocks.0.attn1`).
    """

    first_exact: int = 2
    """Steps at the beginning of a pipeline's call that stay exact."""
    last_exact: int = 1
    """Steps at its end that stay exact."""
    exact_layers: tuple[str, ...] = ()
    """Layers that stay exact: patterns that match their names in full. `FP8AttentionReport.config` fills them in."""
    preparation: str | Mapping[str, str] = USUAL
    """The exact changes before rounding (`postgen.kernels.attention_fp8.preparation`); or one for each pattern of
    layers, the usual one for layers that none matches."""
    min_tokens: int = 16384
    """Self-attention of fewer tokens stays exact: there FP8 gains nothing (measured on an H200: 4 % at 17,776 tokens,
    and twice the time at 4,992). Ignored with `simulate`; 0 in the settings of a report that has times."""
    simulate: bool = False
    """Compute what cuDNN would in plain torch, on any device: slow, and only for its numbers."""
    debug: bool = False
    """Look at every output, which waits for the GPU: one that is not finite is computed exactly and counted."""

    def __post_init__(self) -> None:
        for name in ("first_exact", "last_exact", "min_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise UserError(f"{name} must be a whole number of at least 0, got {shown(value)}")
        for name in ("simulate", "debug"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        layers: object = self.exact_layers
        if not isinstance(layers, tuple | list) or not all(isinstance(each, str) for each in layers):
            raise UserError(f"exact_layers must be patterns of layers, got {shown(self.exact_layers)}")
        given: object = self.preparation
        if not isinstance(given, str | Mapping):
            raise UserError(f"preparation must be a text, or one for each pattern of layers, got {shown(given)}")
        named = dict(given) if isinstance(given, Mapping) else {}
        for pattern in (*self.exact_layers, *named):
            if reason := why_no_pattern(pattern):
                raise UserError(f"{shown(pattern)} is no pattern of layers: {reason}")
        for text in (given,) if isinstance(given, str) else named.values():
            _check_preparation(text)
        # What is changed by its owner later on would not be checked.
        object.__setattr__(self, "exact_layers", tuple(self.exact_layers))
        object.__setattr__(self, "preparation", given if isinstance(given, str) else named)

    def of_layer(self, name: str) -> str | None:
        """Return the preparation of a layer; None: it stays exact."""
        if any(re.fullmatch(pattern, name) for pattern in self.exact_layers):
            return None
        if isinstance(self.preparation, str):
            return self.preparation
        return next((text for pattern, text in self.preparation.items() if re.fullmatch(pattern, name)), USUAL)

    def exact_step(self, step: int, steps: int) -> bool:
        """Whether a step of so many stays exact."""
        return step < self.first_exact or step >= steps - self.last_exact


def fp8_attention_setting(text: str | None) -> FP8AttentionConfig | bool:
    """Return the setting that a text of the command line or of a sidecar names; off and None are off.

    auto is the usual setting, simulate the same computed slowly on any device, and a .json file what calibration
    saved. What cannot run on this machine is said at once.

    Raises:
        UserError: another text, a file that is no report, or a machine that cannot run it.

    >>> fp8_attention_setting("simulate").simulate
    True
    """
    if text in (None, "off"):
        return False
    if text == "simulate":
        return FP8AttentionConfig(simulate=True)
    if text != "auto" and not str(text).endswith(".json"):
        raise UserError(
            f"fp8_attention must be auto, simulate, off or the file of a report (.json), got {shown(text)}"
        )
    from postgen.fused.fp8_attention.available import check_available
    from postgen.fused.fp8_attention.report import FP8AttentionReport

    config = FP8AttentionConfig() if text == "auto" else FP8AttentionReport.load(Path(str(text))).config()
    check_available()
    return config


def _check_preparation(text: object) -> None:
    from postgen.kernels.attention_fp8.preparation import Preparation

    if not isinstance(text, str):
        raise UserError(f"a preparation must be a text, as str() gives of one, got {shown(text)}")
    try:
        Preparation.parsed(text)
    except ValueError as error:
        raise UserError(cut_words(str(error))) from None
