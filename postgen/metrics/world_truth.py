"""The true clip of a scene of the synthetic world: the only place where measures of drift meet it."""

from __future__ import annotations

from postgen.errors import UserError
from postgen.metrics.drift import TrueClip
from postgen.world import Frames, Spec, ground_shades, shades
from postgen.world.spec import COLOURS


def true_clip(spec: Spec, frames: Frames, row: int = 0) -> TrueClip:
    """Return what `measure_drift` compares a generated clip of a scene with.

    The palette holds the scene's colours in the order of its bodies, then the others that the world has.

    Args:
        spec: the scene.
        frames: its render with geometry, or several that were rendered together.
        row: which of them.

    Raises:
        UserError: frames without geometry, or two bodies of one colour: measures could not tell them apart.
    """
    colours = [body.colour for body in spec.bodies]
    if len(set(colours)) < len(colours):
        raise UserError(f"bodies of a scene whose drift is measured need different colours, got {', '.join(colours)}")
    if frames.ids_BFHW is None:
        raise UserError("These frames hold no geometry: render them with geometry=True.")
    colours += [name for name in COLOURS if name not in colours]
    return TrueClip(
        frames=frames.rgb_BF3HW[row],
        ids=frames.ids_BFHW[row],
        palette=shades(colours),
        others=ground_shades(spec.background),
        poses=frames.pose_BF34[row],
        disparity=frames.disparity_BFHW[row],
        texels=frames.texels_BF2HW[row],
    )
