"""The truth about a scene of the synthetic world: its clip for drift measures, and the motion of its clip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from postgen.errors import UserError
from postgen.metrics.drift import TrueClip
from postgen.metrics.video_measures import LEAST_CHANGE, frame_change
from postgen.world import Frames, Spec, ground_shades, render, shades
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


_AT_ONCE = 16


def exact_motion(specs: Sequence[Spec], num_frames: int, size: int, device: torch.device | str = "cpu") -> list[float]:
    """Return the motion (`frame_change`) of the exact clip of each scene.

    A generated clip of the same scene moves too much or too little if its motion differs. Motion depends on length
    and size of a clip, so both must be those of the generated clips.

    Args:
        specs: scenes.
        num_frames: number of frames of the clips.
        size: height and width of the clips in pixels.
        device: device that renders.
    """
    found: list[float] = []
    for low in range(0, len(specs), _AT_ONCE):
        part = specs[low : low + _AT_ONCE]
        clips = render(part, num_frames=num_frames, size=size, geometry=False, device=device).rgb_BF3HW
        found += [frame_change(clip) for clip in clips]
    return found


def log_motion_ratio(motion: float, exact: float | None) -> float | None:
    """Return log(motion / exact motion) of a clip: 0 if it moves as much as the exact clip, above 0 if it moves more.

    Args:
        motion: `frame_change` of the clip.
        exact: `exact_motion` of its scene; the result is None if it is None, or if nothing moves in the exact clip.
    """
    if exact is None or exact <= LEAST_CHANGE:
        return None
    return math.log(max(motion, LEAST_CHANGE) / exact)
