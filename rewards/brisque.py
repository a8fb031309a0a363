"""BRISQUE: quality of a picture without a reference, from the statistics of its local contrast.

Mittal, Moorthy, Bovik 2012 (IEEE TIP 21(12)). The contrast is divided by its local deviation. (Asymmetric) generalised
Gaussians are fitted to it and to the products of neighbouring pixels, at two scales. The resulting 36 features are the
input of a support vector regression. This implementation is in torch: batched, on any device, differentiable.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from postgen.errors import UserError, is_whole, shown
from postgen.rewards.base import Clip, promptless, unfit
from postgen.rewards.frames import FrameReward
from postgen.rewards.pictures import luma

_SIDE, _SIGMA = 7, 7 / 6
_ALPHAS = (0.2, 10.0)
"""Smallest and largest shape parameter of a fitted distribution."""


@functools.cache
def constants() -> dict[str, Any]:
    """Load the published regression: `gamma`, `rho`, 770 `vectors` with `coefficients`, and the features' ranges.

    The values are those of LIVE (University of Texas at Austin), as distributed in the package `brisque` 0.2.0. The
    licence notice is in `data/NOTICE.md`.
    """
    path = Path(__file__).parent / "data" / "brisque.json"
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


class Regression(nn.Module):
    """Support vector regression with a Gaussian kernel over features scaled to [-1,1]."""

    least: Tensor
    greatest: Tensor
    vectors: Tensor
    coefficients: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("least", "greatest", "vectors", "coefficients"):
            self.register_buffer(name, torch.tensor(constants()[name]))

    def forward(self, features_N36: Tensor) -> Tensor:
        """Return the score (N,): about 0 for a clean picture, 100 for a bad one."""
        x = 2 * (features_N36 - self.least) / (self.greatest - self.least) - 1
        kernel = torch.exp(-constants()["gamma"] * torch.cdist(x, self.vectors).square())
        score: Tensor = kernel @ self.coefficients - constants()["rho"]
        return score


def contrasts(grey_NHW: Tensor) -> Tensor:
    """Return (grey - local mean) / (local deviation + 1/255); the border is padded with zeros."""
    place = torch.arange(_SIDE, device=grey_NHW.device, dtype=grey_NHW.dtype) - _SIDE // 2
    line = torch.exp(-place.square() / (2 * _SIGMA**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    mean, square = (conv2d(x[:, None], window, padding=_SIDE // 2)[:, 0] for x in (grey_NHW, grey_NHW.square()))
    deviation = ((mean.square() - square).abs() + 1e-12).sqrt()
    return (grey_NHW - mean) / (deviation + 1 / 255)


def neighbours(x_NHW: Tensor) -> list[Tensor]:
    """Return the products of each pixel with its right, lower and two diagonal neighbours."""
    return [
        x_NHW[:, :, :-1] * x_NHW[:, :, 1:],
        x_NHW[:, :-1] * x_NHW[:, 1:],
        x_NHW[:, :-1, :-1] * x_NHW[:, 1:, 1:],
        x_NHW[:, 1:, :-1] * x_NHW[:, :-1, 1:],
    ]


def _log_ratio(alpha: Tensor) -> Tensor:
    """Log of Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)); this function increases with a."""
    return 2 * torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)


def fitted_shape(ratio_N: Tensor) -> Tensor:
    """Return the shape parameter that has the given ratio of moments, by 50 bisection steps.

    The gradient is that of the inverse function.
    """
    target = ratio_N.clamp(min=1e-6).log()
    with torch.no_grad():
        low, high = (torch.full_like(target, edge) for edge in _ALPHAS)
        for _ in range(50):
            middle = (low + high) / 2
            above = _log_ratio(middle) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        alpha = (low + high) / 2
        slope = torch.digamma(1 / alpha) + 3 * torch.digamma(3 / alpha) - 4 * torch.digamma(2 / alpha)
        gain = torch.where((alpha > _ALPHAS[0] + 1e-3) & (alpha < _ALPHAS[1] - 1e-3), alpha.square() / slope, 0)
    return alpha + gain * (target - target.detach())


def fit(x_NHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit an asymmetric generalised Gaussian; return shape, mean, squared spread left and right of 0, each (N,)."""
    x = x_NHW.flatten(1)
    left = (x.square() * (x < 0)).sum(1) / (x < 0).sum(1).clamp(min=1)
    right = (x.square() * (x >= 0)).sum(1) / (x >= 0).sum(1).clamp(min=1)
    skew = (left / right.clamp(min=1e-12) + 1e-12).sqrt()
    moments = x.abs().mean(1).square() / x.square().mean(1).clamp(min=1e-12)
    alpha = fitted_shape(moments * (skew**3 + 1) * (skew + 1) / (skew.square() + 1).square())
    log_scale = (torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2
    spread = (right + 1e-12).sqrt() - (left + 1e-12).sqrt()
    mean = spread * torch.exp(log_scale + torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha))
    return alpha, mean, left, right


def features(grey_NHW: Tensor) -> Tensor:
    """Return the 36 features (N,36) of grey pictures in [0,1]: 18 at full size, 18 at half size."""
    found = []
    half = round(grey_NHW.shape[1] / 2), round(grey_NHW.shape[2] / 2)
    for grey in (grey_NHW, interpolate(grey_NHW[:, None], half, mode="bicubic", align_corners=False)[:, 0]):
        x = contrasts(grey)
        alpha, _, left, right = fit(x)
        found += [alpha, (left + right) / 2]
        for product in neighbours(x):
            found += fit(product)
    return torch.stack(found, 1)


@promptless
class Brisque(FrameReward):
    """1 - BRISQUE / 100: about 0.9 for clean natural pictures, 0.2 for blurred ones.

    BRISQUE was made for photographs and prefers texture: a policy trained on this reward may learn to add grain.

    Args:
        least: smallest shorter side in px; smaller clips get None. The statistics need about 128 px.
        frames, reduce, device, dtype: see `FrameReward`.
    """

    name = "brisque"

    def __init__(self, least: int = 128, **options: Any) -> None:
        super().__init__(**options)
        if not is_whole(least, 16):
            raise UserError(f"least must be at least 16 px, a whole number, got least={shown(least)}")
        self.least = least

    def build(self) -> nn.Module:
        """Build the regression from the published constants."""
        return Regression()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[Clip], *, log_reasons: Any = None
    ) -> list[float | None]:
        """Score clips of any size; clips that are too small get None."""
        if log_reasons is not None:
            log_reasons([unfit(clip, 1, self.least) for clip in completions])
        rows = [row for row, clip in enumerate(completions) if min(clip.shape[-2:]) >= self.least]
        found = super().__call__([prompts[row] for row in rows], [completions[row] for row in rows])
        scores: list[float | None] = [None] * len(completions)
        for row, score in zip(rows, found, strict=True):
            scores[row] = score
        return scores

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return 1 - score / 100, (B,K); always computed in float32."""
        grey = luma(frames_BK3HW.flatten(0, 1))
        raw: Tensor = self.net.float()(features(grey))
        return 1 - raw.view(frames_BK3HW.shape[:2]) / 100
