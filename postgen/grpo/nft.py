"""DiffusionNFT (arXiv:2509.16117) and its relatives: reinforcement learning on the forward process.

A deterministic solver draws samples. Noise is then added to the finished samples x0, and the advantages of the samples
weight the errors of the policy's predictions for the noised samples. The methods need no log-probabilities, no
trajectories and no stochastic sampler. `forward_loss` chooses the loss; `forward_losses` has the formulas. The loss of
DiffusionNFT (eq. 9, 10), with the optimality o = clip(A / A_max, -1, 1) / 2 + 1/2 in [0, 1] of a sample, is

    v+ = beta v_new + (1 - beta) v_old        v- = (1 + beta) v_old - beta v_new
    loss = o |x0(v+) - x0|^2 / w+  +  (1 - o) |x0(v-) - x0|^2 / w-        w = mean |x0(v) - x0|, without gradient

where v_new and v_old are the predictions of the new and the old policy, and x0(v) the clean latents that v predicts.
The old policy is a moving average of the new one.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from postgen.sampling.solver import coarser
from postgen.sampling.transition import split
from postgen.training import TrainingConfig

from .cost import Work
from .forward_config import DiffusionNFTConfig
from .forward_groups import Beside
from .forward_losses import (
    awm_likelihood,
    awm_loss,
    crd_loss,
    dgpo_loss,
    dpo_loss,
    errors_of,
    implicit_reward,
    moded,
    nft_loss,
)
from .forward_policies import ForwardPolicies, Noised
from .group import Metrics
from .loss import velocity_kl

_LEAST_KL = 1e-4
"""`beta` that remains for the worst sample with `crd_adaptive_kl`, as in Flow-Factory's code."""


