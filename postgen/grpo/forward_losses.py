"""Losses of the forward process: a finished sample is noised, and its advantage A weights the error of a prediction.

Noise is added to the clean latents x0 of a sample, x = a x0 + b noise. u is the true prediction for x (noise - x0 for
a flow model), v the prediction of the policy, and e(v) = mean (v - u)^2. None of the losses needs log-probabilities
of steps, trajectories or a stochastic sampler. At v = v_old all have the same gradient, A omega grad e(v). They differ
in omega, and in the brake that acts once v has left v_old:

    loss   omega                                    brake
    nft    s / m, s^2 with weight "none"            v+ and v- are mixed with v_old
    awm    1 (uniform) or s (e + 1e-10)^(p - 1)     clip of the ratio, squared difference from v_old
    crd    1 / m                                    the target of the implicit reward is finite
    dgpo   1 / 2                                    sigmoid over the group, clip on one side
    dpo    beta times dgpo's, for two samples       sigmoid over the pair

s = b is the noise level of a flow model, m = mean |v - u|, p is `awm_power`. Weights, group means and everything of
other policies have no gradient. Functions take and return one value per row, (B,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from postgen.families import PredictionType
from postgen.sampling.schedule import Levels
from postgen.sampling.transition import split

from .loss import StepLoss, clipped_loss

NftWeight = Literal["adaptive", "none"]
AwmWeight = Literal["uniform", "ghuber"]
AdvMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]

_SMALLEST = 1e-5
"""Smallest mean absolute error that divides a squared error, as in the code of DiffusionNFT."""
_AWM_EPS = 1e-10
"""Added to e in AWM's power, as in its code: the power has an infinite slope at 0."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of B predictions, float64."""

    square: Tensor
    """(B,) e(v), the mean of (v - u)^2."""
    size: Tensor
    """(B,) mean of |v - u|, at least 1e-5, without gradient."""

    def rows(self, rows: Tensor) -> Errors:
        """Return the errors of some rows, (m,) row indices."""
        return Errors(self.square[rows], self.size[rows])


def errors_of(prediction: Tensor, target: Tensor) -> Errors:
    """Return the errors of predictions (B, ...) against the true predictions (B, ...), computed in float64."""
    difference = (prediction.double() - target.double()).flatten(1)
    return Errors(difference.square().mean(1), difference.detach().abs().mean(1).clamp_min(_SMALLEST))


def moded(advantages: Tensor, mode: AdvMode) -> Tensor:
    """Return the advantages (B,) that a loss uses, as `adv_mode` of the code of DiffusionNFT.

    `all` changes nothing; `positive_only` and `negative_only` set the others to 0; `one_only` gives 1 to positive
    advantages and 0 to the others; `binary` keeps the signs.
    """
    if mode == "positive_only":
        return advantages.clamp_min(0)
    if mode == "negative_only":
        return advantages.clamp_max(0)
    if mode == "one_only":
        return (advantages > 0).to(advantages.dtype)
    return advantages.sign() if mode == "binary" else advantages


def nft_loss(
    x: Tensor,
    clean: Tensor,
    new: Tensor,
    old: Tensor,
    optimality: Tensor,
    levels: Levels,
    beta: float,
    prediction_type: PredictionType = "flow",
    weighting: NftWeight = "adaptive",
) -> Tensor:
    """Return the losses of DiffusionNFT (arXiv:2509.16117, eq. 9 and 10), to be multiplied by `advantage_clip`.

    With v+ = beta v_new + (1 - beta) v_old, v- = (1 + beta) v_old - beta v_new, and the clean latents x0(v) that v
    predicts, the loss is (o |x0(v+) - x0|^2 / w+ + (1 - o) |x0(v-) - x0|^2 / w-) / beta. The weight is
    w = mean |x0(v) - x0|, or 1 with `weighting` "none". "none" is for few-step students (Astrolabe, arXiv:2603.17051):
    on their few, high noise levels the division makes the loss explode.

    Args:
        x: (B, ...) noised latents.
        clean: (B, ...) clean latents of the samples.
        new: (B, ...) prediction of the new policy for `x`.
        old: (B, ...) prediction of the old policy for `x`.
        optimality: (B,) o in [0, 1].
        levels: noise levels; `levels.s` (B,) is the level of `x`.
        beta: distance of v+ and v- from the old policy, above 0.
        prediction_type: what the policies predict.
        weighting: division of the squared errors.
    """
    parts = []
    for prediction in (beta * new + (1 - beta) * old, (1 + beta) * old - beta * new):
        error = split(x, prediction, levels, prediction_type)[0] - clean
        square = error.square().flatten(1).mean(1)
        if weighting == "adaptive":
            with torch.no_grad():
                weight = error.double().abs().flatten(1).mean(1).clamp_min(_SMALLEST)
            square = square / weight.to(error.dtype)
        parts.append(square)
    return (optimality * parts[0] + (1 - optimality) * parts[1]) / beta


def awm_likelihood(error: Tensor, level: Tensor, weighting: AwmWeight, power: float) -> Tensor:
    """Return what AWM uses as the log-likelihood of a sample: -e, or -s ((e + c)^p - c^p) / p with c = 1e-10.

    Args:
        error: (B,) e(v).
        level: (B,) factor b of the noise, the noise level s of a flow model.
        weighting: "uniform" for -e, "ghuber" for the power.
        power: p above 0; 1 gives -s e, 1/2 the square root of the code's "huber".
    """
    if weighting == "uniform":
        return -error
    powered: Tensor = (error + _AWM_EPS).pow(power) - _AWM_EPS**power
    return -level * powered / power


