"""The exact reward of the synthetic world: how well a clip shows what its prompt or its spec describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from postgen.rewards.base import Clip, prompted_by, streaming, unfit
from postgen.video import Footage
from postgen.world import Spec
from postgen.world.check import Report, check_batch, check_long
from postgen.world.parse import parse, read
from postgen.world.reading import Reading
from postgen.world.spec import SHAPES

_LEAST_FRAMES, _LEAST_SIDE = 5, 32
NO_BODY = f"the prompt names no scene of the world: write up to 3 bodies, each a colour and one of {', '.join(SHAPES)}"
"""Reason of a missing score if the prompt names no body of the world."""


@streaming
@prompted_by("spec")
def world(
    prompts: Sequence[str],
    completions: Sequence[Clip],
    *,
    spec: Sequence[Spec | Mapping[str, Any] | None] | None = None,
    log_metric: Any = None,
    log_reasons: Any = None,
    workers: int = 0,
) -> list[float | None]:
    """Score clips with `postgen.world.check`: 1 for a clip that shows everything, less down to 0.

    A prompt with a clause that cannot be checked (a size, a negation, an unknown thing) multiplies the score by
    0.45.

    Args:
        prompts: parsed with `world.parse` if there is no spec.
        completions: clips (F,3,H,W) in [0,1], F >= 5, at least 32 px.
        spec: column of scenes, as `Spec` or in its JSON form.
        log_metric: receives the shares of clips with the right count, colour, shape, direction, event and camera, of
            steady clips, and of clips with a readable prompt.
        log_reasons: receives the reasons of missing scores.
        workers: number of additional processes for the check, as in `check_batch`; 0 uses none.

    Returns:
        One score in [0,1] per clip; None for a prompt that names no body of the world, and for a clip that is too
        short or too small.
    """
    wanted = _asked(prompts, spec)
    reports: dict[int, Report] = {}
    for rows in alike(completions, [asked is not None for asked in wanted]):
        asked = [s for row in rows if (s := wanted[row]) is not None]
        judged = reports_of([completions[row] for row in rows], asked, workers=workers)
        reports |= zip(rows, judged, strict=True)
    if log_metric is not None:
        _log_shares(list(reports.values()), log_metric)
    if log_reasons is not None:
        log_reasons([why_not(clip, scene is not None) for clip, scene in zip(completions, wanted, strict=True)])
    return [reports[row].score if row in reports else None for row in range(len(completions))]


def _asked(
    prompts: Sequence[str], spec: Sequence[Spec | Mapping[str, Any] | None] | None
) -> list[Spec | Reading | None]:
    """Return the same as `scenes`, but with the complete `Reading` of a prompt."""
    given = spec if spec is not None else [None] * len(prompts)
    known = cache(read)
    return [
        known(prompt) if own is None else scene
        for prompt, own, scene in zip(prompts, given, scenes(prompts, spec), strict=True)
    ]


def scenes(prompts: Sequence[str], spec: Sequence[Spec | Mapping[str, Any] | None] | None = None) -> list[Spec | None]:
    """Return the scene of each row: its spec, else the scene parsed from its prompt, else None.

    Raises:
        UserError: a spec has an invalid form.
    """
    given = spec if spec is not None else [None] * len(prompts)
    # The rows of a group share one prompt, so parsing is cached.
    read = cache(parse)
    return [
        read(prompt) if own is None else own if isinstance(own, Spec) else Spec.from_dict(own)
        for prompt, own in zip(prompts, given, strict=True)
    ]


def alike(completions: Sequence[Clip], wanted: Sequence[bool]) -> list[list[int]]:
    """Group the wanted rows whose clips are long and large enough by clip size; a `Footage` forms its own group."""
    groups: dict[Any, list[int]] = {}
    for row, clip in enumerate(completions):
        if why_not(clip, wanted[row]) is None:
            groups.setdefault(row if isinstance(clip, Footage) else clip.shape, []).append(row)
    return list(groups.values())


def why_not(clip: Clip, wanted: bool) -> str | None:
    """Return the reason why a clip cannot be checked, None if it can.

    Args:
        clip: the clip.
        wanted: whether its prompt or its spec describes a scene.
    """
    if not wanted:
        return NO_BODY
    if len(clip) < _LEAST_FRAMES or min(clip.shape[-2:]) < _LEAST_SIDE:
        return unfit(clip, _LEAST_FRAMES, _LEAST_SIDE)
    return None


def reports_of(clips: Sequence[Clip], asked: Sequence[Spec | Reading], *, workers: int = 0) -> list[Report]:
    """Check the clips of one group of `alike`."""
    first, held = clips[0], [clip for clip in clips if isinstance(clip, Tensor)]
    if isinstance(first, Footage):
        return [check_long(first.windows, asked[0], workers=workers)]
    return check_batch(torch.stack(held), asked, workers=workers)


def _log_shares(reports: Sequence[Report], log_metric: Any) -> None:
    for name in ("count", "colour", "shape", "direction", "event", "steady", "camera", "readable"):
        values = [float(value) for report in reports if (value := getattr(report, name)) is not None]
        if values:
            log_metric(f"world/{name}", sum(values) / len(values))
