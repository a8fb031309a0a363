"""The settings of FP8 attention: in which steps and layers self-attention runs in E4M3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from postgen.errors import SettingError, UserError, cut_words, shown, why_no_pattern

USUAL = "key_mean+balance+rotation+value_mean"
"""The default preparation: `str(postgen.kernels.attention_fp8.preparation.Preparation())`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8AttentionConfig:
    """Which steps and layers stay exact, and how queries, keys and values of the other layers are prepared.

    A layer is an attention module, named by its path in the transformer (`blocks.0.attn1`).
    """

    first_exact_steps: int = 2
    """The number of denoising steps at the beginning of the schedule that stay exact. A video-to-video call with
    `strength` begins later in the schedule, so that fewer or none of them are left."""
    last_exact_steps: int = 1
    """The number of denoising steps at the end of the schedule that stay exact."""
    exact_layers: tuple[str, ...] = ()
    """Layers that stay exact: regular expressions that match full layer names. `FP8AttentionReport.config` sets
    them."""
    preparation: str | Mapping[str, str] = USUAL
    """The exact transformations before the rounding (`postgen.kernels.attention_fp8.preparation`): one text for all
    layers, or a mapping from regular expressions of layer names to texts. Layers without a match use the default."""
    min_tokens: int | None = None
    """Self-attention over fewer tokens stays exact, because FP8 gains nothing there. None: 16,384, or 32,000 where
    FlashAttention-4 is installed (on an H200 FP8 is 8 % faster than torch at 17,776 tokens, and takes 1.28 times as
    long as FlashAttention-4). Ignored with `simulate`. A report with times sets 0, as its times decide instead."""
    simulate: bool = False
    """Compute the numbers of cuDNN in plain torch, on any device. This is slow and only shows the effect."""
    debug: bool = False
    """Check every output, which waits for the GPU. An output with NaN or infinity is computed again exactly and
    counted in `stats()`."""

    def __post_init__(self) -> None:
        for name in ("first_exact_steps", "last_exact_steps", "min_tokens"):
            value = getattr(self, name)
            if name == "min_tokens" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise UserError(f"{name} must be a whole number of at least 0, got {shown(value)}")
        for name in ("simulate", "debug"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        layers: object = self.exact_layers
        if not isinstance(layers, tuple | list) or not all(isinstance(each, str) for each in layers):
            raise UserError(
                f"exact_layers must be a tuple or list of regular expressions for layer names,"
                f" got {shown(self.exact_layers)}"
            )
        given: object = self.preparation
        if not isinstance(given, str | Mapping):
            raise UserError(
                f"preparation must be a text, or a mapping from regular expressions for layer names to texts,"
                f" got {shown(given)}"
            )
        named = dict(given) if isinstance(given, Mapping) else {}
        for pattern in (*self.exact_layers, *named):
            if reason := why_no_pattern(pattern):
                raise UserError(f"{shown(pattern)} is not a regular expression for layer names: {reason}")
        for text in (given,) if isinstance(given, str) else named.values():
            _check_preparation(text)
        # Keep copies: the caller could change a list or dict later, and the change would not be checked.
        object.__setattr__(self, "exact_layers", tuple(self.exact_layers))
        object.__setattr__(self, "preparation", given if isinstance(given, str) else named)

    def of_layer(self, name: str) -> str | None:
        """Return the preparation of a layer, or None if the layer stays exact."""
        if any(re.fullmatch(pattern, name) for pattern in self.exact_layers):
            return None
        if isinstance(self.preparation, str):
            return self.preparation
        return next((text for pattern, text in self.preparation.items() if re.fullmatch(pattern, name)), USUAL)

    @property
    def fewest_tokens(self) -> int:
        """Number of tokens from which on self-attention runs in FP8: `min_tokens`, or its default on this machine."""
        if self.min_tokens is not None:
            return self.min_tokens
        from postgen.kernels.attention.backends import FLASH_4

        return 32_000 if FLASH_4.installed() else 16_384

    def exact_step(self, step: int, steps: int) -> bool:
        """Return whether the step with index `step` of `steps` steps stays exact."""
        return step < self.first_exact_steps or step >= steps - self.last_exact_steps


def fp8_attention_setting(text: str | None) -> FP8AttentionConfig | bool:
    """Parse the value of `--fp8-attention` or of a sidecar entry.

    The function also checks that this machine can compute FP8 attention, so that the error comes before a model is
    loaded.

    Args:
        text: "auto" for the default config, "simulate" for the same numbers computed slowly on any device, the path
            of a .json report of calibration for its settings, "off" or None for no FP8 attention.

    Raises:
        UserError: the text is none of these, the file is not a report, or this machine cannot compute FP8 attention.

    >>> fp8_attention_setting("simulate").simulate
    True
    """
    if text in (None, "off"):
        return False
    if text == "simulate":
        return FP8AttentionConfig(simulate=True)
    if text != "auto" and not str(text).endswith(".json"):
        raise SettingError(
            "fp8_attention", f" must be auto, simulate, off or the path of a report (.json), got {shown(text)}"
        )
    from postgen.fused.fp8_attention.available import check_available
    from postgen.fused.fp8_attention.report import FP8AttentionReport

    config = FP8AttentionConfig() if text == "auto" else FP8AttentionReport.load(Path(str(text))).config()
    check_available()
    return config


def _check_preparation(text: object) -> None:
    from postgen.kernels.attention_fp8.preparation import Preparation

    if not isinstance(text, str):
        raise UserError(f"a preparation must be a text such as {USUAL}, got {shown(text)}")
    try:
        Preparation.parsed(text)
    except ValueError as error:
        raise UserError(cut_words(str(error))) from None
