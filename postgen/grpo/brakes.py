"""Brakes against drift and reward hacking, beside `beta`: a loss on clips, and two guards.

v and v_ref are the predictions of the policy and of the reference policy for the same noised latents, x0 and x0_ref
the clean latents that they imply, |.| the rms over the values of a sample, D the difference of neighbouring latent
frames. Every brake is a mean over samples that is added to the loss with its weight:

    data_beta       |v - target|^2 on noised clips: the loss of pretraining; DDRL (arXiv:2512.04332)
    norm_guard      max(0, |v| / |v_ref| - 1)^2
    temporal_guard  max(0, |log(|D x0| / |D x0_ref|)| - tau)^2, with 0.03^2 added to both squares |D x0|^2

NormGuard (arXiv:2606.27771) describes "a hinge penalty that activates only when |v| exceeds |v_ref|". We have not seen
its formula; the squared relative excess is ours, and so is `temporal_guard`. Both are 0 with a gradient of 0 while the
policy equals the reference. `brake_data` has the clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from postgen.errors import UserError, did_you_mean
from postgen.settings import Part

_STILL = 0.03
"""Differences of latent frames of this rms or less count as still; latents have a variance of about 1. At the highest
noise levels the estimate of clean latents is nearly the same in all frames, and a ratio of two such differences would
be noise."""


@dataclass(kw_only=True)
class BrakesConfig(Part):
    """Brakes against drift from the model before training and against reward hacking.

    Raises:
        UserError: a value is outside its range, or a setting has no effect without another one.
    """

    part: ClassVar[str] = "brakes"
    files: ClassVar[tuple[str, ...]] = ("data_source", "eval_data_source")

    data_beta: float = 0.0
    """Weight of the flow-matching loss on clips (DDRL, arXiv:2512.04332, whose published value is 0.01); 0 uses none.
    It costs one more training pass without guidance for each sample of an update."""

    data_source: str | None = None
    """Clips of `data_beta`: "world" (the same as None: renders of the training prompts), "samples" of the model before
    training, or a data set with the columns `prompt` and `video` (a file or a folder of frames). With "world", prompts
    that do not describe scenes of the synthetic world are refused."""

    data_clips: int = 512
    """Number of clips of `data_beta`, the first rows of their source. Only with `data_beta`. They are encoded once,
    kept in `output_dir`, and held in memory. Only "samples" draws several clips of a prompt if there are fewer
    prompts."""

    norm_guard: float = 0.0
    """Weight of the squared relative excess of the prediction's rms over that of the reference policy (after
    NormGuard, arXiv:2606.27771); 0 uses none. It costs one pass of the reference policy for each training pass."""

    temporal_guard: float = 0.0
    """Weight of the squared log-ratio of the differences between latent frames of the clean estimates of policy and
    reference policy; 0 uses none. It costs the same as `norm_guard`, and both together cost no more than one."""

    temporal_guard_tau: float = 0.1
    """Dead zone of `temporal_guard`: log-ratios between -tau and tau cost nothing. Only with `temporal_guard`."""

    eval_fm_clips: int = 0
    """Number of held-out clips on which evaluations measure the flow-matching loss (`eval_fm_loss`); 0: none."""

    eval_data_source: str | None = None
    """Source of the held-out clips, as `data_source`, with the prompts of `eval_dataset`. None uses `data_source`,
    which must not be a data set of videos then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data_beta", "norm_guard", "temporal_guard", "temporal_guard_tau", "eval_fm_clips"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require(self.data_clips >= 1, "data_clips", "at least 1")
        for name in ("data_source", "eval_data_source"):
            _check_source(name, getattr(self, name))
        for name, owner in (("data_clips", "data_beta"), ("temporal_guard_tau", "temporal_guard")):
            known = getattr(self, name) == getattr(type(self), name)
            self.require(known or getattr(self, owner) > 0, name, f"left out without {owner}")
        used = self.data_beta > 0 or self.eval_fm_clips > 0
        self.require(used or self.data_source is None, "data_source", "left out without data_beta and eval_fm_clips")
        needless = self.eval_data_source is None or self.eval_fm_clips > 0
        self.require(needless, "eval_data_source", "left out without eval_fm_clips")
        videos = self.eval_data_source is None and self.data_source not in (None, *MADE)
        if self.eval_fm_clips and videos:
            allowed = "given, with videos that are not trained on, if data_source is a data set"
            self.require(False, "eval_data_source", allowed)

    @property
    def guarded(self) -> bool:
        """Whether a guard compares the policy with the reference policy."""
        return self.norm_guard > 0 or self.temporal_guard > 0


