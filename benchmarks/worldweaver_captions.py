"""What the models of long rollouts are told, and when.

A scene's camera and bodies turn where nothing that was given shows it. Told the caption of the first frame alone, a
model cannot know when, and every comparison with the true frames would measure its luck. So captions say what a scene
does from a frame on (`along`), as half of the windows of training do; `start` says that of the first frame throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from postgen import world
from postgen.families import Condition, Denoiser
from postgen.worldweaver.world_clips import latent_ends

KINDS = ("along", "start")


def schedule(
    kind: str,
    specs: Sequence[world.Spec],
    frames: range,
    latents: int,
    *,
    given: int,
    size: int,
    groups: int,
) -> list[tuple[int, list[str]]]:
    """Return (latent frame, a caption of each scene) in rising order, for `Rollout.start`.

    In training a window is told what is true from its oldest group on. A rollout tells a prompt from the shift on
    whose newest group begins there, so entries come as many groups later.

    Args:
        kind: one of `KINDS`.
        specs: the scenes.
        frames: of the scene, those that the rollout is about.
        latents: how many latent frames they are.
        given: latent frames that are known.
        size: latent frames of a group.
        groups: in flight.
    """
    if kind == "start":
        return [(0, [world.caption_at(spec, 0) for spec in specs])]
    firsts = [0, *(end + 1 for end in latent_ends(len(frames), latents)[:-1])]
    told: list[tuple[int, list[str]]] = []
    for start in range(given, latents, size):
        captions = [world.caption_at(spec, frames[firsts[start]]) for spec in specs]
        if not told or captions != told[-1][1]:
            told.append((start + (groups - 1) * size if told else 0, captions))
    return told


def encoded(denoiser: Denoiser, told: Sequence[tuple[int, list[str]]], *, guided: bool) -> list[tuple[int, Condition]]:
    """Encode a schedule."""
    found: list[tuple[int, Any]] = [(start, denoiser.encode_prompt(texts, guidance=guided)) for start, texts in told]
    return found