class DiffusionNFTTrainer(ForwardPolicies):
    """Trainer of DiffusionNFT: reinforcement learning on the forward process. `GroupTrainer` has the arguments.

    `forward_loss` replaces the loss of DiffusionNFT by that of AWM, CRD, DGPO or online DPO.
    """

    config_class: ClassVar[type[TrainingConfig]] = DiffusionNFTConfig

    def work(self) -> Work:
        """Return the passes for one sample: a deterministic rollout, then `train_timesteps` passes for each policy.

        If a group does not fit into a micro-batch, each update first computes the errors of all its samples without
        gradients, because the loss needs means over groups.
        """
        args, sampler = self.args, self.sampler
        steps = len(coarser(0, sampler.schedule.steps, sampler.how.fraction)) - 1
        base = int(args.compares_base)
        look = int(args.whole_groups and not self.groups.fit)
        references = base + int(args.beta > 0 or args.guarded) if look else int(self.needs_reference)
        likelihoods = 1 - 1 / (self.batches.updates * self.batches.iterations) if self._keeps_likelihoods else 0.0
        others = int(args.compares_old) + look + likelihoods
        return Work(
            rollout=sampler.passes * float(steps),
            trained=sampler.passes * float(args.train_timesteps),
            beside=others + references * self.reference_sampler.passes / sampler.passes,
            latents=1,
        )

    def learn(self, rows: Tensor, first_update: bool) -> tuple[Tensor, Metrics]:
        """Compute the loss of B buffer rows at `train_timesteps` random noise levels.

        This method runs the backward pass of all noise levels but the last, whose loss it returns.

        Args:
            rows: (B,) rows of the buffer.
            first_update: whether the policy has not changed since it drew these samples.
        """
        count = self.args.train_timesteps
        if self._keeps_likelihoods and self.micro % self.batches.per_rollout == 0:
            self._keep_likelihoods()
        if self.args.whole_groups and self.micro % self.batches.accumulation == 0:
            self._open_groups()
        losses: list[Tensor] = []
        for number in range(count):
            last = number == count - 1
            with nullcontext() if last else self.no_sync():  # the forward pass decides whether gradients are averaged
                loss, metrics = self._pass(rows, number, first_update)
                loss = loss / count
                if not last:
                    self.backward(loss)
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        return loss, {**metrics, "loss": total, "policy_loss": total, "nfe/train": float(self.sampler.passes * count)}

    def _pass(self, rows: Tensor, number: int, first_update: bool) -> tuple[Tensor, Metrics]:
        """Return loss and metrics of (B,) buffer rows at the `number`-th of their random noise levels."""
        args, noised = self.args, self._noised(rows, number)
        x, index, condition = noised.x, noised.index, noised.condition
        beside = self.groups.ahead(rows, number) if args.whole_groups else None
        # Predictions of the old, the reference and the new policy.
        old = self._old(x, index, condition) if args.compares_old and beside is None else None
        base = args.compares_base and beside is None
        reference = self._reference(x, index, condition) if args.beta or args.guarded or base else None
        with self.meter.training(self.sampler.passes * len(rows)):
            new = self.sampler.predict(x, index, condition)
            if args.whole_groups:
                if beside is None:
                    beside = self._beside(noised, new.detach(), old, reference)
                policy, metrics = self._grouped_loss(noised, new, beside)
            elif args.forward_loss == "awm":
                before = self._old_likelihoods(noised, old, first_update, number)
                policy, metrics = self._awm(noised, new, old, before)
            else:
                assert old is not None
                policy, metrics = self._nft(noised, new, old)
            loss = policy.mean() * (args.advantage_clip if args.forward_loss in ("nft", "crd") else 1.0)
        if reference is not None:
            held, measured = self._held(noised, new, reference)
            loss, metrics = loss + held, {**metrics, **measured}
        return loss, metrics

    def _held(self, noised: Noised, new: Tensor, reference: Tensor) -> tuple[Tensor | float, Metrics]:
        """Return the weighted difference from the reference policy, and the guards, with metrics."""
        args = self.args
        held: Tensor | float = 0.0
        metrics: Metrics = {}
        if args.beta:
            kl = velocity_kl(new, reference)
            metrics["kl"] = kl.detach().mean()
            if args.forward_loss == "crd" and args.crd_adaptive_kl:
                least = min(1.0, _LEAST_KL / args.beta)
                kl = kl * (least + (1 - least) * self._optimality(noised.advantages))
            held = held + args.beta * kl.mean()
        kind = self.sampler.schedule.prediction_type
        clean = (split(noised.x, each, noised.levels, kind)[0] for each in (new, reference))
        guard, measured = self.guards(new, reference, *clean)
        return held + guard, {**metrics, **measured}

    def _optimality(self, advantages: Tensor) -> Tensor:
        """Return the optimality (B,) of samples, in [0, 1]."""
        return (advantages / self.args.advantage_clip).clamp(-1, 1) / 2 + 0.5

    def _nft(self, noised: Noised, new: Tensor, old: Tensor) -> tuple[Tensor, Metrics]:
        args = self.args
        loss = nft_loss(
            noised.x,
            noised.clean,
            new,
            old,
            self._optimality(noised.advantages),
            noised.levels,
            args.nft_beta,
            self.sampler.schedule.prediction_type,
            args.nft_weight,
        )
        return loss, {"old_difference": velocity_kl(new.detach(), old).mean()}

    def _awm(self, noised: Noised, new: Tensor, old: Tensor | None, before: Tensor | None) -> tuple[Tensor, Metrics]:
        args = self.args
        now = self._likelihoods(noised, new)
        before = now.detach() if before is None else before
        advantages = noised.advantages * (args.awm_advantage_max / args.advantage_clip)
        found = awm_loss(now, before, advantages, args.awm_clip)
        metrics: Metrics = {**found.metrics()}
        loss = found.loss.float()
        if old is not None:
            difference = velocity_kl(new, old)
            metrics["old_difference"] = difference.detach().mean()
            loss = loss + args.awm_ema_beta * difference
        return loss, metrics

    def _likelihoods(self, noised: Noised, prediction: Tensor) -> Tensor:
        """Return the likelihoods (B,) of AWM, float64."""
        _, level = noised.levels.mix()[0]
        error = errors_of(prediction, noised.target).square
        return awm_likelihood(error, level, self.args.awm_weighting, self.args.awm_power)

    @property
    def _keeps_likelihoods(self) -> bool:
        """Whether AWM's likelihoods under the policy that drew a rollout are kept, for its later updates."""
        several = self.batches.updates * self.batches.iterations > 1
        return self.args.forward_loss == "awm" and not self.args.awm_off_policy and several

    @torch.no_grad()
    def _keep_likelihoods(self) -> None:
        """Compute AWM's likelihoods for all updates of a new rollout but the first, whose ratio is 1.

        They are kept as the log-probabilities of the buffer, which checkpoints hold: one column for each noise level
        of each pass over the rollout.
        """
        assert self.buffer is not None
        batches, count = self.batches, self.args.train_timesteps
        part = batches.per_device * batches.accumulation
        shape = len(self.buffer.samples), batches.iterations * count
        kept = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for ahead in range(1, batches.updates * batches.iterations):
            iteration, update = divmod(ahead, batches.updates)
            for rows in torch.arange(update * part, (update + 1) * part, device=self.device).split(batches.per_device):
                for number in range(count):
                    noised = self._noised(rows, number, ahead)
                    with self.meter.rollout(self.sampler.passes * len(rows)):
                        prediction = self.sampler.predict(noised.x, noised.index, noised.condition)
                    kept[rows, iteration * count + number] = self._likelihoods(noised, prediction)
        self.buffer.paths.log_probs = kept

    def _old_likelihoods(self, noised: Noised, old: Tensor | None, first_update: bool, number: int) -> Tensor | None:
        """Return AWM's likelihoods (B,) under the policy that drew the samples; None if it is unchanged."""
        assert self.buffer is not None
        if self.args.awm_off_policy:
            assert old is not None
            return self._likelihoods(noised, old)
        if first_update:
            return None
        iteration = self.micro % self.batches.per_rollout // self.batches.micro_batches
        return self.buffer.paths.log_probs[noised.rows, iteration * self.args.train_timesteps + number]

    def _grouped_loss(self, noised: Noised, new: Tensor, beside: Beside) -> tuple[Tensor, Metrics]:
        """Return the losses (B,) that compare the samples of a prompt, and metrics."""
        args, errors = self.args, errors_of(new, noised.target)
        metrics: Metrics = {} if beside.difference is None else {"old_difference": beside.difference.mean()}
        if args.forward_loss == "crd":
            assert beside.old is not None
            reward = implicit_reward(errors, beside.old)
            optimality = self.groups.centred(noised.rows) / (2 * args.advantage_clip)
            loss = crd_loss(reward, beside.mean, optimality, args.crd_beta)
            return loss.float(), {**metrics, "implicit_reward/abs_mean": reward.detach().abs().mean()}
        if args.forward_loss == "dpo":
            found = dpo_loss(errors.square, self.groups.side(noised.rows), beside.mean, args.dpo_beta)
            metrics["pair/accuracy"] = (beside.mean < 0).double().mean()
        else:
            old = None if beside.old is None else beside.old.square
            found = dgpo_loss(errors.square, old, noised.advantages, beside.mean, args.dgpo_beta, args.dgpo_clip)
            metrics["clip_ratio/region_mean"] = found.clipped.mean()
        metrics["group_weight/mean"] = found.weight.mean()
        metrics["group_weight/std"] = found.weight.std(correction=0)
        return found.loss.float(), metrics

    # Means over groups.

    def _open_groups(self) -> None:
        """Begin an update: centre its advantages; if groups do not fit into a micro-batch, compute their means."""
        assert self.buffer is not None
        args = self.args
        self.groups.open(self.micro, self.buffer, moded(self.buffer.advantages, args.adv_mode))
        for number in range(0 if self.groups.fit else args.train_timesteps):
            self.groups.add([self._looked(rows, number) for rows in self.groups.rows.split(self.batches.per_device)])

    @torch.no_grad()
    def _looked(self, rows: Tensor, number: int) -> Beside:
        """Return the errors of buffer rows before the update."""
        args, noised = self.args, self._noised(rows, number)
        x, index, condition = noised.x, noised.index, noised.condition
        old = self._old(x, index, condition) if args.compares_old else None
        reference = self._reference(x, index, condition) if args.compares_base else None
        with self.meter.rollout(self.sampler.passes * len(rows)):
            new = self.sampler.predict(x, index, condition)
        return self._beside(noised, new, old, reference)

    @torch.no_grad()
    def _beside(self, noised: Noised, new: Tensor, old: Tensor | None, reference: Tensor | None) -> Beside:
        """Return the errors of other policies, and the group means that the loss needs."""
        args, target = self.args, noised.target
        errors = errors_of(new, target)
        before = None if old is None else errors_of(old, target)
        if args.forward_loss == "crd":
            assert before is not None
            signal = implicit_reward(errors, before)
        else:
            base = old if reference is None or not args.compares_base else reference
            assert base is not None
            side = noised.advantages if args.forward_loss == "dgpo" else self.groups.side(noised.rows)
            signal = side * (errors.square - errors_of(base, target).square)
        mean = self.groups.mean(signal, noised.rows) if self.groups.fit else signal
        difference = None if old is None else velocity_kl(new, old)
        return Beside(old=before, difference=difference, mean=mean)


__all__ = ["DiffusionNFTConfig", "DiffusionNFTTrainer"]
