"""Smoothness of motion: whether points keep their velocity from frame to frame. Our measure, not a published one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.rewards.base import Clip, promptless
from postgen.rewards.flow import FlowReward, carried
from postgen.rewards.frames import in_windows

_STILL = 0.005
"""Least velocity, relative to the frame's shorter side, so that noise of the flow does not count as a jerk."""


def smoothness(flow_N2HW: Tensor, shorter: int) -> float:
    """Return 1 - mean of |v' - v| / (|v'| + |v| + c) over points that move or jump, in [0,1].

    v is the flow of a point from frame t to t + 1; v' is the flow from t + 1 to t + 2 at the position that the point
    has reached. The mean is weighted by the denominator, so that the static background has little weight.
    """
    return smoothness_along([flow_N2HW], shorter)


def smoothness_along(flows: Iterable[Tensor], shorter: int) -> float:
    """Compute `smoothness` of flow (N,2,H,W) in windows; each window starts with the last flow of the one before."""
    sums = [_sums(flow, shorter) for flow in flows]
    change, size = (torch.stack(part).double().sum() if len(part) > 1 else part[0] for part in zip(*sums, strict=True))
    return 1 - float(change / size.clamp(min=1e-6))


def _sums(flow_N2HW: Tensor, shorter: int) -> tuple[Tensor, Tensor]:
    before = flow_N2HW[:-1]
    after, inside = carried(flow_N2HW[1:], before)
    change = (after - before).norm(dim=1)
    size = after.norm(dim=1) + before.norm(dim=1) + _STILL * shorter
    return (change * inside).sum(), (size * inside).sum()


@promptless
class FlowSmoothness(FlowReward):
    """Return 1 for even motion and less for jerks, jumps and flicker; in [0,1].

    A frozen clip gets 1 too: combine this reward with `dynamic_degree` or `motion_floor`. A bounce counts as a jerk.

    Args:
        flow, weights, device, dtype: see `FlowReward`.
    """

    name = "flow_smoothness"

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[Clip], *, log_reasons: Any = None
    ) -> list[float | None]:
        """Score clips of any size; clips of fewer than three frames, or below 12 px (RAFT: 128 px), get None."""
        self.load()
        if log_reasons is not None:
            log_reasons([self.unfit(clip, 3) for clip in completions])
        return [
            smoothness_along((self.flows(part.float()) for part in in_windows(clip, overlap=2)), min(clip.shape[-2:]))
            if self.unfit(clip, 3) is None
            else None
            for clip in completions
        ]
