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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Condition
from postgen.sampling.sampler import Sampler, Sampling
from postgen.sampling.schedule import Levels
from postgen.sampling.seeds import normal, seed_of
from postgen.sampling.solver import coarser
from postgen.sampling.transition import wide
from postgen.training import TrainingConfig
from postgen.training.swap import WeightsCopy

from .advantages import Advantages
from .cost import Work
from .forward_config import Decay, DiffusionNFTConfig
from .forward_groups import Beside, UpdateGroups
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
    pairs_of_equal_motion,
    true_prediction,
)
from .group import GroupTrainer, Metrics
from .loss import velocity_kl
from .numbers import PromptNumber, RolloutNumber, SampleNumber
from .quality import clip_statistics
from .scoring import gathered

_LEAST_KL = 1e-4
"""`beta` that remains for the worst sample with `crd_adaptive_kl`, as in Flow-Factory's code."""


@dataclass(frozen=True, slots=True)
class Noised:
    """B noised samples."""

    rows: Tensor
    """(B,) rows of the buffer."""
    clean: Tensor
    """(B, ...) clean latents."""
    x: Tensor
    """(B, ...) noised latents."""
    target: Tensor
    """(B, ...) true prediction for `x`."""
    index: Tensor
    """(B,) step indices of the noise levels."""
    levels: Levels
    """Noise levels of `x`."""
    condition: Condition
    """Condition of the B rows."""
    advantages: Tensor
    """(B,) advantages after `adv_mode`."""


