"""Contact sheets of removed clips, so that a person can judge the thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, pad

from postgen.errors import UserError
from postgen.video import contact_sheet, iter_video, read_picture

from .config import BANDS, CurationConfig
from .funnel import Candidate, Funnel

_MOST = 24
"""Clips of a sheet."""
_SIDE = 160
_GREY = 0.85


def draw_removed(
    folder: Path, funnel: Funnel, config: CurationConfig, report: Callable[[int, int], None] = lambda *_: None
) -> list[Path]:
    """Draw `removed-FILTER.png` for each filter that removed clips, with the refused value above each clip.

    The clips nearest to the threshold come first, because they show whether it is right. A duplicate is followed by
    the clip that was kept. A clip is shown by its middle frame.

    Args:
        folder: folder of the pictures.
        funnel: the result.
        config: its settings.
        report: called with the finished and the total number of sheets.

    Returns:
        The written files.
    """
    removed: dict[str, list[Candidate]] = {}
    for one in funnel.candidates:
        if one.removed is not None and one.shot is not None:
            removed.setdefault(one.removed, []).append(one)
    written = []
    for number, (name, gone) in enumerate(removed.items(), 1):
        shown = sorted(gone, key=lambda one: _doubt(one, name, config))
        tiles: list[tuple[str, Tensor]] = []
        for one in shown:
            if len(tiles) >= _MOST:
                break
            tiles.append((f"{one.value:.4g}" if one.value is not None else "", _tile(one)))
            if one.other is not None:
                tiles.append(("kept", _tile(funnel.candidates[one.other])))
        target = folder / f"removed-{name}.png"
        title = f"{name}: {len(gone)} removed, {_told(name, funnel)}; the nearest to the threshold first"
        contact_sheet(
            torch.stack([tile for _, tile in tiles]), target, title=title, indices=[label for label, _ in tiles]
        )
        written.append(target)
        report(number, len(removed))
    return written


def _told(name: str, funnel: Funnel) -> str:
    return next((f"allowed: {step.threshold}" for step in funnel.steps if step.name == name and step.threshold), "")


def _doubt(one: Candidate, name: str, config: CurationConfig) -> float:
    """Return how far a value lies from the threshold, relative to it."""
    if one.value is None:
        return 0.0
    if name in BANDS:
        ends: Sequence[float | None] = getattr(config, name)
        return min(abs(one.value - end) / (abs(end) or 1.0) for end in ends if end is not None)
    # Cuts and bars: the smallest value is the nearest; distances: the largest.
    return one.value if name in ("cuts", "bars") else -one.value


def _tile(one: Candidate) -> Tensor:
    """Return the middle frame of a clip on a grey square; a plain square if the file has disappeared."""
    assert one.shot is not None
    try:
        if one.item.kind == "image":
            frame = torch.from_numpy(np.array(read_picture(one.item.path))).permute(2, 0, 1).float() / 255
        else:
            frame = next(iter_video(one.item.path, start=one.shot.first + one.shot.count // 2, count=1))[0]
    except (UserError, OSError):
        return torch.full((3, _SIDE, _SIDE), _GREY)
    height, width = frame.shape[-2:]
    scale = _SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = adaptive_avg_pool2d(frame, size) if scale < 1 else interpolate(frame[None], size, mode="nearest")[0]
    top, left = (_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2
    return pad(small, (left, _SIDE - size[1] - left, top, _SIDE - size[0] - top), value=_GREY).clamp(0, 1)