def awm_loss(likelihood: Tensor, old_likelihood: Tensor, advantage: Tensor, clip: float) -> StepLoss:
    """Return the losses of Advantage Weighted Matching (arXiv:2509.25050; the formula is that of the authors' code).

    The loss is max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = exp(l - l_old). The published clip of 1 hardly ever
    acts. A sample with a negative advantage has no lower bound of its likelihood within an update; only the squared
    difference from the old policy holds it (`awm_ema_beta`).

    Args:
        likelihood: (B,) l of `awm_likelihood` for the new policy.
        old_likelihood: (B,) the same for the policy that drew the samples, without gradient.
        advantage: (B,) A.
        clip: clip of the ratio, above 0.
    """
    return clipped_loss(likelihood - old_likelihood, advantage, clip, clip)


def implicit_reward(new: Errors, old: Errors) -> Tensor:
    """Return the implicit rewards (B,) of CRD, r = e(v_old) / m_old - e(v) / m, 0 at v = v_old."""
    return old.square / old.size - new.square / new.size


def crd_loss(implicit: Tensor, mean_implicit: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """Return the losses of Centered Reward Distillation (arXiv:2603.14128), to be multiplied by `advantage_clip`.

    The loss is (beta (r - mean r) - (o - mean o))^2 / beta. The means are over the samples of a prompt, so the
    normalising constant of the reward cancels. The formula is that of Flow-Factory's code with uniform centring,
    which takes its means over a gathered micro-batch instead of a prompt.

    Args:
        implicit: (B,) r of `implicit_reward`.
        mean_implicit: (B,) mean of r over the samples of the prompt, without gradient.
        optimality: (B,) o - mean o, where o = A / (2 advantage_clip) + 1/2.
        beta: scale of the implicit reward, above 0.
    """
    return (beta * (implicit - mean_implicit) - optimality).square() / beta


@dataclass(frozen=True, slots=True)
class GroupLoss:
    """Losses and weights of B rows."""

    loss: Tensor
    """(B,) loss to minimise."""
    weight: Tensor
    """(B,) weight W in (0, 1) of the row's group or pair."""
    clipped: Tensor
    """(B,) 1 where the clip has set the gradient to 0, else 0."""


def dgpo_loss(
    error: Tensor, old_error: Tensor | None, advantage: Tensor, preference: Tensor, beta: float, clip: float | None
) -> GroupLoss:
    """Return the losses of Direct Group Preference Optimization (arXiv:2510.08425; formula of the authors' code).

    The loss is W A e(v), with W = sigmoid(beta mean_group A (e(v) - e_ref)) without gradient. A row has no gradient
    where exp(e_old - e) has left 1 - clip..1 + clip on the side to which its advantage moves it.

    Args:
        error: (B,) e(v).
        old_error: (B,) e of the old policy; only the clip needs it.
        advantage: (B,) A.
        preference: (B,) mean of A (e(v) - e_ref) over the group of each row, without gradient.
        beta: scale of the preference, above 0.
        clip: clip of the ratio, above 0; None for no clip.
    """
    weight = torch.sigmoid(beta * preference)
    clipped = torch.zeros_like(error, dtype=torch.bool)
    if old_error is not None and clip is not None:
        ratio = (old_error - error.detach()).exp()
        clipped = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    loss = weight * advantage * torch.where(clipped, error.detach(), error)
    return GroupLoss(loss, weight, clipped.to(error.dtype))


def dpo_loss(error: Tensor, side: Tensor, margin: Tensor, beta: float) -> GroupLoss:
    """Return the losses of Diffusion-DPO (arXiv:2311.12908, eq. 14) for flow models, as in flow_grpo's code.

    The loss of a pair is -log sigmoid(-beta / 2 d), d = (e(v) - e_ref) of the better minus that of the worse sample.
    Each of its two rows has this value, and twice its own part of the gradient. The mean over rows is therefore the
    mean over pairs, also if the rows lie in different micro-batches.

    Args:
        error: (B,) e(v).
        side: (B,) 1 for the better sample of a pair, -1 for the worse, 0 for a pair of equal advantages, which has
            neither loss nor gradient.
        margin: (B,) d / 2, the mean of side (e(v) - e_ref) over the pair, without gradient.
        beta: scale of the preference, above 0.
    """
    weight = torch.sigmoid(beta * margin)
    loss = softplus(beta * margin) * side.abs() + beta * weight * side * (error - error.detach())
    return GroupLoss(loss, weight, torch.zeros_like(error))


def pairs_of_equal_motion(scores: Tensor, motion: Tensor, group: int) -> Tensor:
    """Select one pair of rows for each group: neighbours in motion whose scores differ most.

    The best and the worst sample of a group often differ in motion, and a preference between them teaches more or less
    of it. DenseDPO (arXiv:2506.03517) reports such a bias for pairs of independent noise; pairs of nearly equal motion
    cannot teach it.

    Args:
        scores: (N,) unclipped advantages, group by group; NaN for a sample without a score, which is left out unless
            its group has fewer than two others.
        motion: (N,) motion of the clips.
        group: number of rows of one prompt, at least 2.

    Returns:
        (2 N / group,) row numbers into `scores`, rising within each group.
    """
    last = motion.nan_to_num(torch.inf).masked_fill(scores.isnan(), torch.inf)
    order = last.view(-1, group).argsort(dim=1, stable=True)
    ranked = scores.view(-1, group).gather(1, order)
    best = (ranked[:, 1:] - ranked[:, :-1]).abs().nan_to_num(-1.0).argmax(1, keepdim=True)
    pair = torch.cat([order.gather(1, best), order.gather(1, best + 1)], dim=1).sort(dim=1).values
    return (pair + torch.arange(len(order), device=pair.device)[:, None] * group).flatten()
