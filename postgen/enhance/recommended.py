"""Recommended weights per transformer class.

If each frame attends evenly to all T latent frames, the gain of a layer with weight w is 1 + w/T. The strength is
therefore w/T, and a weight has a meaning only with the clip length for which it was chosen. `auto` keeps the
strength of the table at every clip length. Each row names its source; postgen has not tuned these weights on the
models of the table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """A recommended weight, the clip length for which it was chosen, and its source."""

    weight: float
    """Weight w at this clip length."""
    frames: int
    """Clip length in latent frames, after patching."""
    source: str
    """Source of the weight."""

    @property
    def relative_weight(self) -> float:
        """Strength w/T, which `auto` uses at every clip length."""
        return self.weight / self.frames


_OFFICIAL = "scripts of the method's authors"
_COMMUNITY = "default of the ComfyUI nodes for this model"
_FORK = "fork of the authors' code for this model"

RECOMMENDED = {
    "CogVideoXTransformer3DModel": Recommendation(weight=3.4, frames=13, source=_OFFICIAL),
    "EasyAnimateTransformer3DModel": Recommendation(weight=1.0, frames=13, source=_FORK),
    "HunyuanVideoTransformer3DModel": Recommendation(weight=4.0, frames=33, source=_OFFICIAL),
    "LTXVideoTransformer3DModel": Recommendation(weight=4.0, frames=21, source=_COMMUNITY),
    "WanTransformer3DModel": Recommendation(weight=2.0, frames=21, source=_COMMUNITY),
}
"""Recommendations by transformer class; other classes use `OTHERS`."""

OTHERS = Recommendation(weight=2.0, frames=20, source="no source: weaker than every official value")
"""Recommendation for every other transformer class."""


def recommended_weight(transformer: str) -> Recommendation:
    """Return the recommendation that `auto` uses for a transformer class.

    >>> recommended_weight("WanTransformer3DModel").relative_weight
    0.09523809523809523
    """
    return RECOMMENDED.get(transformer, OTHERS)
