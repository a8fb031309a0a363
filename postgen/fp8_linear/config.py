"""The settings of FP8 linear layers: which layers compute in FP8."""

from __future__ import annotations

from dataclasses import dataclass

from postgen.errors import SettingError, UserError, shown, why_no_pattern

PARTS = ("attention", "cross_attention", "feed_forward", "feed_forward_out")
"""The parts that `--fp8-linears` can name; `FP8LinearConfig` describes each part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8LinearConfig:
    """Which linear layers of the repeated blocks compute in FP8.

    These layers always stay exact: embeddings, modulation, the output layer, and all layers that process only the few
    text tokens (keys and values of cross-attention, projections and feed-forward layers of a separate text stream).
    """

    attention: bool = True
    """The projections of queries, keys, values and output in self-attention."""
    cross_attention: bool = True
    """The projections of queries and output in cross-attention to text."""
    feed_forward: bool = True
    """The first linear layer of each feed-forward network."""
    feed_forward_out: bool = True
    """The linear layer after the activation. Its inputs have the longest tails, so rounding costs most here."""
    first_exact_blocks: int = 0
    """The number of blocks at the beginning that stay exact."""
    last_exact_blocks: int = 0
    """The number of blocks at the end that stay exact."""
    exact: str | None = None
    """A regular expression. A layer stays exact if the expression matches its full name. It must match a layer."""
    min_features: int = 2048
    """On a GPU, layers with fewer input or output channels stay exact, because FP8 gains nothing for them (on an H200
    the 1,536 channels of Wan 1.3B took as long as bfloat16, or up to twice as long). Ignored with `simulate`."""
    simulate: bool = False
    """Use every selected layer on every device, without a warning. A GPU with FP8 computes in FP8, also where that is
    slower; elsewhere plain torch computes the same rounding, slower than the exact layers."""

    def __post_init__(self) -> None:
        for name in (*PARTS, "simulate"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        for name in ("first_exact_blocks", "last_exact_blocks", "min_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise UserError(f"{name} must be a whole number of at least 0, below 2**31, got {shown(value)}")
        if not any(getattr(self, name) for name in PARTS):
            raise UserError(f"no layer is left for FP8: set at least one of {', '.join(PARTS)} to True")
        if self.exact is not None and (reason := why_no_pattern(self.exact)):
            raise UserError(f"exact must be a regular expression for layer names, got {shown(self.exact)}: {reason}")


def fp8_linears_setting(text: str | None) -> FP8LinearConfig | bool:
    """Parse the value of `--fp8-linears` or of a sidecar entry.

    Args:
        text: "auto" for the default config, "off" or None for no FP8, or names of `PARTS` separated by commas.

    Raises:
        UserError: the text holds an unknown name.

    >>> fp8_linears_setting("attention,feed_forward").cross_attention
    False
    """
    if text in (None, "off"):
        return False
    if text == "auto":
        return FP8LinearConfig()
    names = {name.strip() for name in (text or "").split(",")}
    if not names <= set(PARTS):
        raise SettingError(
            "fp8_linears", f" must be auto, off or some of {', '.join(PARTS)} separated by commas, got {shown(text)}"
        )
    return FP8LinearConfig(**{part: part in names for part in PARTS})  # type: ignore[arg-type]
