"""Object permanence in the synthetic world: every body stays visible or occluded in each frame, and never jumps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postgen.rewards.base import Clip, promptless, streaming
from postgen.rewards.world import alike, scenes, why_not
from postgen.video import Footage
from postgen.world import Spec
from postgen.world.check import find_tracks, find_tracks_long
from postgen.world.check.events import ramp
from postgen.world.check.tracks import JUMP, Track

_MOST = 0.65
"""A visible piece of at least this part of the body's full area shows most of the body."""


@streaming
@promptless
def permanence(
    prompts: Sequence[str],
    completions: Sequence[Clip],
    *,
    spec: Sequence[Spec | Mapping[str, Any] | None] | None = None,
    log_reasons: Any = None,
) -> list[float | None]:
    """Score clips by their worst body (`body_permanence`), times the share of the requested bodies that are present.

    A body counts as present if a body in front of it, or the edge of the picture, explains why it is not visible.

    Args:
        prompts: parsed with `world.parse` for the number of bodies if there is no spec.
        completions: clips (F,3,H,W) in [0,1] of the synthetic world, F >= 5, at least 32 px.
        spec: column of scenes, as `Spec` or in its JSON form.
        log_reasons: receives the reasons of missing scores.

    Returns:
        One score in [0,1] per clip, 0 without any body; None for a clip that is too short or too small.
    """
    wanted = scenes(prompts, spec)
    scores: list[float | None] = [None] * len(completions)
    for rows in alike(completions, [True] * len(completions)):
        for row, tracks in zip(rows, _tracks([completions[r] for r in rows]), strict=True):
            scene = wanted[row]
            count = 1 if scene is None else len(scene.bodies)
            worst = min((body_permanence(track) for track in tracks), default=0.0)
            scores[row] = worst * min(1.0, len(tracks) / count)
    if log_reasons is not None:
        log_reasons([why_not(clip, True) for clip in completions])
    return scores


def _tracks(clips: Sequence[Clip]) -> list[list[Track]]:
    first, held = clips[0], [clip for clip in clips if isinstance(clip, Tensor)]
    return [find_tracks_long(first.windows)] if isinstance(first, Footage) else find_tracks(torch.stack(held))


def body_permanence(track: Track) -> float:
    """Score one body in [0,1]: 1 if it is always present and never jumps, 0 if it is missing in 4 of 10 frames.

    Only frames that show most of the body count for jumps: visible slivers of an occluded body may jump.
    """
    there = [piece is not None or hidden for piece, hidden in zip(track.pieces, track.hidden, strict=True)]
    return min(ramp(sum(there) / len(there), 0.6, 1.0), ramp(_longest_leap(track), 1.5, 1.0))


def _longest_leap(track: Track) -> float:
    """Return the longest step per frame as a multiple of the allowed step, among frames that show most of the body."""
    seen = {f: piece for f in track.visible if (piece := track.pieces[f]) is not None}
    if not seen:
        return 0.0
    full = float(np.percentile([piece.area for piece in seen.values()], 85))
    clean = set(track.clean)
    points = [(f, p.x, p.y) for f, p in seen.items() if f in clean or p.area >= _MOST * full]
    steps = [math.hypot(b[1] - a[1], b[2] - a[2]) / (b[0] - a[0]) for a, b in pairwise(points)]
    return max(steps, default=0.0) / JUMP
