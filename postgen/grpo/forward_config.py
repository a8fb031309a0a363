"""Settings of `DiffusionNFTTrainer`: the losses of the forward process, and the old policies that they need."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Literal

from postgen.families.video_calls import RANGES
from postgen.settings import Part

from .config import GroupConfig
from .forward_losses import AdvMode, AwmWeight, NftWeight

ForwardLoss = Literal["nft", "awm", "crd", "dgpo", "dpo"]

GROUPED: tuple[ForwardLoss, ...] = ("crd", "dgpo", "dpo")
"""Losses that compare the samples of a prompt, so that an update must hold whole groups."""
_OWNER: dict[str, ForwardLoss] = {
    "nft": "nft",
    "awm": "awm",
    "crd": "crd",
    "dgpo": "dgpo",
    "dpo": "dpo",
    "pair": "dpo",
}
"""First word of a field -> the only loss that uses the field."""


@dataclass(frozen=True, slots=True)
class Decay:
    """Decay of a copy of the weights that follows them: copy = decay * copy + (1 - decay) * weights."""

    wait: int
    """Updates before which the decay is 0, so that the copy equals the weights."""
    first: float
    """Decay after `wait` updates."""
    rate: float
    """Rise of the decay per update."""
    most: float
    """Largest decay."""

    def at(self, step: int) -> float:
        """Return the decay after `step` updates."""
        return 0.0 if step < self.wait else min(self.most, self.first + self.rate * (step - self.wait))


DECAY_TYPES: dict[int, Decay] = {0: Decay(0, 0, 0, 0), 1: Decay(0, 0, 0.001, 0.5), 2: Decay(75, 0, 0.0075, 0.999)}
"""`decay_type` of the code of DiffusionNFT (NVlabs/DiffusionNFT, `return_decay`)."""


@dataclass(kw_only=True)
class ForwardConfig(Part):
    """Settings of the losses of the forward process, without those of the rollout.

    The defaults of a loss's own settings are published values.

    Raises:
        UserError: a value is outside its range, or belongs to another loss than `forward_loss`.
    """

    forward_loss: ForwardLoss = "nft"
    """Loss: DiffusionNFT (nft, arXiv:2509.16117), Advantage Weighted Matching (awm, 2509.25050), Centered Reward
    Distillation (crd, 2603.14128), Direct Group Preference Optimization (dgpo, 2510.08425) or online Diffusion-DPO
    (dpo, 2311.12908)."""

    forward_noise: Literal["auto", "group", "sample"] = "auto"
    """Noise and noise level of the noised samples: one draw for each group or for each sample. "auto": as published,
    group for dgpo and dpo, sample for the others."""

    adv_mode: AdvMode = "all"
    """Advantages that the loss uses: all; positive_only or negative_only (the others count as 0); one_only (1 for
    positive ones, 0 for the others); binary (their signs)."""

    timestep_fraction: float = 1.0
    """Share of the rollout's noise levels that training draws from, the noisiest first, in (0, 1]."""

    old_decay_type: int | None = None
    """Decay of the old policy as in the code of DiffusionNFT: 0: none; 1: the ramp 0.001 up to 0.5; 2: none for 75
    updates, then the ramp 0.0075 up to 0.999. None uses `old_decay` and `old_decay_rate`."""

    nft_beta: float = 1.0
    """Distance of v+ and v- from the old policy, above 0; the beta of eq. 9 and 10 of arXiv:2509.16117."""

    nft_weight: NftWeight = "adaptive"
    """Division of NFT's squared errors by the mean absolute error: "adaptive" as published; "none" for students of few
    steps (Astrolabe, arXiv:2603.17051), whose high noise levels would make the loss explode."""

    awm_weighting: AwmWeight = "ghuber"
    """Likelihood of AWM: the negative error ("uniform"), or the noise level times a power of the error ("ghuber")."""

    awm_power: float = 0.25
    """Power of "ghuber", above 0."""

    awm_clip: float = 1.0
    """Clip of AWM's probability ratio to 1 - awm_clip .. 1 + awm_clip. The published 1 hardly ever acts."""

    awm_advantage_max: float = 1.0
    """Largest absolute advantage in AWM's loss: advantages are multiplied by awm_advantage_max / advantage_clip."""

    awm_ema_beta: float = 1.0
    """Weight of the mean square difference between the predictions of the policy and of the old policy."""

    awm_off_policy: bool = False
    """Let the old policy draw the rollouts, and use its likelihood in the ratio. As published (false), the policy
    itself draws them, and the ratio is 1 in the first update after a rollout. For later updates the likelihoods are
    computed before the first one, in an extra pass."""

    crd_beta: float = 1.0
    """Scale of CRD's implicit reward, above 0."""

    crd_decay: float = 0.999
    """Largest decay of the policy that CRD's implicit reward is relative to, in [0, 1). It is separate from the old
    policy, which draws the rollouts (`old_decay_type`, published 2)."""

    crd_decay_first: float = 0.25
    """Decay of that policy at the first update."""

    crd_decay_rate: float = 0.005
    """Rise of that decay per update."""

    crd_kl_guidance: float = 4.5
    """Guidance scale of the reference policy in CRD's divergence (`beta`); values up to 1 disable guidance."""

    crd_adaptive_kl: bool = True
    """Weight CRD's divergence by (A / advantage_clip + 1) / 2: the better a sample, the more it is held. The weight of
    the worst sample is that of beta 1e-4."""

    dgpo_beta: float = 100.0
    """Scale of DGPO's group preference, above 0."""

    dgpo_clip: float | None = 0.05
    """A sample has no gradient once its ratio to the old policy exceeds 1 + dgpo_clip (positive advantage) or falls
    below 1 - dgpo_clip. None: no clip, which saves a pass."""

    dgpo_reference: Literal["base", "old"] = "base"
    """Policy that DGPO's preference is relative to: the reference policy, or the old policy."""

    dgpo_old_after: int = 200
    """Updates after which the old policy draws DGPO's rollouts; before, the policy itself draws them."""

    dpo_beta: float = 100.0
    """Scale of DPO's preference, above 0."""

    pair_by: Literal["reward", "motion"] = "reward"
    """Pair of DPO: "reward" takes the best and the worst sample of a group; "motion" orders the group by motion, and
    takes the neighbours whose advantages differ most, so that the preference does not select motion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in changed(self, *(item.name for item in fields(ForwardConfig))):
            owner = _OWNER.get(name.partition("_")[0])
            mine = owner in (None, self.forward_loss)
            self.require(mine, name, f"left out: only forward_loss {owner} uses it, not {self.forward_loss}")
        self.require(0 < self.timestep_fraction <= 1, "timestep_fraction", "in (0, 1]")
        known = self.old_decay_type is None or self.old_decay_type in DECAY_TYPES
        self.require(known, "old_decay_type", "0, 1 or 2")
        for name in ("nft_beta", "awm_power", "awm_clip", "awm_advantage_max", "crd_beta", "dgpo_beta", "dpo_beta"):
            self.require(getattr(self, name) > 0, name, "above 0")
        self.require(self.dgpo_clip is None or self.dgpo_clip > 0, "dgpo_clip", "above 0")
        for name in ("awm_ema_beta", "crd_decay_rate", "dgpo_old_after"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("crd_decay", "crd_decay_first"):
            self.require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        self.require_in(RANGES["guidance_scale"], "crd_kl_guidance")
        if self.forward_loss == "dpo":
            self.require(self.forward_noise != "sample", "forward_noise", "group: dpo compares samples at one noise")
            self.require(self.adv_mode == "all", "adv_mode", "all: dpo only uses which sample of a pair is better")

    @property
    def shares_noise(self) -> bool:
        """Whether the samples of a group share noise and noise level."""
        if self.forward_noise == "auto":
            return self.forward_loss in ("dgpo", "dpo")
        return self.forward_noise == "group"

    @property
    def whole_groups(self) -> bool:
        """Whether an update must hold whole groups, because the loss compares the samples of a prompt."""
        return self.forward_loss in GROUPED

    @property
    def has_old(self) -> bool:
        """Whether the loss or the rollouts use an old policy, a copy of the weights."""
        if self.forward_loss == "awm":
            return self.awm_off_policy or self.awm_ema_beta > 0
        return self.forward_loss != "dpo"

    @property
    def compares_old(self) -> bool:
        """Whether each pass of the loss needs a pass of the old policy (CRD: of the policy that it is relative to)."""
        if self.forward_loss == "dgpo":
            return self.dgpo_clip is not None or self.dgpo_reference == "old"
        return self.has_old

    @property
    def compares_base(self) -> bool:
        """Whether the loss itself needs the reference policy, besides `beta`."""
        return self.forward_loss == "dpo" or (self.forward_loss == "dgpo" and self.dgpo_reference == "base")

    @property
    def anchor_decay(self) -> Decay:
        """Decay of the policy that CRD's implicit reward is relative to."""
        return Decay(0, self.crd_decay_first, self.crd_decay_rate, self.crd_decay)