class DiffusionNFTTrainer(GroupTrainer[DiffusionNFTConfig]):
    """Trainer of DiffusionNFT: reinforcement learning on the forward process. `GroupTrainer` has the arguments.

    `forward_loss` replaces the loss of DiffusionNFT by that of AWM, CRD, DGPO or online DPO.
    """

    config_class: ClassVar[type[TrainingConfig]] = DiffusionNFTConfig

    def prepare(self) -> None:
        """Set up the groups of an update and the reference policy, and check what needs the loaded model."""
        args = self.args
        self.groups = UpdateGroups(self.batches, self.accelerator)
        sampler = self.sampler
        guided = replace(sampler.how, guidance=args.reference_guidance)
        self.reference_sampler = Sampler(sampler.denoiser, sampler.schedule, guided, self.meter, self.device)
        moves = args.pair_by == "reward" or self.size["num_frames"] > 1
        args.require(moves, "pair_by", "reward for pictures: they have no motion")
        if args.compares_base and self.policy.copies_reference and args.init_from:
            raise UserError(
                f"init_from with forward_loss {args.forward_loss}: the reference policy would not have the weights of"
                " init_from. Give a pipeline folder with these weights as model (or their LoRA as lora_path)"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss contains the reference policy, itself or through `beta`."""
        return self.args.beta > 0 or self.args.compares_base

    @property
    def copies(self) -> int:
        """Number of copies of the trained weights, including the old policies."""
        return super().copies + len(self._decays())

    def work(self) -> Work:
        """Return the passes for one sample: a deterministic rollout, then `train_timesteps` passes for each policy.

        If a group does not fit into a micro-batch, each update first computes the errors of all its samples without
        gradients, because the loss needs means over groups.
        """
        args, sampler = self.args, self.sampler
        steps = len(coarser(0, sampler.schedule.steps, sampler.how.fraction)) - 1
        base = int(args.compares_base)
        look = int(args.whole_groups and not self.groups.fit)
        references = base + int(args.beta > 0) if look else int(self.needs_reference)
        return Work(
            rollout=sampler.passes * float(steps),
            trained=sampler.passes * float(args.train_timesteps),
            beside=int(args.compares_old) + look + references * self.reference_sampler.passes / sampler.passes,
            latents=1,
        )

    def on_models_ready(self) -> None:
        """Initialise the old policies as copies of the trained weights."""
        super().on_models_ready()
        self.old = {name: WeightsCopy(self.policy.modules) for name in self._decays()}

    def weight_copies(self) -> Mapping[str, WeightsCopy]:
        """Return the old policies, which checkpoints must hold."""
        return self.old

    def _decays(self) -> dict[str, Decay]:
        """Return the decay of each old policy: "old", and for CRD the "anchor" of the implicit reward."""
        args = self.args
        found = {"old": args.old_policy_decay} if args.has_old else {}
        return found | ({"anchor": args.anchor_decay} if args.forward_loss == "crd" else {})

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
        """Swap the weights of the old policy in while a rollout is drawn, if it draws the rollouts."""
        args = self.args
        old = args.has_old
        if args.forward_loss == "awm":
            old = args.awm_off_policy
        elif args.forward_loss == "dgpo":
            old = self.global_step > args.dgpo_old_after
        with self.old["old"].swapped_in() if old else nullcontext():
            yield

    def before_rollout(self) -> None:
        """Move the old policies towards the new one."""
        for name, decay in self._decays().items() if self.global_step else ():
            self.old[name].blend(decay.at(self.global_step))

    def choose(self, advantages: Advantages, clips: Sequence[Tensor]) -> Tensor:
        """Return the sample numbers to train on: the best and worst of each group, or a pair of equal motion."""
        if self.args.pair_by == "reward":
            return super().choose(advantages, clips)
        motion = torch.tensor([[clip_statistics(clip)["motion"]] for clip in clips])
        everyone = gathered(motion, self.batches.mine(), self.batches.samples, self.global_step + 1)[:, 0]
        return pairs_of_equal_motion(advantages.unclipped, everyone, self.batches.group)

    def learn(self, rows: Tensor, first_update: bool) -> tuple[Tensor, Metrics]:
        """Compute the loss of B buffer rows at `train_timesteps` random noise levels.

        This method runs the backward pass of all noise levels but the last, whose loss it returns.

        Args:
            rows: (B,) rows of the buffer.
            first_update: not used here.
        """
        count = self.args.train_timesteps
        if self.args.whole_groups and self.micro % self.batches.accumulation == 0:
            self._open_groups()
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

    def _noised(self, rows: Tensor, number: int) -> Noised:
        """Return (B,) buffer rows, noised to the `number`-th of their random noise levels."""
        assert self.buffer is not None
        args, buffer, schedule = self.args, self.buffer, self.sampler.schedule
        clean = buffer.paths.clean[rows]
        prompts = [buffer.prompts[row] for row in rows.tolist()]
        samples = [buffer.samples[row] for row in rows.tolist()]
        # Seeds use the number of the update, not of the micro-batch, so that two processes draw the same noise as one
        # process with twice the accumulation.
        update = self.micro // self.batches.accumulation
        seeds = [
            seed_of(args.seed, "forward", update, number, one) for one in (prompts if args.shares_noise else samples)
        ]
        drawn = max(1, int(args.timestep_fraction * schedule.steps))
        index = torch.tensor([seed % drawn for seed in seeds], device=self.device)
        levels = schedule.levels(index, index + 1)
        noise = normal(clean.shape[1:], seeds, self.device)
        (a, b), _ = levels.mix()
        a, b = wide(a, clean), wide(b, noise)
        return Noised(
            rows=rows,
            clean=clean,
            x=a * clean + b * noise,
            target=true_prediction(clean, noise, (a, b), schedule.prediction_type),
            index=index,
            levels=levels,
            condition=self.conditions(buffer.number)(prompts),
            advantages=moded(buffer.advantages[rows], args.adv_mode),
        )

    def _pass(self, rows: Tensor, number: int) -> tuple[Tensor, Metrics]:
        """Return loss and metrics of (B,) buffer rows at the `number`-th of their random noise levels."""
        args, noised = self.args, self._noised(rows, number)
        x, index, condition = noised.x, noised.index, noised.condition
        beside = self.groups.ahead(rows, number) if args.whole_groups else None
        # Predictions of the old, the reference and the new policy.
        old = self._old(x, index, condition) if args.compares_old and beside is None else None
        base = args.compares_base and beside is None
        reference = self._reference(x, index, condition) if args.beta or base else None
        with self.meter.training(self.sampler.passes * len(rows)):
            new = self.sampler.predict(x, index, condition)
            if args.whole_groups:
                if beside is None:
                    beside = self._beside(noised, new.detach(), old, reference)
                policy, metrics = self._grouped_loss(noised, new, beside)
            elif args.forward_loss == "awm":
                policy, metrics = self._awm(noised, new, old)
            else:
                assert old is not None
                policy, metrics = self._nft(noised, new, old)
            loss = policy.mean() * (args.advantage_clip if args.forward_loss in ("nft", "crd") else 1.0)
        if reference is not None and args.beta:
            kl = velocity_kl(new, reference)
            metrics["kl"] = kl.detach().mean()
            if args.forward_loss == "crd" and args.crd_adaptive_kl:
                least = min(1.0, _LEAST_KL / args.beta)
                kl = kl * (least + (1 - least) * self._optimality(noised.advantages))
            loss = loss + args.beta * kl.mean()
        return loss, metrics

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

    def _awm(self, noised: Noised, new: Tensor, old: Tensor | None) -> tuple[Tensor, Metrics]:
        args = self.args
        _, level = noised.levels.mix()[0]

        def likelihood(prediction: Tensor) -> Tensor:
            error = errors_of(prediction, noised.target).square
            return awm_likelihood(error, level, args.awm_weighting, args.awm_power)

        now = likelihood(new)
        before = likelihood(old) if args.awm_off_policy and old is not None else now.detach()
        advantages = noised.advantages * (args.awm_advantage_max / args.advantage_clip)
        found = awm_loss(now, before, advantages, args.awm_clip)
        metrics: Metrics = {**found.metrics()}
        loss = found.loss.float()
        if old is not None:
            difference = velocity_kl(new, old)
            metrics["old_difference"] = difference.detach().mean()
            loss = loss + args.awm_ema_beta * difference
        return loss, metrics

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

    # Passes of other policies.

    @torch.no_grad()
    def _old(self, x: Tensor, index: Tensor, condition: Condition) -> Tensor:
        copy = self.old["anchor" if self.args.forward_loss == "crd" else "old"]
        with self.meter.rollout(self.sampler.passes * len(x)), copy.swapped_in():
            return self.sampler.predict(x, index, condition)

    @torch.no_grad()
    def _reference(self, x: Tensor, index: Tensor, condition: Condition) -> Tensor:
        sampler = self.reference_sampler
        with self.policy.reference(), self.meter.rollout(sampler.passes * len(x)):
            return sampler.predict(x, index, condition)


__all__ = ["DiffusionNFTConfig", "DiffusionNFTTrainer"]
