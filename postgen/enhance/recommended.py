"""Which weight to start from, per transformer class.

The gain of a layer whose frames attend to one another evenly is 1 + w/T for weight w and T latent frames, so w/T is
the strength, and a weight means little without the clip length it was chosen for. `auto` keeps the strength of the
table at every length. None of these were tuned by us on the models they are for: each row names where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """A weight, the clip length it was chosen for, and who chose it."""

    weight: float
    """The weight at that length."""
    frames: int
    """Latent frames after patching."""
    source: str
    """Where it is from."""

    @property
    def relative_weight(self) -> float:
        """Strength w/T, the same at every length."""
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
"""By transformer class; a class that is not here gets `OTHERS`."""

OTHERS = Recommendation(weight=2.0, frames=20, source="no source: weaker than every official value")
"""For every other transformer class."""


def recommended_weight(transformer: str) -> Recommendation:
    """Return what `auto` stands for on a transformer class.

    >>> recommended_weight("WanTransformer3DModel").relative_weight
    0.09523809523809523
    """
    return RECOMMENDED.get(transformer, OTHERS)
