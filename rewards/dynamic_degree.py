"""VBench's dynamic degree (arXiv 2311.17982): does a clip move at all?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.rewards.base import Clip, promptless
from postgen.rewards.flow import FlowReward
from postgen.rewards.frames import in_windows

_RATE = 8.0
"""Frames per second at which VBench looks at a video."""


def fastest(flow_N2HW: Tensor) -> Tensor:
    """Return the mean length of the longest twentieth of each frame's flow, in px."""
    lengths = flow_N2HW.norm(dim=1).flatten(1)
    longest: Tensor = lengths.topk(max(1, int(lengths.shape[1] * 0.05)), dim=1).values
    return longest.mean(1)


@promptless
class DynamicDegree(FlowReward):
    """1 for a clip that moves, 0 for one that stands still; or by degrees.

    A pair of frames moves when the fastest twentieth of its pixels goes further than 6 px of 256 px (shorter side).
    VBench calls a clip dynamic when a quarter of its frames do, round(4 n / 16) of n; for n of 1 or 2 that is none, so
    that every such clip would pass: at least one pair is asked for here. With DIS instead of VBench's RAFT clips near
    the threshold may fall on the other side.

    Args:
        graded: give how far the pair that decides gets towards the threshold, instead of whether it passes.
        flow, weights, device, dtype: as `FlowReward`.
    """

    name = "dynamic_degree"

    def __init__(self, graded: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.graded = graded

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Clip],
        *,
        fps: float | None = None,
        log_reasons: Any = None,
    ) -> list[float | None]:
        """Score clips.

        Args:
            prompts: unused.
            completions: clips of any sizes; one of a single frame, or below 12 px (RAFT: 128 px), cannot be scored.
            fps: frames per second; every round(fps / 8)-th frame is looked at. None looks at all.
            log_reasons: gets why a clip has no score.

        Raises:
            UserError: a frame rate that is not above 0.
        """
        if fps is not None and fps <= 0:
            raise UserError(f"fps must be above 0, got {fps}")
        self.load()
        step = max(1, round(fps / _RATE)) if fps else 1
        if log_reasons is not None:
            log_reasons([self.unfit(clip, step + 1) for clip in completions])
        return [self._score(clip, step) for clip in completions]

    def _score(self, clip: Clip, step: int) -> float | None:
        if self.unfit(clip, step + 1):
            return None
        parts = [fastest(self.flows(part.float())) for part in in_windows(clip, overlap=1, step=step)]
        passed = torch.cat(parts) / (6 * min(clip.shape[-2:]) / 256)
        asked = min(max(1, round(4 * (len(passed) + 1) / 16)), len(passed))
        decisive = float(torch.sort(passed, descending=True).values[asked - 1])
        return min(decisive, 1.0) if self.graded else float(decisive > 1)
