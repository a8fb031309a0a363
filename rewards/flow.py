"""Optical flow for the motion rewards: OpenCV's DIS, which needs no weights, or torchvision's RAFT.

Flow is in px: the point at (x, y) in frame t is at (x + u, y + v) in frame t + 1. DIS: arXiv 1603.03590;
RAFT: 2003.12039.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, pad

from postgen.errors import UserError
from postgen.rewards.base import Clip, RewardModel, streaming, unfit
from postgen.rewards.pictures import luma
from postgen.rewards.weights import absent, fill, find_file, read_state

FLOWS = ("dis", "raft")

_LEAST = {"dis": 12, "raft": 128}
"""Smallest side, in px, that each method accepts."""


def dis_flow(frames_F3HW: Tensor) -> Tensor:
    """Compute the flow between consecutive frames (F-1,2,H,W) with dense inverse search (DIS), on the CPU.

    Raises:
        UserError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "optical flow needs OpenCV: pip install opencv-python-headless, or give flow='raft'"
        ) from error
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    levels = (luma(frames_F3HW.float().clamp(0, 1)) * 255).round().byte().cpu().numpy()
    start = np.zeros((*levels.shape[1:], 2), np.float32)
    flows = [search.calc(a, b, start.copy()) for a, b in pairwise(levels)]
    return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2).contiguous()


def raft(weights: str | None) -> nn.Module:
    """Load torchvision's large RAFT.

    Args:
        weights: local file or https address of the weights; None downloads torchvision's weights, which like
            VBench's were trained on FlyingChairs and FlyingThings.

    Raises:
        UserError: torchvision is not installed, or the weights cannot be found or do not fit.
    """
    path = find_file(_raft_weights(weights))
    from torchvision.models.optical_flow import raft_large

    return fill(raft_large(weights=None), read_state(path), path)


def _raft_weights(weights: str | None) -> str:
    try:
        from torchvision.models.optical_flow import Raft_Large_Weights
    except (ImportError, RuntimeError) as error:  # RuntimeError if torchvision was built for another torch
        raise UserError("flow='raft' needs torchvision: pip install torchvision, or give flow='dis'") from error
    return weights or str(Raft_Large_Weights.C_T_V1.url)


def raft_flow(net: nn.Module, frames_F3HW: Tensor, updates: int = 20) -> Tensor:
    """Compute the flow between consecutive frames (F-1,2,H,W); borders are padded to multiples of 8 px."""
    height, width = frames_F3HW.shape[-2:]
    below, right = -height % 8, -width % 8
    edges = (right // 2, right - right // 2, below // 2, below - below // 2)
    x = pad(frames_F3HW * 2 - 1, edges, mode="replicate")
    flow: Tensor = net(x[:-1].contiguous(), x[1:].contiguous(), num_flow_updates=updates)[-1]
    return flow[..., edges[2] : edges[2] + height, edges[0] : edges[0] + width]


def carried(values_NCHW: Tensor, flow_N2HW: Tensor) -> tuple[Tensor, Tensor]:
    """Sample values at the end points of the flow, (N,C,H,W); also return which of them are in the frame, (N,H,W)."""
    height, width = flow_N2HW.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    to = torch.stack((x + flow_N2HW[:, 0], y + flow_N2HW[:, 1]), -1)
    grid = (to + 0.5) / to.new_tensor((width, height)) * 2 - 1
    inside = ((to >= 0) & (to <= to.new_tensor((width - 1, height - 1)))).all(-1)
    return grid_sample(values_NCHW, grid, padding_mode="border", align_corners=False), inside


@streaming
class FlowReward(RewardModel):
    """Base class of the motion rewards: a subclass scores a clip with `flows`.

    Args:
        flow: "dis" or "raft".
        weights: weights of RAFT, see `raft`.
        device, dtype: see `RewardModel`; DIS runs on the CPU.
    """

    def __init__(self, flow: str = "dis", weights: str | None = None, **place: Any) -> None:
        super().__init__(**place)
        if flow not in FLOWS:
            raise UserError(f"unknown flow {flow!r}: allowed are {', '.join(FLOWS)}")
        if weights is not None and flow != "raft":
            raise UserError(f"flow={flow!r} has no weights: use flow='raft' with them")
        self.flow, self.weights = flow, weights

    def lacking(self) -> str | None:
        """Return a message if OpenCV, or RAFT with its weights, is missing; None otherwise."""
        if self.flow == "dis":
            return None if find_spec("cv2") else "it needs OpenCV: pip install 'postgen[rewards]'"
        try:
            return absent(_raft_weights(self.weights))
        except UserError as error:
            return str(error)

    def build(self) -> nn.Module:
        """Load RAFT; DIS has no network.

        Raises:
            UserError: see `raft`.
        """
        return raft(self.weights) if self.flow == "raft" else nn.Identity()

    def unfit(self, clip: Clip, frames: int) -> str | None:
        """Return a message if a clip is too short or too small; None otherwise."""
        return unfit(clip, frames, _LEAST[self.flow])

    def flows(self, frames_F3HW: Tensor) -> Tensor:
        """Compute the flow between consecutive frames (F-1,2,H,W), float32 on the CPU."""
        if self.flow == "dis":
            return dis_flow(frames_F3HW)
        return raft_flow(self.net, frames_F3HW.to(self.device, self.dtype)).float().cpu()
