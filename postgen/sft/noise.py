"""Noise levels of supervised fine-tuning: their distribution, the schedule of the model, and weights of the loss.

A draw u in (0, 1) becomes a time t in (0, 1), and t becomes a noise level of the model:

    uniform        t = u
    logit_normal   t = sigmoid(mean + std * z), z the standard normal quantile of u (arXiv:2403.03206, eq. 19)
    mode           t = 1 - u - scale * (cos(pi u / 2)^2 - 1 + u)                    (arXiv:2403.03206, eq. 20)

For flow models the level is that of the pipeline's own schedule at t, shift included, or k t / (1 + (k - 1) t) with a
given shift k. For models with alpha-bar it is one of the N timesteps, (floor(N t) + 1) / N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Denoiser, ExpertDenoiser, PredictionType
from postgen.sampling.schedule import Levels
from postgen.sampling.seeds import seed_of
from postgen.settings import Part

Weighting = Literal["none", "cosmap", "sigma_sqrt", "min_snr"]

_TABLE = 1000
"""Steps of the pipeline's schedule in the table that maps times to noise levels."""
_TRIES = 1000
"""Draws until a level lies in the trained range; a range of a thousandth of all draws is still found."""
_LEAST = 1e-3
"""Smallest noise level in the weight `sigma_sqrt`, which is 1 / level^2."""
_DROPPED, _FRAMES, _LEVEL, _PER_FRAME = 1, 2, 3, 4
"""Purposes of the random numbers of a sample, beside its noise."""


