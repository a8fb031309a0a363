"""Depth and optical flow as pictures, so that the autoencoder of the video encodes them too, and back again.

Depth is shown as disparity, near is bright: q = 1 / depth, the 2nd percentile of the whole clip at a grey of 1/8, the
98th at 3/4, in three equal channels. Never percentiles of single frames: the same distance must look the same in all
of them. A rollout fixes the range by its first window and keeps it in its state, so that a drift of scale stays
visible. The greys leave room for what comes nearer later than anything in that window, and autoencoders of videos
keep them: that of the embedded model decodes black to .09, and all that is brighter than .8 to .76. Flow is a colour:
direction is hue, length is saturation (as in VideoJAM, arXiv:2502.02492).

Pictures are clips as everywhere, (B, F, 3, H, W) float32 in [0, 1], which `Denoiser.encode_video` takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError, check_number

GREYS = (0.125, 0.75)
"""How the 2nd and the 98th percentile of disparity look, and `DisparityRange.of` in general."""
FLOW_LIMIT = 0.15
"""Flow of so many picture diagonals a frame, or more, has full saturation."""


def disparity_of(depth: Tensor) -> Tensor:
    """Return 1 / depth of distances along the optical axis, any shape; 0 where the depth is infinite.

    Raises:
        UserError: depths that are not above 0, or are no numbers.
    """
    if not bool((depth > 0).all()):
        raise UserError(f"depth must be above 0 everywhere, got {float(depth.min())} as the least")
    return 1 / depth


@dataclass(frozen=True, slots=True)
class DisparityRange:
    """What is black and what is white in a picture of disparity, for each of B clips."""

    low: Tensor
    """(B,) float32, black."""
    high: Tensor
    """(B,) white, above `low`."""

    @staticmethod
    def of(disparity: Tensor, low: float = 0.02, high: float = 0.98) -> DisparityRange:
        """Return the range of clips in which two percentiles over all their frames have the greys `GREYS`.

        Args:
            disparity: (B, F, H, W).
            low: share of the pixels that are darker than the first grey.
            high: share of those that are darker than the second.

        Raises:
            UserError: another shape, values that are not finite, or shares that do not rise.
        """
        _check_clips(disparity, "disparity", 4)
        check_number("low", low, 0, 1)
        check_number("high", high, low, 1)
        if not bool(disparity.isfinite().all()):
            raise UserError("disparity is not finite: turn depth into it with disparity_of")
        flat = disparity.float().flatten(1)
        a, b = _percentile(flat, low), _percentile(flat, high)
        # A flat wall is all one disparity: it has the first grey.
        span = torch.maximum(b - a, torch.maximum(a.abs() * 1e-3, torch.full_like(a, 1e-6))) / (GREYS[1] - GREYS[0])
        black = a - span * GREYS[0]
        return DisparityRange(black, black + span)

    def picture(self, disparity: Tensor) -> Tensor:
        """Return (B, F, 3, H, W) in [0, 1] of (B, F, H, W); what lies outside the range is cut."""
        _check_clips(disparity, "disparity", 4)
        a, b = self._wide(disparity)
        grey = ((disparity - a) / (b - a)).clamp(0, 1).float()
        return grey[:, :, None].expand(-1, -1, 3, -1, -1)

    def disparity(self, picture: Tensor) -> Tensor:
        """Return (B, F, H, W) of a picture (B, F, 3, H, W): the mean of its channels, scaled back."""
        _check_clips(picture, "a picture", 5)
        grey = picture.mean(2)
        a, b = self._wide(grey)
        return a + grey * (b - a)

    def distance(self, picture: Tensor, edge: float = 0.02) -> Tensor:
        """Return the distances (B, F, H, W) that a picture (B, F, 3, H, W) shows.

        Infinite where it is within `edge` of black or white, where the disparity may have been cut, and where it says
        farther than infinity, as the room below the first grey does.
        """
        disparity, grey = self.disparity(picture), picture.mean(2)
        known = (grey > edge) & (grey < 1 - edge) & (disparity > 0)
        return torch.where(known, 1 / torch.where(known, disparity, 1), torch.inf)

    def _wide(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if len(like) != len(self.low):
            raise UserError(f"a range of {len(self.low)} clips for {len(like)}: give one of each")
        low, high = (each.to(like.device).view(-1, 1, 1, 1) for each in (self.low, self.high))
        return low, high

    def tensors(self) -> dict[str, Tensor]:
        """Return it by names for `RolloutState.extra`."""
        return {"disparity.low": self.low, "disparity.high": self.high}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> DisparityRange | None:
        """Return the range that a state has kept; None where it has none."""
        if "disparity.low" not in tensors:
            return None
        return DisparityRange(tensors["disparity.low"], tensors["disparity.high"])


def flow_picture(flow: Tensor) -> Tensor:
    """Return flow (B, F - 1, 2, H, W) as a picture (B, F, 3, H, W) in [0, 1]; its last frame is repeated.

    White is no motion. Flow is in pixels a frame, u right and v down; longer than `FLOW_LIMIT` of the diagonal, it
    keeps its direction only.

    Raises:
        UserError: another shape.
    """
    if flow.dim() != 5 or flow.shape[2] != 2 or not flow.shape[1]:
        raise UserError(f"flow of shape {tuple(flow.shape)}: give (clips, frames - 1, 2, height, width)")
    u, v = flow.float().unbind(2)
    saturation = (torch.hypot(u, v) / _longest(flow)).clamp_max(1)
    sector = torch.atan2(v, u) / (math.pi / 3)
    # Hue to colour at full brightness: red, green and blue are each a third of the circle apart.
    shifts = torch.tensor([0.0, -2.0, 2.0], device=flow.device).view(3, 1, 1)
    away = torch.remainder(sector[:, :, None] + shifts + 3, 6) - 3
    picture = 1 - saturation[:, :, None] * (away.abs() - 1).clamp(0, 1)
    return torch.cat([picture, picture[:, -1:]], 1)


def flow_of_picture(picture: Tensor) -> Tensor:
    """Return the flow (B, F - 1, 2, H, W) that a picture (B, F, 3, H, W) shows; the last frame is left out.

    Raises:
        UserError: another shape, or fewer than two frames.
    """
    _check_clips(picture, "a picture", 5)
    if picture.shape[1] < 2:
        raise UserError("a picture of flow has at least 2 frames, got 1")
    colour = picture[:, :-1].float()
    most, least = colour.amax(2), colour.amin(2)
    span = most - least
    red, green, blue = colour.unbind(2)
    safe = torch.where(span > 0, span, 1)
    of_red, of_green, of_blue = (green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe
    sector = torch.where(red == most, of_red, torch.where(green == most, of_green, of_blue))
    # What the decoder made darker or brighter is no motion: saturation is a share of the brightest channel.
    length = span / torch.where(most > 0, most, 1) * _longest(picture)
    angle = sector * (math.pi / 3)
    return torch.stack([length * angle.cos(), length * angle.sin()], 2)


def _longest(clips: Tensor) -> float:
    return FLOW_LIMIT * math.hypot(*clips.shape[-2:])


def _percentile(values: Tensor, share: float) -> Tensor:
    """Return (B,) of (B, n), as `torch.quantile` does, which takes no more than 16 million values."""
    position = share * (values.shape[1] - 1)
    low = math.floor(position)
    first = values.kthvalue(low + 1, 1).values
    second = values.kthvalue(min(low + 2, values.shape[1]), 1).values
    return torch.lerp(first, second, position - low)


def _check_clips(clips: Tensor, what: str, dimensions: int) -> None:
    if clips.dim() != dimensions or (dimensions == 5 and clips.shape[2] != 3) or not clips.numel():
        wanted = "(clips, frames, 3, height, width)" if dimensions == 5 else "(clips, frames, height, width)"
        raise UserError(f"{what} of shape {tuple(clips.shape)}: give {wanted}")