@dataclass(kw_only=True)
class DiffusionNFTConfig(ForwardConfig, GroupConfig):
    """Settings of `DiffusionNFTTrainer`. The defaults are those of the published code of DiffusionNFT.

    Raises:
        UserError: a value is outside its range, or has no effect with the chosen loss.
    """

    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""

    share_initial_noise: bool = False
    """Must be false. The sampler has no stochastic step, so samples with the same initial noise would be equal."""

    beta: float = 1e-4
    """Weight of the mean square difference between the predictions of the policy and of the reference policy, which
    is the same as for DanceGRPO."""

    old_decay: float = 0.5
    """Maximum decay of the old policy, in [0, 1). Between two rollouts, old = decay * old + (1 - decay) * new."""

    old_decay_rate: float = 0.001
    """Ramp of the decay: decay = min(old_decay, old_decay_rate * optimiser steps done)."""

    train_timesteps: int = 1
    """Number of noise levels that each sample is trained at, drawn from the noise levels of the rollout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "false: with the same noise all samples of a prompt would be equal"
        self.require(not self.share_initial_noise, "share_initial_noise", allowed)
        self.require(self.beta >= 0, "beta", "at least 0")
        self.require(0 <= self.old_decay < 1, "old_decay", "in [0, 1)")
        self.require(self.old_decay_rate >= 0, "old_decay_rate", "at least 0")
        self.require(self.train_timesteps >= 1, "train_timesteps", "at least 1")
        fits = not self.guarded or self.reference_guidance == self.guidance_scale
        for name in ("norm_guard", "temporal_guard"):
            allowed = (
                f"0 unless crd_kl_guidance is {self.guidance_scale:g}, like guidance_scale: a guard compares "
                "predictions of the same guidance"
            )
            self.require(fits or not getattr(self, name), name, allowed)
        for name in changed(self, "old_decay", "old_decay_rate", "old_decay_type"):
            self.require(self.has_old, name, f"left out: this form of {self.forward_loss} has no old policy")
            alone = name == "old_decay_type" or self.old_decay_type is None
            self.require(alone, name, f"left out: old_decay_type {self.old_decay_type} sets it")
        moves = self.num_frames != 1 or self.pair_by == "reward"
        self.require(moves, "pair_by", "reward with num_frames: 1: images have no motion")
        if self.forward_loss == "dpo" and self.kept != 2:
            self.require(False, "best_of_n", "2 with forward_loss dpo, which trains on pairs")

    @property
    def old_policy_decay(self) -> Decay:
        """Decay of the old policy."""
        kind = self.old_decay_type
        return Decay(0, 0, self.old_decay_rate, self.old_decay) if kind is None else DECAY_TYPES[kind]

    @property
    def reference_guidance(self) -> float:
        """Guidance scale of the reference policy: that of the policy, or `crd_kl_guidance`."""
        return self.crd_kl_guidance if self.forward_loss == "crd" and self.beta else self.guidance_scale


def changed(config: Part, *names: str) -> list[str]:
    """Return the fields among `names` whose values differ from their defaults in the class of `config`."""
    defaults = {item.name: item.default for item in fields(config) if item.default is not MISSING}
    return [name for name in names if getattr(config, name) != defaults[name]]