@dataclass(kw_only=True)
class NoiseConfig(Part):
    """Settings of the noise levels, of the loss, and of dropped captions.

    Raises:
        UserError: a value is outside its range, or two settings exclude each other.
    """

    part: ClassVar[str] = "noise"

    noise_levels: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """Distribution of the noise levels before the shift: uniform; logit_normal, which prefers medium levels; mode,
    which prefers medium levels but keeps the ends."""

    logit_mean: float = 0.0
    """Mean of `logit_normal`; above 0 prefers high noise levels."""

    logit_std: float = 1.0
    """Standard deviation of `logit_normal`, above 0."""

    mode_scale: float = 1.29
    """Strength of `mode`, from -1 to 1.75; 0 is uniform."""

    noise_shift: float | None = None
    """Shift of the noise levels of a flow model, above 0; 1 is no shift. None uses the schedule of the pipeline, with
    `flow_shift` if that is given."""

    noise_min: float = 0.0
    """Smallest noise level that is trained, from 0 to 1."""

    noise_max: float = 1.0
    """Largest noise level that is trained, from 0 to 1."""

    train_experts: Literal["both", "high", "low"] = "both"
    """Networks of a model with two experts (Wan 2.2) that are trained: both, each at its noise levels; or only the
    expert of the high or of the low noise levels. Without experts only "both" is allowed."""

    frame_noise: Literal["clip", "first_frame", "each"] = "clip"
    """Noise levels of the frames of a clip: clip, one level for all; first_frame, the first latent frame stays clean
    and is not trained, as for image-to-video; each, an own level for each latent frame (diffusion forcing). The last
    two need a model that takes a noise level for each frame."""

    frame_noise_share: float = 1.0
    """Share of the clips to which `frame_noise` applies; the others have one level for all frames. From 0 to 1."""

    loss_weighting: Weighting = "none"
    """Weight of the loss at a noise level. none: 1. cosmap and sigma_sqrt (flow models): those of arXiv:2403.03206.
    min_snr: the clipped signal-to-noise ratio of arXiv:2303.09556, for all models."""

    snr_gamma: float = 5.0
    """Clip of the signal-to-noise ratio in `min_snr`, above 0."""

    caption_dropout: float = 0.1
    """Share of samples with an empty caption, which classifier-free guidance needs; from 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("logit_std", "snr_gamma"):
            self.require(getattr(self, name) > 0, name, "above 0")
        self.require(-1 <= self.mode_scale <= 1.75, "mode_scale", "from -1 to 1.75")
        self.require(self.noise_shift is None or self.noise_shift > 0, "noise_shift", "above 0")
        for name in ("noise_min", "noise_max", "frame_noise_share", "caption_dropout"):
            self.require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        self.require(self.noise_min < self.noise_max, "noise_max", f"above noise_min, {self.noise_min:g}")
        for used, names, other in (
            (self.noise_levels == "logit_normal", ("logit_mean", "logit_std"), "noise_levels: logit_normal"),
            (self.noise_levels == "mode", ("mode_scale",), "noise_levels: mode"),
            (self.loss_weighting == "min_snr", ("snr_gamma",), "loss_weighting: min_snr"),
            (self.frame_noise != "clip", ("frame_noise_share",), "frame_noise: first_frame or each"),
        ):
            for name in names:
                unchanged = getattr(self, name) == getattr(type(self), name)
                self.require(used or unchanged, name, f"left out without {other}")


class NoiseLevels:
    """Draws noise levels for a model. A draw depends on the seed and the number of the sample only.

    Args:
        args: settings.
        denoiser: the model.
        seed: seed of the run.

    Raises:
        UserError: the model does not support a setting.
    """

    def __init__(self, args: NoiseConfig, denoiser: Denoiser, seed: int) -> None:
        self.args, self.denoiser, self.seed = args, denoiser, seed
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self.low, self.high = args.noise_min, args.noise_max
        boundary = denoiser.expert_boundary if isinstance(denoiser, ExpertDenoiser) else None
        self._check(boundary)
        if args.train_experts == "high":
            self.low = max(self.low, boundary or 0.0)
        elif args.train_experts == "low":
            self.high = min(self.high, boundary or 1.0)
        if self.low >= self.high:
            raise UserError(
                f"noise_min {args.noise_min:g} and noise_max {args.noise_max:g} leave no level for the"
                f" {args.train_experts} expert, whose levels are on one side of {boundary:g}"
            )
        self._below = boundary is not None and args.train_experts == "low"

    def _check(self, boundary: float | None) -> None:
        args, denoiser = self.args, self.denoiser
        kind, name = denoiser.prediction_type, type(denoiser).__name__.removesuffix("Denoiser")
        if boundary is None and args.train_experts != "both":
            raise UserError(f"train_experts {args.train_experts}: {name} has one network, leave train_experts out")
        if kind != "flow" and args.noise_shift is not None:
            raise UserError(f"noise_shift is for flow models, but {name} predicts {kind}: leave noise_shift out")
        if kind != "flow" and args.loss_weighting in ("cosmap", "sigma_sqrt"):
            raise UserError(
                f"loss_weighting {args.loss_weighting} is for flow models, but {name} predicts {kind}: use min_snr or"
                " none"
            )
        if args.frame_noise == "clip":
            return
        if denoiser.frame_axis is None or not denoiser.per_frame:
            raise UserError(
                f"frame_noise {args.frame_noise}: {name} takes one noise level per clip, use frame_noise clip"
            )
        if boundary is not None:
            raise UserError(
                f"frame_noise {args.frame_noise}: an expert of {name} takes noise levels on one side of {boundary:g}"
                " only, use frame_noise clip"
            )

    def draw(self, places: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Draw the noise levels of samples, float64 on the CPU.

        Args:
            places: numbers of the samples, counted over the whole run.
            shape: shape of the latents of one sample, without the batch axis.

        Returns:
            (B,), or (B, T) for T latent frames with `frame_noise`.
        """
        frames = self._frames(shape)
        rows = torch.stack([self._one((place, _LEVEL), shape) for place in places])
        if self.args.frame_noise == "clip" or frames < 2:
            return rows
        rows = rows[:, None].repeat(1, frames)
        for row, place in enumerate(places):
            if self._chance(place, _FRAMES) >= self.args.frame_noise_share:
                continue
            if self.args.frame_noise == "first_frame":
                rows[row, 0] = 0.0
            else:
                own = [self._one((place, _PER_FRAME, frame), shape) for frame in range(frames)]
                rows[row] = torch.stack(own)
        return rows

    def dropped(self, places: Sequence[int]) -> Tensor:
        """Return for each sample whether its caption is dropped, (B,) bool."""
        return torch.tensor([self._chance(place, _DROPPED) < self.args.caption_dropout for place in places])

    def at(self, times: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the noise levels of the model, float64, for times in (0, 1) of any shape.

        Args:
            times: times; 1 is noise.
            shape: shape of the latents of one sample, on which the schedule of some models depends.
        """
        times = times.double()
        if self.denoiser.prediction_type != "flow":
            count = self.denoiser.timestep_scale
            return ((times * count).floor().clamp(0, count - 1) + 1) / count
        if self.args.noise_shift is not None:
            shift = self.args.noise_shift
            return shift * times / (1 + (shift - 1) * times)
        table = self._table(tuple(shape))
        place = (1 - times) * (len(table) - 1)
        left = place.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[left], table[left + 1], place - left)

    def levels(self, sigma: Tensor) -> Levels:
        """Return noise levels, (B,) or (B, T), with the alpha-bars of the model."""
        bar = None if self.denoiser.prediction_type == "flow" else self.denoiser.alpha_bar(sigma).double()
        none = sigma.new_zeros(())
        axis = self.denoiser.frame_axis
        return Levels(s=sigma, after=sigma, second=none, alpha_bar=bar, alpha_bar_after=bar, frame_axis=axis)

    def _one(self, index: tuple[int, ...], shape: Sequence[int]) -> Tensor:
        """Draw a level in the trained range: draws outside are repeated."""
        for attempt in range(_TRIES):
            level = self.at(self._time(self._chance(*index, attempt)), shape)
            if self.low <= float(level) <= self.high and not (self._below and float(level) >= self.high):
                return level
        raise UserError(
            f"noise_levels {self.args.noise_levels} draws no level from {self.low:g} to {self.high:g} in {_TRIES}"
            " draws: widen noise_min and noise_max, or use another distribution"
        )

    def _time(self, u: float) -> Tensor:
        args, draw = self.args, torch.tensor(u, dtype=torch.float64)
        if args.noise_levels == "logit_normal":
            return torch.sigmoid(args.logit_mean + args.logit_std * torch.special.ndtri(draw))
        if args.noise_levels == "mode":
            return 1 - draw - args.mode_scale * (torch.cos(torch.pi / 2 * draw) ** 2 - 1 + draw)
        return draw

    def _chance(self, *index: int) -> float:
        """Return a random number in (0, 1) for a sample and a purpose."""
        return (seed_of(self.seed, "forward", *index) // 2**10 + 0.5) / 2**53

    def _table(self, shape: tuple[int, ...]) -> Tensor:
        if shape not in self._tables:
            self._tables[shape] = self.denoiser.sigmas(_TABLE, shape).double().cpu()
        return self._tables[shape]

    def _frames(self, shape: Sequence[int]) -> int:
        axis = self.denoiser.frame_axis
        return 1 if axis is None else int(shape[axis - 1])


def loss_weight(levels: Levels, kind: PredictionType, weighting: Weighting, gamma: float) -> Tensor:
    """Return the weight of the squared error of a prediction at each noise level, of the shape of `levels.s`.

    `min_snr` is min(snr, gamma) times the squared error of the clean latents that belong to the prediction.

    Args:
        levels: noise levels.
        kind: prediction type of the model.
        weighting: the weighting; `cosmap` and `sigma_sqrt` are for flow models.
        gamma: clip of the signal-to-noise ratio.
    """
    s = levels.s.double()
    if weighting == "none":
        return torch.ones_like(s)
    if weighting == "cosmap":
        return 2 / (torch.pi * (1 - 2 * s + 2 * s**2))
    if weighting == "sigma_sqrt":
        return s.clamp(min=_LEAST) ** -2
    (a, b), _ = levels.mix()
    snr = (a / b) ** 2
    clipped = snr.clamp(max=gamma)
    found: dict[Any, Tensor] = {
        "flow": clipped * b**2,
        "v_prediction": clipped / (snr + 1),
        "epsilon": (gamma / snr).clamp(max=1),
        "sample": clipped,
    }
    # Clean latents (b = 0) have an infinite ratio, and a target that does not depend on noise.
    return torch.where(b == 0, torch.zeros_like(s), found[kind])
