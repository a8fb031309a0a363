"""Captions for long rollouts, and the frames from which they apply.

The camera and the bodies of a scene change direction without any sign in the given frames. With only the caption of
the first frame, a model cannot know when this happens, and a comparison with the true frames would measure luck.
Therefore captions describe the scene from a frame on (`along`), as for half of the training windows. With `start` the
caption of the first frame applies to the whole video.
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
    """Return (latent frame, a caption for each scene) in rising order, for `Rollout.start`.

    In training the caption of a window describes the scene from the window's oldest group on. In a rollout a prompt
    takes effect at the shift in which its group joins as the newest. Entries are therefore delayed by the groups in
    flight.

    Args:
        kind: one of `KINDS`.
        specs: the scenes.
        frames: frames of the scene that the rollout covers.
        latents: number of latent frames of the rollout.
        given: number of given latent frames.
        size: latent frames of a group.
        groups: groups in flight.
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
    """Encode the prompts of a schedule."""
    found: list[tuple[int, Any]] = [(start, denoiser.encode_prompt(texts, guidance=guided)) for start, texts in told]
    return found
