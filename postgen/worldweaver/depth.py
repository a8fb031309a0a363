"""Convert depth and optical flow to pictures that the video autoencoder can encode, and back.

Depth is shown as disparity q = 1 / depth, so near is bright, in three equal channels. The 2nd percentile of q over the
whole clip has a grey value of 1/8, the 98th has 3/4. Percentiles are never computed per frame, because the same
distance must have the same grey value in every frame. A rollout fixes the range with its first window and keeps it in
its state, so that a drift of scale stays visible. The grey range leaves room for objects that later come nearer than
anything in the first window. It also avoids grey values that video autoencoders do not keep: the autoencoder of the
embedded model decodes black to .09, and everything brighter than .8 to .76. Flow is shown as colour: hue is the
direction, saturation is the length (as in VideoJAM, arXiv:2502.02492).

Pictures are clips (B, F, 3, H, W) float32 in [0, 1], as `Denoiser.encode_video` takes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError, check_number

GREYS = (0.125, 0.75)
"""Grey values of the 2nd and 98th percentile of disparity (of the two percentiles in `DisparityRange.of`)."""
FLOW_LIMIT = 0.15
"""Flow length, in picture diagonals per frame, from which saturation is full."""


def disparity_of(depth: Tensor) -> Tensor:
    """Return 1 / depth for distances along the optical axis, of any shape; 0 for infinite depth.

    Raises:
        UserError: a depth that is not above 0, or not a number.
    """
    if not bool((depth > 0).all()):
        raise UserError(f"depth must be above 0 everywhere, but its minimum is {float(depth.min())}")
    return 1 / depth


@dataclass(frozen=True, slots=True)
class DisparityRange:
    """Disparities that are shown as black and as white, for each of B clips."""

    low: Tensor
    """(B,) float32 disparity of black."""
    high: Tensor
    """(B,) float32 disparity of white, above `low`."""

    @staticmethod
    def of(disparity: Tensor, low: float = 0.02, high: float = 0.98) -> DisparityRange:
        """Return the range in which two percentiles over all frames of a clip have the grey values `GREYS`.

        Args:
            disparity: (B, F, H, W).
            low: first percentile, as a share of the pixels.
            high: second percentile, as a share of the pixels.

        Raises:
            UserError: a wrong shape, values that are not finite, or a `high` below `low`.
        """
        _check_clips(disparity, "disparity", 4)
        check_number("low", low, 0, 1)
        check_number("high", high, low, 1)
        if not bool(disparity.isfinite().all()):
            raise UserError("disparity is not finite: convert depth with disparity_of")
        flat = disparity.float().flatten(1)
        a, b = _percentile(flat, low), _percentile(flat, high)
        # A clip with a single disparity, such as a flat wall, has the first grey value.
        span = torch.maximum(b - a, torch.maximum(a.abs() * 1e-3, torch.full_like(a, 1e-6))) / (GREYS[1] - GREYS[0])
        black = a - span * GREYS[0]
        return DisparityRange(black, black + span)

    def picture(self, disparity: Tensor) -> Tensor:
        """Convert disparity (B, F, H, W) to pictures (B, F, 3, H, W) in [0, 1], clamped to the range."""
        _check_clips(disparity, "disparity", 4)
        a, b = self._wide(disparity)
        grey = ((disparity - a) / (b - a)).clamp(0, 1).float()
        return grey[:, :, None].expand(-1, -1, 3, -1, -1)

    def disparity(self, picture: Tensor) -> Tensor:
        """Convert pictures (B, F, 3, H, W) to disparity (B, F, H, W), from the mean of the channels."""
        _check_clips(picture, "a picture", 5)
        grey = picture.mean(2)
        a, b = self._wide(grey)
        return a + grey * (b - a)

    def distance(self, picture: Tensor, edge: float = 0.02) -> Tensor:
        """Convert pictures (B, F, 3, H, W) to distances (B, F, H, W).

        The distance is infinite where the grey value is within `edge` of black or white, because the disparity may
        have been clamped there. It is also infinite where the disparity is not above 0, which the range below the
        first grey value allows.
        """
        disparity, grey = self.disparity(picture), picture.mean(2)
        known = (grey > edge) & (grey < 1 - edge) & (disparity > 0)
        return torch.where(known, 1 / torch.where(known, disparity, 1), torch.inf)

    def _wide(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if len(like) != len(self.low):
            raise UserError(f"the range is of {len(self.low)} clips, but {len(like)} clips are given: give as many")
        low, high = (each.to(like.device).view(-1, 1, 1, 1) for each in (self.low, self.high))
        return low, high

    def tensors(self) -> dict[str, Tensor]:
        """Return the range as named tensors for `RolloutState.extra`."""
        return {"disparity.low": self.low, "disparity.high": self.high}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> DisparityRange | None:
        """Return the range from the tensors of a state; None: the state has no range."""
        if "disparity.low" not in tensors:
            return None
        return DisparityRange(tensors["disparity.low"], tensors["disparity.high"])


def flow_picture(flow: Tensor) -> Tensor:
    """Convert flow (B, F - 1, 2, H, W) to pictures (B, F, 3, H, W) in [0, 1]. The last picture is repeated.

    White is no motion. Flow is in pixels per frame, u to the right and v down. Flow longer than `FLOW_LIMIT` of the
    diagonal keeps only its direction.

    Raises:
        UserError: a wrong shape.
    """
    if flow.dim() != 5 or flow.shape[2] != 2 or not flow.shape[1]:
        raise UserError(f"flow has shape {tuple(flow.shape)}: give (clips, frames - 1, 2, height, width)")
    u, v = flow.float().unbind(2)
    saturation = (torch.hypot(u, v) / _longest(flow)).clamp_max(1)
    sector = torch.atan2(v, u) / (math.pi / 3)
    # Convert hue to RGB at full brightness: the hues of red, green and blue are a third of the circle apart.
    shifts = torch.tensor([0.0, -2.0, 2.0], device=flow.device).view(3, 1, 1)
    away = torch.remainder(sector[:, :, None] + shifts + 3, 6) - 3
    picture = 1 - saturation[:, :, None] * (away.abs() - 1).clamp(0, 1)
    return torch.cat([picture, picture[:, -1:]], 1)


def flow_of_picture(picture: Tensor) -> Tensor:
    """Convert pictures (B, F, 3, H, W) to flow (B, F - 1, 2, H, W). The last picture is ignored.

    Raises:
        UserError: a wrong shape, or fewer than two frames.
    """
    _check_clips(picture, "a picture", 5)
    if picture.shape[1] < 2:
        raise UserError("flow pictures need at least 2 frames, got 1")
    colour = picture[:, :-1].float()
    most, least = colour.amax(2), colour.amin(2)
    span = most - least
    red, green, blue = colour.unbind(2)
    safe = torch.where(span > 0, span, 1)
    of_red, of_green, of_blue = (green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe
    sector = torch.where(red == most, of_red, torch.where(green == most, of_green, of_blue))
    # Divide by the brightest channel, so that a change of brightness by the decoder does not count as motion.
    length = span / torch.where(most > 0, most, 1) * _longest(picture)
    angle = sector * (math.pi / 3)
    return torch.stack([length * angle.cos(), length * angle.sin()], 2)


def _longest(clips: Tensor) -> float:
    return FLOW_LIMIT * math.hypot(*clips.shape[-2:])


def _percentile(values: Tensor, share: float) -> Tensor:
    """Return a percentile of each row, (B, n) -> (B,). `torch.quantile` is limited to 16 million values."""
    position = share * (values.shape[1] - 1)
    low = math.floor(position)
    first = values.kthvalue(low + 1, 1).values
    second = values.kthvalue(min(low + 2, values.shape[1]), 1).values
    return torch.lerp(first, second, position - low)


def _check_clips(clips: Tensor, what: str, dimensions: int) -> None:
    if clips.dim() != dimensions or (dimensions == 5 and clips.shape[2] != 3) or not clips.numel():
        wanted = "(clips, frames, 3, height, width)" if dimensions == 5 else "(clips, frames, height, width)"
        raise UserError(f"{what} has shape {tuple(clips.shape)}: give {wanted}")
