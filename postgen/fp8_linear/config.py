"""Which linear layers compute in FP8."""

from __future__ import annotations

from dataclasses import dataclass

from postgen.errors import UserError, shown, why_no_pattern

PARTS = ("attention", "cross_attention", "feed_forward", "feed_forward_out")
"""What `--fp8-linears` can name; `FP8LinearConfig` says what they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8LinearConfig:
    """Which linear layers of the repeated blocks compute in FP8.

    Never taken: embeddings, modulation, the output layer, and what serves the few tokens of a text: keys and values of
    cross-attention, projections and feed-forward layers of a text stream of its own.
    """

    attention: bool = True
    """Queries, keys, values and output of self-attention."""
    cross_attention: bool = True
    """Queries and output of attention to a text."""
    feed_forward: bool = True
    """The first layer of feed-forward layers."""
    feed_forward_out: bool = True
    """The layer after the activation, whose input has the longest tails."""
    exact_first: int = 0
    """So many blocks at the beginning are left as they are."""
    exact_last: int = 0
    """So many blocks at the end are left as they are."""
    exact: str | None = None
    """Layers whose name this pattern matches in full are left as they are."""
    min_features: int = 2048
    """Layers of fewer input or output channels stay exact in a model that computes on a GPU: FP8 gains nothing there
    (with the 1,536 channels of Wan 1.3B it took as long or up to twice as long on an H200). Ignored with `emulate`."""
    emulate: bool = False
    """Compute the same rounding where there is no FP8 matrix product, without a word about it: slower than without."""

    def __post_init__(self) -> None:
        for name in (*PARTS, "emulate"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        for name in ("exact_first", "exact_last", "min_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise UserError(f"{name} must be a whole number of at least 0, below 2**31, got {shown(value)}")
        if not any(getattr(self, name) for name in PARTS):
            raise UserError(f"no layer is left for FP8: set some of {', '.join(PARTS)}")
        if self.exact is not None and (reason := why_no_pattern(self.exact)):
            raise UserError(f"exact must be a pattern of layer names, got {shown(self.exact)}: {reason}")


def fp8_linears_setting(text: str | None) -> FP8LinearConfig | bool:
    """Return the setting that a text of the command line or of a sidecar names: auto is all, off and None nothing.

    Raises:
        UserError: an unknown name.

    >>> fp8_linears_setting("attention,feed_forward").cross_attention
    False
    """
    if text in (None, "off"):
        return False
    if text == "auto":
        return FP8LinearConfig()
    names = {name.strip() for name in (text or "").split(",")}
    if not names <= set(PARTS):
        raise UserError(
            f"fp8_linears must be auto, off or some of {', '.join(PARTS)} with commas between, got {shown(text)}"
        )
    return FP8LinearConfig(**{part: part in names for part in PARTS})  # type: ignore[arg-type]
