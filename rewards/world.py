"""The exact reward of the synthetic world: how well a clip shows what its prompt, or its spec, asks for."""

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
NO_BODY = f"the prompt names no scene of the world: bodies are a colour and one of {', '.join(SHAPES)}, 3 at most"
"""Why a prompt gives nothing to judge."""


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
    """Score clips by `postgen.world.check`: 1 for a clip that shows all of it, graded down to 0.

    A prompt with a clause that cannot be judged (a size, a negation, an unknown thing) leaves 0.45 of the score.

    Args:
        prompts: read by `world.parse` where there is no spec.
        completions: clips (F,3,H,W) in [0,1], F >= 5, at least 32 px.
        spec: column of scenes, as `Spec` or as its JSON form.
        log_metric: gets the shares of clips with the right count, colour, shape, direction, event and camera, of those
            that are steady, and of those whose prompt is readable.
        log_reasons: gets why a clip has no score.
        workers: processes that judge beside this one, as in `check_batch`; 0 needs none.

    Returns:
        One score in [0,1] a clip; None for a prompt that names no body of the world, and for a clip that is too short
        or too small to be judged.
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
    """As `scenes`, with all that was understood of a prompt."""
    given = spec if spec is not None else [None] * len(prompts)
    known = cache(read)
    return [
        known(prompt) if own is None else scene
        for prompt, own, scene in zip(prompts, given, scenes(prompts, spec), strict=True)
    ]


def scenes(prompts: Sequence[str], spec: Sequence[Spec | Mapping[str, Any] | None] | None = None) -> list[Spec | None]:
    """What each row asks for: its spec, else what the prompt says, else None.

    Raises:
        UserError: a spec in a form that none has.
    """
    given = spec if spec is not None else [None] * len(prompts)
    # The prompts of a group are one prompt.
    read = cache(parse)
    return [
        read(prompt) if own is None else own if isinstance(own, Spec) else Spec.from_dict(own)
        for prompt, own in zip(prompts, given, strict=True)
    ]


def alike(completions: Sequence[Clip], wanted: Sequence[bool]) -> list[list[int]]:
    """Wanted rows whose clips are long and large enough for the judge, those in memory and of one size together."""
    groups: dict[Any, list[int]] = {}
    for row, clip in enumerate(completions):
        if why_not(clip, wanted[row]) is None:
            groups.setdefault(row if isinstance(clip, Footage) else clip.shape, []).append(row)
    return list(groups.values())


def why_not(clip: Clip, wanted: bool) -> str | None:
    """Say why the judge cannot look at a clip, None if it can.

    Args:
        clip: the clip.
        wanted: whether its prompt or its spec says what it should show.
    """
    if not wanted:
        return NO_BODY
    if len(clip) < _LEAST_FRAMES or min(clip.shape[-2:]) < _LEAST_SIDE:
        return unfit(clip, _LEAST_FRAMES, _LEAST_SIDE)
    return None


def reports_of(clips: Sequence[Clip], asked: Sequence[Spec | Reading], *, workers: int = 0) -> list[Report]:
    """Judge clips that `alike` put together."""
    first, held = clips[0], [clip for clip in clips if isinstance(clip, Tensor)]
    if isinstance(first, Footage):
        return [check_long(first.windows, asked[0], workers=workers)]
    return check_batch(torch.stack(held), asked, workers=workers)


def _log_shares(reports: Sequence[Report], log_metric: Any) -> None:
    for name in ("count", "colour", "shape", "direction", "event", "steady", "camera", "readable"):
        values = [float(value) for report in reports if (value := getattr(report, name)) is not None]
        if values:
            log_metric(f"world/{name}", sum(values) / len(values))
