"""Make the true clip for drift measures from a scene of the synthetic world."""

from __future__ import annotations

from postgen.errors import UserError
from postgen.metrics.drift import TrueClip
from postgen.world import Frames, Spec, ground_shades, shades
from postgen.world.spec import COLOURS


def true_clip(spec: Spec, frames: Frames, row: int = 0) -> TrueClip:
    """Return the true clip of a scene for `measure_drift`.

    The palette holds the colours of the scene's bodies in their order, then the other colours of the world.

    Args:
        spec: the scene.
        frames: a render with geometry, of the scene or of several scenes.
        row: position of the scene in the render.

    Raises:
        UserError: frames without geometry, or two bodies of the same colour, which the measures cannot distinguish.
    """
    colours = [body.colour for body in spec.bodies]
    if len(set(colours)) < len(colours):
        raise UserError(f"drift measures need bodies of different colours: the scene has {', '.join(colours)}")
    if frames.ids_BFHW is None:
        raise UserError("the frames have no geometry: render them with geometry=True")
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
