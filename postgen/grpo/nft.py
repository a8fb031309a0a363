"""DiffusionNFT (arXiv:2509.16117): reinforcement learning on the forward process.

A deterministic solver draws samples under an old policy. Noise is then added to the finished samples x0. The
optimality of a sample with advantage A is o = clip(A / A_max, -1, 1) / 2 + 1/2, in [0, 1]. The loss (eq. 9, 10) is

    v+ = beta v_new + (1 - beta) v_old        v- = (1 + beta) v_old - beta v_new
    loss = o |x0(v+) - x0|^2 / w+  +  (1 - o) |x0(v-) - x0|^2 / w-        w = mean |x0(v) - x0|, without gradient

where v_new and v_old are the predictions of the new and the old policy, and x0(v) the clean latents that v predicts.
The method needs no log-probabilities, no trajectories and no stochastic sampler. The old policy is a moving average of
the new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from postgen.families import PredictionType
from postgen.sampling.sampler import Sampling
from postgen.sampling.schedule import Levels
from postgen.sampling.seeds import normal, seed_of
from postgen.sampling.solver import coarser
from postgen.sampling.transition import split, wide
from postgen.training import TrainingConfig
from postgen.training.swap import WeightsCopy

from .config import GroupConfig
from .cost import Work
from .group import GroupTrainer, Metrics
from .loss import velocity_kl
from .numbers import PromptNumber, RolloutNumber, SampleNumber


@dataclass(kw_only=True)
class DiffusionNFTConfig(GroupConfig):
    """Settings of `DiffusionNFTTrainer`. The defaults are those of the published code.

    Raises:
        UserError: a value is outside its range.
    """

    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""

    nft_beta: float = 1.0
    """Distance of v+ and v- from the old policy, above 0; the beta of eq. 9 and 10 of arXiv:2509.16117."""

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
        self.require(self.nft_beta > 0, "nft_beta", "above 0")
        allowed = "false: with the same noise all samples of a prompt would be equal"
        self.require(not self.share_initial_noise, "share_initial_noise", allowed)
        self.require(self.beta >= 0, "beta", "at least 0")
        self.require(0 <= self.old_decay < 1, "old_decay", "in [0, 1)")
        self.require(self.old_decay_rate >= 0, "old_decay_rate", "at least 0")
        self.require(self.train_timesteps >= 1, "train_timesteps", "at least 1")


def nft_loss(
    x: Tensor,
    clean: Tensor,
    new: Tensor,
    old: Tensor,
    optimality: Tensor,
    levels: Levels,
    beta: float,
    prediction_type: PredictionType = "flow",
) -> Tensor:
    """Return the (B,) losses of noised samples; the module docstring has the formula.

    Args:
        x: (B, ...) noised latents.
        clean: (B, ...) clean latents of the samples.
        new: (B, ...) prediction of the new policy for `x`.
        old: (B, ...) prediction of the old policy for `x`.
        optimality: (B,) in [0, 1].
        levels: noise levels; `levels.s` (B,) is the level of `x`.
        beta: distance of v+ and v- from the old policy, above 0.
        prediction_type: what the policies predict.
    """
    parts = []
    for prediction in (beta * new + (1 - beta) * old, (1 + beta) * old - beta * new):
        error = split(x, prediction, levels, prediction_type)[0] - clean
        with torch.no_grad():
            weight = error.double().abs().flatten(1).mean(1).clamp_min(1e-5)
        parts.append(error.square().flatten(1).mean(1) / weight.to(error.dtype))
    return (optimality * parts[0] + (1 - optimality) * parts[1]) / beta


class DiffusionNFTTrainer(GroupTrainer[DiffusionNFTConfig]):
    """Trainer of DiffusionNFT: reinforcement learning on the forward process. `GroupTrainer` has the arguments."""

    config_class: ClassVar[type[TrainingConfig]] = DiffusionNFTConfig

    @property
    def needs_reference(self) -> bool:
        """Whether the loss contains the difference from the reference policy (`beta` above 0), or a guard."""
        return self.args.beta > 0 or super().needs_reference

    @property
    def copies(self) -> int:
        """Number of copies of the trained weights, including the old policy."""
        return super().copies + 1

    def work(self) -> Work:
        """Return the passes for one sample: a deterministic rollout, then `train_timesteps` passes for each policy."""
        sampler = self.sampler
        steps = len(coarser(0, sampler.schedule.steps, sampler.how.fraction)) - 1
        return Work(
            rollout=sampler.passes * float(steps),
            trained=sampler.passes * float(self.args.train_timesteps),
            beside=1 + int(self.needs_reference),
            latents=1,
        )

    def on_models_ready(self) -> None:
        """Initialise the old policy as a copy of the trained weights."""
        super().on_models_ready()
        self.old = WeightsCopy(self.policy.modules)

    def weight_copies(self) -> Mapping[str, WeightsCopy]:
        """Return the old policy, which checkpoints must hold."""
        return {"old": self.old}

    def sampling(self) -> Sampling:
        """Return the settings of rollouts: deterministic steps only."""
        args = self.args
        return Sampling(
            kind="ode",
            guidance=args.guidance_scale,
            solver=args.rollout_solver,
            fraction=args.rollout_solver_fraction,
            size=self.size,
        )

    def window_start(self, rollout: RolloutNumber, prompt: PromptNumber, sample: SampleNumber) -> int:
        """Return 0, because no step is stochastic."""
        return 0

    @contextmanager
    def rollout_policy(self) -> Iterator[None]:
        """Swap the weights of the old policy in while a rollout is drawn."""
        with self.old.swapped_in():
            yield

    def before_rollout(self) -> None:
        """Move the old policy towards the new one."""
        if self.global_step:
            self.old.blend(min(self.args.old_decay, self.args.old_decay_rate * self.global_step))

    def learn(self, rows: Tensor, first_update: bool) -> tuple[Tensor, Metrics]:
        """Compute the loss of B buffer rows at `train_timesteps` random noise levels.

        This method runs the backward pass of all noise levels but the last, whose loss it returns.

        Args:
            rows: (B,) rows of the buffer.
            first_update: not used here.
        """
        count = self.args.train_timesteps
        losses: list[Tensor] = []
        for number in range(count):
            loss, metrics = self._pass(rows, number)
            loss = loss / count
            losses.append(loss.detach())
            if number < count - 1:
                with self.no_sync():
                    self.backward(loss)
        total = torch.stack(losses).sum()
        return loss, {**metrics, "loss": total, "policy_loss": total, "nfe/train": float(self.sampler.passes * count)}

    def _pass(self, rows: Tensor, number: int) -> tuple[Tensor, Metrics]:
        """Return loss and metrics of (B,) buffer rows at the `number`-th of their random noise levels."""
        assert self.buffer is not None
        args, buffer, schedule = self.args, self.buffer, self.sampler.schedule
        clean, advantages = buffer.paths.clean[rows], buffer.advantages[rows]
        condition = self.conditions(buffer.number)([buffer.prompts[row] for row in rows.tolist()])
        # Seeds use the number of the update, not of the micro-batch, so that two processes draw the same noise as one
        # process with twice the accumulation.
        update = self.micro // self.batches.accumulation
        seeds = [seed_of(args.seed, "forward", update, number, buffer.samples[row]) for row in rows.tolist()]
        index = torch.tensor([seed % schedule.steps for seed in seeds], device=self.device)
        levels = schedule.levels(index, index + 1)
        # Noised samples, and the optimality of each sample.
        (a, b), _ = levels.mix()
        noise = normal(clean.shape[1:], seeds, self.device)
        x = wide(a, clean) * clean + wide(b, noise) * noise
        optimality = (advantages / args.advantage_clip).clamp(-1, 1) / 2 + 0.5
        # Predictions of the old, the reference and the new policy.
        with torch.no_grad(), self.meter.rollout(self.sampler.passes * len(rows)), self.old.swapped_in():
            old = self.sampler.predict(x, index, condition)
        reference = self._reference(x, index, condition) if self.needs_reference else None
        with self.meter.training(self.sampler.passes * len(rows)):
            new = self.sampler.predict(x, index, condition)
            policy = nft_loss(x, clean, new, old, optimality, levels, args.nft_beta, schedule.prediction_type)
            loss = policy.mean() * args.advantage_clip
        metrics: Metrics = {"old_difference": velocity_kl(new.detach(), old).mean()}
        if reference is not None and args.beta:
            kl = velocity_kl(new, reference).mean()
            loss, metrics["kl"] = loss + args.beta * kl, kl.detach()
        if reference is not None:
            estimates = (split(x, each, levels, schedule.prediction_type)[0] for each in (new, reference))
            guard, measured = self.guards(new, reference, *estimates)
            loss, metrics = loss + guard, {**metrics, **measured}
        return loss, metrics

    @torch.no_grad()
    def _reference(self, x: Tensor, index: Tensor, condition: Any) -> Tensor:
        with self.policy.reference(), self.meter.rollout(self.sampler.passes * len(x)):
            return self.sampler.predict(x, index, condition)
