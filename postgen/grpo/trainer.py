"""DanceGRPO (arXiv:2505.07818, Algorithm 1) and later methods that make it cheaper.

A stochastic sampler draws several samples of each prompt. Rewards score the samples, and each sample is compared with
the others of its prompt. The loss makes the transitions of better samples more probable. For a trained transition
x -> y of a sample with advantage A it is

    r = p_new(y|x) / p_old(y|x)      loss = max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon_high))

Differences from the published code: groups may span processes; best-of-N selects samples per prompt; a group without
spread in its rewards gets advantage 0 exactly; LoRA is the default. The fields of `DanceGRPOConfig` describe the
cheaper variants: a window of few stochastic steps, a fast solver, a shared prefix, step weights, a normalised ratio.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from postgen.sampling.sampler import Sampling
from postgen.sampling.solver import coarser
from postgen.sampling.transition import check_kind, overshooting, step_weights
from postgen.training import TrainingConfig

from .buffer import Buffer
from .config import DanceGRPOConfig
from .cost import Work
from .group import GroupTrainer, Metrics
from .guards import RatioCheck
from .loss import StepLoss, clipped_loss, gaussian_kl, log_ratio, velocity_kl
from .numbers import PromptNumber, RolloutNumber, SampleNumber
from .window import Window


class DanceGRPOTrainer(GroupTrainer[DanceGRPOConfig]):
    """Trainer of DanceGRPO: policy gradient on the stochastic steps of rollouts. `GroupTrainer` has the arguments.

    >>> from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
    >>> args = DanceGRPOConfig(output_dir="runs/grpo", num_generations=4, per_device_train_batch_size=4)
    >>> rows = [{"prompt": "a red ball rolls left"}]
    >>> trainer = DanceGRPOTrainer(reward_funcs="world", args=args, train_dataset=rows)
    >>> trainer.batches.samples
    4
    """

    config_class: ClassVar[type[TrainingConfig]] = DanceGRPOConfig

    def prepare(self) -> None:
        """Set up the window and the loss weights of its steps, and warn if steps add too much noise."""
        args, schedule = self.args, self.sampler.schedule
        check_kind(args.sde_type, schedule.prediction_type)
        self.window = Window.of(args)
        if broken := overshooting(args.sde_type, schedule, args.noise, self.window.steps):
            warnings.warn(
                f"steps {broken} of the {schedule.steps} add several times the noise of the level on which they end, "
                "which ruins samples. Lower noise_level, end sde_window_range earlier, or set sigma_schedule linspace",
                stacklevel=2,
            )
        self.weights = step_weights(
            args.sde_type,
            schedule,
            args.noise,
            args.step_weighting,
            self.window.steps,
            guard=args.ratio_norm,
        )
        self.ratio_check = RatioCheck(args.check_on_policy_ratio, args.max_ratio_error)
        self._worst = torch.zeros((), device=self.device)

    def sampling(self) -> Sampling:
        """Return the settings of rollouts: a window of stochastic steps, deterministic steps around it."""
        args = self.args
        return Sampling(
            kind=args.sde_type,
            noise=args.noise,
            window=args.window[0],
            guidance=args.guidance_scale,
            solver=args.rollout_solver,
            fraction=args.rollout_solver_fraction,
            reduction=args.log_prob_reduction,
            keep_means=args.ratio_norm,
            size=self.size,
        )

    def window_start(self, rollout: RolloutNumber, prompt: PromptNumber, sample: SampleNumber) -> int:
        """Return the step index of the first stochastic step of a sample."""
        index = {"rollout": (), "prompt": (prompt,), "sample": (prompt, sample)}[self.args.sde_window_per]
        return self.window.start(rollout, *index)

    @property
    def shares_rollout_window(self) -> bool:
        """Whether all samples of a rollout have the same window."""
        return self.args.sde_window_per == "rollout" or not self.args.sde_window_size

    @property
    def needs_reference(self) -> bool:
        """Whether the loss contains the divergence from the reference policy (`beta` above 0), or a guard."""
        return self.args.beta > 0 or super().needs_reference

    def work(self) -> Work:
        """Return the passes for one sample, assuming that its window lies in the middle of its range."""
        args, window, sampler = self.args, self.window, self.sampler
        middle = (window.first + window.stop - window.size) // 2
        shared = args.share_initial_noise and args.sde_window_per != "sample"
        prefix = middle / args.num_generations if shared else middle
        tail = len(coarser(middle + window.size, sampler.schedule.steps, sampler.how.fraction)) - 1
        return Work(
            rollout=sampler.passes * float(prefix + window.size + tail),
            trained=sampler.passes * float(window.kept),
            beside=int(self.needs_reference),
            latents=window.size + 2 + (window.size if sampler.how.keep_means else 0),
        )

    def learn(self, rows: Tensor, first_update: bool) -> tuple[Tensor, Metrics]:
        """Compute the losses of the trained steps of B samples.

        This method runs the backward pass of all steps but the last, whose loss it returns.

        Args:
            rows: (B,) rows of the buffer.
            first_update: whether the policy has not changed since it drew these samples; the ratio is then checked.
        """
        assert self.buffer is not None
        buffer, count = self.buffer, self.window.kept
        # (B, kept): steps to train, as offsets from the start of each sample's window.
        offsets = torch.stack([self.window.trained(buffer.number, buffer.samples[row]) for row in rows.tolist()])
        condition = self.conditions(buffer.number)([buffer.prompts[row] for row in rows.tolist()])
        parts, differences = [], []
        for number in range(count):
            offset = offsets[:, number].to(self.device)
            last = number == count - 1
            with nullcontext() if last else self.no_sync():
                loss, metrics, difference = self._transition_loss(buffer, rows, offset, condition)
                loss = loss / count
                if not last:
                    self.backward(loss)
            parts.append(metrics)
            differences.append(difference)
        means: Metrics = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        if first_update:
            means |= self._check_ratio(torch.stack(differences).max())
        return loss, {**means, "loss": means["policy_loss"], "nfe/train": float(self.sampler.passes * count)}

    def _check_ratio(self, difference: Tensor) -> Metrics:
        """Track the largest log-ratio of a first update; check and log it with the update's last micro-batch."""
        self._worst = torch.maximum(self._worst, difference)
        if self.micro % self.batches.per_rollout < self.batches.accumulation - 1:
            return {}
        worst, self._worst = self._worst, torch.zeros_like(self._worst)
        if self.args.check_on_policy_ratio != "off":
            self.ratio_check(float(worst))
        return {"logp_diff/max": worst}

    def _transition_loss(
        self, buffer: Buffer, rows: Tensor, offset: Tensor, condition: Any
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Compute the loss of one trained step of each of B samples.

        Args:
            buffer: the buffer.
            rows: (B,) rows of the buffer.
            offset: (B,) steps to train, as offsets from the start of each sample's window.
            condition: condition of the B samples.

        Returns:
            The mean loss, metrics, and the largest absolute difference of new and old log-probabilities.
        """
        args, paths = self.args, buffer.paths
        index = paths.start[rows] + offset  # step indices into the schedule
        x, y, old = paths.states[rows, offset], paths.states[rows, offset + 1], paths.log_probs[rows, offset]
        reference = self._reference(x, index, condition) if self.needs_reference else None
        with self.meter.training(self.sampler.passes * len(rows)):
            prediction = self.sampler.predict(x, index, condition)
        # Ratio of the new to the old probability of the step, and its clipped loss.
        step = self.sampler.step(x, prediction, index)
        log_prob = step.log_prob(y, args.log_prob_reduction)
        old_mean = None if paths.means is None else paths.means[rows, offset]
        ratio = log_ratio(step, log_prob, old, old_mean=old_mean, reduction=args.log_prob_reduction)
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        found = clipped_loss(ratio, buffer.advantages[rows], args.epsilon, high)
        # Weight of the step.
        weight = self.weights[index].float()
        if args.ratio_norm:
            schedule = self.sampler.schedule
            weight = weight / (schedule.sigmas[index] - schedule.sigmas[index + 1]).float()
        loss, metrics = (found.loss * weight).mean(), found.metrics()
        # Divergence from the reference policy, and guards.
        if reference is not None:
            held = self.sampler.step(x, reference, index)
            if args.beta:
                kl = gaussian_kl(step, held) if args.kl_type == "mean" else velocity_kl(prediction, reference)
                loss = loss + args.beta * kl.mean()
                metrics["kl"] = kl.detach().mean()
            guard, measured = self.guards(prediction, reference, step.clean, held.clean)
            loss, metrics = loss + guard, metrics | measured
        metrics |= {"policy_loss": loss.detach()}
        return loss, metrics, (log_prob - old).detach().abs().max()

    @torch.no_grad()
    def _reference(self, x: Tensor, index: Tensor, condition: Any) -> Tensor:
        with self.policy.reference(), self.meter.rollout(self.sampler.passes * len(x)):
            return self.sampler.predict(x, index, condition)


__all__ = ["DanceGRPOConfig", "DanceGRPOTrainer", "StepLoss"]