MADE = ("world", "samples")
"""Values of `data_source` that are not data sets."""


def _check_source(name: str, source: str | None) -> None:
    """Refuse a mistyped word, which would be searched on the Hub."""
    near = "" if source is None or source in MADE or Path(source).exists() else did_you_mean(source, MADE)
    if near:
        raise UserError(f"{name} is {source!r}, it must be {' or '.join(MADE)}, or a data set.{near}")


def norm_ratio(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return the (B,) ratios |v| / |v_ref| of the rms of two predictions (B, ...)."""
    return (_square(prediction) / _square(reference)).sqrt()


def temporal_log_ratio(clean: Tensor, reference: Tensor, frame_axis: int) -> Tensor:
    """Return the (B,) values log(|D x0| / |D x0_ref|) of two estimates of clean latents.

    0.03^2 is added to both squares, so that two still clips have the ratio 1.

    Args:
        clean: (B, ...) estimate of the policy.
        reference: (B, ...) estimate of the reference policy.
        frame_axis: axis of the latent frames, of which there are at least 2.
    """
    own, other = (_square(latents.diff(dim=frame_axis)) for latents in (clean, reference))
    return ((own + _STILL**2).log() - (other + _STILL**2).log()) / 2


def norm_excess(ratio_B: Tensor) -> Tensor:
    """Return the (B,) losses of `norm_guard` for ratios |v| / |v_ref|."""
    return (ratio_B - 1).relu().square()


def beyond(log_ratio_B: Tensor, dead_zone: float) -> Tensor:
    """Return the (B,) squares of the parts of log-ratios that lie outside [-dead_zone, dead_zone]."""
    return (log_ratio_B.abs() - dead_zone).relu().square()


class Guards:
    """The guards of a run.

    Args:
        config: their weights.
        frame_axis: axis of the latent frames in (B, ...); None for images.
        frames: number of latent frames.

    Raises:
        UserError: `temporal_guard` for latents without at least two frames.
    """

    def __init__(self, config: BrakesConfig, frame_axis: int | None, frames: int) -> None:
        self.config = config
        self.frame_axis = frame_axis if frames > 1 else None
        if config.temporal_guard and self.frame_axis is None:
            said = "images have no frames" if frame_axis is None else "these clips have one latent frame"
            raise UserError(f"temporal_guard compares latent frames, but {said}: leave it out, or train longer clips")

    def __call__(
        self, prediction: Tensor, reference: Tensor, clean: Tensor, clean_reference: Tensor
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Return the weighted loss of the guards (0.0 without guards), and metrics.

        Args:
            prediction: (B, ...) prediction of the policy.
            reference: (B, ...) prediction of the reference policy.
            clean: (B, ...) clean latents that `prediction` implies.
            clean_reference: (B, ...) clean latents that `reference` implies.
        """
        config = self.config
        total: Tensor | float = 0.0
        ratio = norm_ratio(prediction if config.norm_guard else prediction.detach(), reference)
        metrics: dict[str, Tensor] = {"norm_ratio": ratio.detach().mean()}
        if config.norm_guard:
            part = norm_excess(ratio).mean()
            total, metrics["norm_guard"] = total + config.norm_guard * part, part.detach()
        if self.frame_axis is not None:
            clean = clean if config.temporal_guard else clean.detach()
            change = temporal_log_ratio(clean, clean_reference, self.frame_axis)
            metrics["temporal_ratio"] = change.detach().mean().exp()
            if config.temporal_guard:
                part = beyond(change, config.temporal_guard_tau).mean()
                total, metrics["temporal_guard"] = total + config.temporal_guard * part, part.detach()
        return total, metrics


def _square(values: Tensor) -> Tensor:
    return values.square().flatten(1).mean(1)


__all__ = ["MADE", "BrakesConfig", "Guards", "beyond", "norm_excess", "norm_ratio", "temporal_log_ratio"]
