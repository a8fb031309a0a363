"""VBench's dynamic degree (arXiv 2311.17982): whether a clip shows motion at all."""

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
"""Frames per second at which VBench samples a video."""


def fastest(flow_N2HW: Tensor) -> Tensor:
    """Return the mean length, in px, of the longest 5 % of the flow vectors of each frame pair."""
    lengths = flow_N2HW.norm(dim=1).flatten(1)
    longest: Tensor = lengths.topk(max(1, int(lengths.shape[1] * 0.05)), dim=1).values
    return longest.mean(1)


@promptless
class DynamicDegree(FlowReward):
    """Return 1 for a clip with motion and 0 for a static clip, or a graded value between 0 and 1.

    A pair of frames moves if the fastest 5 % of its pixels move more than 6 px at 256 px (shorter side). VBench calls
    a clip dynamic if a quarter of its frames move, round(4 n / 16) of n. For n of 1 or 2 this number is 0, so that
    every such clip would pass; this class therefore requires at least one pair. It uses DIS by default where VBench
    uses RAFT, so clips near the threshold may be classified differently.

    Args:
        graded: return the ratio of the deciding pair's motion to the threshold, at most 1, instead of 0 or 1.
        flow, weights, device, dtype: see `FlowReward`.
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
            completions: the clips. A clip with fewer than two used frames, or below 12 px (RAFT: 128 px), gets None.
            fps: frames per second; every n-th frame is used, n = max(1, round(fps / 8)). None uses all frames.
            log_reasons: receives the reasons of missing scores.

        Raises:
            UserError: the frame rate is not above 0, or RAFT or its weights are missing.
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
