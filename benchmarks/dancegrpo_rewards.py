"""Rewards of `python -m benchmarks.dancegrpo` that only this experiment uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from postgen import world
from postgen.world.check import check_batch

WORKERS = 2
"""Processes of the judge on a GPU."""


def wholly_right(prompts: Sequence[str], completions: Sequence[Tensor], **columns: Any) -> list[float | None]:
    """Return 1 for each clip that shows everything in its prompt, else 0; None for a prompt without a scene."""
    read = [world.read(prompt) for prompt in prompts]
    rows = [row for row, reading in enumerate(read) if reading is not None]
    found: list[float | None] = [None] * len(read)
    if rows:
        clips = torch.stack([completions[row] for row in rows])
        asked = [reading for reading in read if reading is not None]
        reports = check_batch(clips, asked, workers=WORKERS if clips.is_cuda else 0)
        for row, report in zip(rows, reports, strict=True):
            found[row] = float(report.all_right)
    return found


def brightness(completions: Sequence[Tensor], **columns: Any) -> list[float]:
    """Return the mean value of each clip (F, 3, H, W), in [0, 1]."""
    return [float(clip.mean()) for clip in completions]
