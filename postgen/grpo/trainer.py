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
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.sampling.sampler import Sampling, State
from postgen.sampling.solver import coarser
from postgen.sampling.transition import Transition, check_kind, overshooting, step_weights
from postgen.training import TrainingConfig

from .buffer import Buffer
from .config import DanceGRPOConfig
from .cost import Work
from .group import GroupTrainer, Metrics
from .guards import RatioCheck, check_updates
from .loss import (
    StepLoss,
    clipped_loss,
    clipped_losses,
    drift,
    gaussian_kl,
    log_ratio,
    masked_loss,
    moved_kl,
    velocity_kl,
)
from .numbers import PromptNumber, RolloutNumber, SampleNumber
from .reuse import RetainedGraphs, ScoreGradients
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

    def build(self) -> Mapping[str, nn.Module]:
        """Refuse settings that do not fit the number of updates per rollout, then build as `GroupTrainer` does."""
        check_updates(self.args, self.batches.updates * self.batches.iterations, sharded=self.sharded)
        return super().build()

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
        self.graphs = self._graphs()
        self.sampler.graphs = self.graphs
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
            keep_means=args.keeps_means,
            size=self.size,
        )

    def _graphs(self) -> RetainedGraphs | ScoreGradients | None:
        """Return what keeps the graphs of rollouts (`reuse_graph`); None if training has forward passes of its own."""
        if self.args.reuse_graph == "off":
            return None
        if self.args.reuse_graph == "retain" and self.needs_reference and self.policy.copies_reference:
            raise UserError(
                "reuse_graph with beta or a guard needs new LoRA adapters: another reference policy is swapped into "
                "the weights, which the kept graphs still need. Set them to 0, or reuse_graph off"
            )
        if self.args.reuse_graph == "retain":
            return RetainedGraphs(self.window)
        return ScoreGradients(self.window, self.trained, self._score)

    def before_rollout(self) -> None:
        """Drop the graphs of the last rollout."""
        if self.graphs is not None:
            self.graphs.begin(RolloutNumber(self.micro // self.batches.per_rollout))

    def window_start(self, rollout: RolloutNumber, prompt: PromptNumber, sample: SampleNumber) -> int:
        """Return the step index of the first stochastic step of a sample."""
        index = {"rollout": (), "prompt": (prompt,), "sample": (prompt, sample)}[self.args.sde_window_per]
        return self.window.start(rollout, *index)

    @property
    def shares_rollout_window(self) -> bool:
        """Whether all samples of a rollout have the same window."""
        return self.args.sde_window_per == "rollout" or not self.args.sde_window_size

    @property
    def shares_levels(self) -> bool:
        """Whether all samples of a rollout are also trained at the same noise levels."""
        return self.shares_rollout_window and self.window.kept == self.window.size

    @property
    def averages(self) -> bool:
        """Whether this trainer averages gradients, as always for graphs of rollouts: no prepared model began them."""
        return super().averages or self.graphs is not None

    @property
    def loss_per_reward(self) -> bool:
        """Whether each reward has its own clipped loss."""
        return self.args.loss_per == "reward"

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
        # A replay takes one pass for each trained step of the samples that are trained on.
        replay = window.kept * args.kept / args.num_generations if args.old_log_prob == "replay" else 0
        # With reused graphs, the forward passes of the trained steps are those of the rollout. Retained graphs keep a
        # prediction for each trained step, and its gradient.
        reused = 0 if args.reuse_graph == "off" else window.kept
        kept = 2 * window.kept if args.reuse_graph == "retain" else 0
        return Work(
            rollout=sampler.passes * float(prefix + window.size + tail + replay - reused),
            trained=sampler.passes * float(window.kept),
            beside=int(self.needs_reference),
            latents=window.size + 2 + (window.size if sampler.how.keep_means else 0) + kept,
        )

    @property
    def copies(self) -> int:
        """Number of copies of the trained weights, including the gradients that `reuse_graph: reweight` keeps."""
        return super().copies + (len(self.batches.mine()) if self.args.reuse_graph == "reweight" else 0)

    def learn(self, rows: Tensor, first_update: bool) -> tuple[Tensor, Metrics]:
        """Compute the losses of the trained steps of B samples.

        This method runs the backward pass of all steps but the last, whose loss it returns.

        Args:
            rows: (B,) rows of the buffer.
            first_update: whether the policy has not changed since it drew these samples; the ratio is then checked.
        """
        assert self.buffer is not None
        if isinstance(self.graphs, ScoreGradients):
            return self._learn_from_scores(self.buffer, self.graphs, rows)
        buffer, count = self.buffer, self.window.kept
        extra: Metrics = {"nfe/train": float(self.sampler.passes * count)}
        if self.args.old_log_prob == "replay" and self.micro % self.batches.per_rollout == 0:
            extra["logp_diff/replay"] = self._replay(buffer)
        condition = self.conditions(buffer.number)([buffer.prompts[row] for row in rows.tolist()])
        parts, differences = [], []
        for number, offset in enumerate(self._offsets(buffer, rows)):
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
        if self.graphs is not None:
            self.backward(loss)  # into the predictions of the rollout
            loss = loss.detach()
            if self._ends_update:
                with self.meter.time("transformer_seconds"):
                    self.graphs.backward()
        return loss, {**means, **extra, "loss": means["policy_loss"]}

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; with `reuse_graph` a loss without a graph has had it in `learn`."""
        if self.graphs is None or loss.requires_grad:
            super().backward(loss)

    def _learn_from_scores(self, buffer: Buffer, graphs: ScoreGradients, rows: Tensor) -> tuple[Tensor, Metrics]:
        """Add the gradients of B samples, each multiplied by -A; the ratio is 1. Returns what `learn` returns."""
        args, advantages = self.args, buffer.advantages[rows]
        scale = -1 / (len(rows) * args.gradient_accumulation_steps)
        pairs = zip(rows.tolist(), advantages.tolist(), strict=True)
        graphs.add({buffer.samples[row]: scale * advantage for row, advantage in pairs})
        found = clipped_loss(torch.zeros_like(advantages), advantages, args.epsilon, args.high)
        weights = [self._weight(buffer.paths.start[rows] + offset) for offset in self._offsets(buffer, rows)]
        loss = (found.loss * torch.stack(weights)).mean()
        nfe = float(self.sampler.passes * self.window.kept)
        return loss, {**found.metrics(), "loss": loss, "policy_loss": loss, "nfe/train": nfe}

    def _score(self, state: State) -> Tensor:
        """Return the sum of the log-probabilities of trained steps, with the factors that the loss gives them."""
        assert state.graph is not None
        rows = list(state.traced)
        index = state.start[rows]
        step = self.sampler.step(state.x[rows], state.graph, index)
        log_prob = step.log_prob(state.after[rows], self.args.log_prob_reduction)
        factor = self._weight(index) * (step.std.to(log_prob.dtype) if self.args.ratio_norm else 1)
        return (log_prob * factor).sum() / self.window.kept

    def _weight(self, index: Tensor) -> Tensor:
        """Return the weights (B,) of the policy losses of steps (B,)."""
        weight = self.weights[index].float()
        if self.args.ratio_norm:
            sigmas = self.sampler.schedule.sigmas
            weight = weight / (sigmas[index] - sigmas[index + 1]).float()
        return weight

    @property
    def _ends_update(self) -> bool:
        """Whether the next micro-batch is the last of its update."""
        return self.micro % self.batches.accumulation == self.batches.accumulation - 1

    def _check_ratio(self, difference: Tensor) -> Metrics:
        """Track the largest log-ratio of a first update; check and log it with the update's last micro-batch."""
        self._worst = torch.maximum(self._worst, difference)
        if self.micro % self.batches.per_rollout < self.batches.accumulation - 1:
            return {}
        worst, self._worst = self._worst, torch.zeros_like(self._worst)
        if self.args.check_on_policy_ratio != "off" and self.args.old_log_prob != "self":
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
        if isinstance(self.graphs, RetainedGraphs):
            prediction = self.graphs.predictions([buffer.samples[row] for row in rows.tolist()], index)
        else:
            with self.meter.training(self.sampler.passes * len(rows)):
                prediction = self.sampler.predict(x, index, condition)
        # Ratio of the new to the old probability of the step, and its loss.
        step = self.sampler.step(x, prediction, index)
        log_prob = step.log_prob(y, args.log_prob_reduction)
        old_mean = None if paths.means is None else paths.means[rows, offset]
        gains = None if buffer.gains is None else buffer.gains[rows]
        found = self._policy_loss(step, log_prob, old, old_mean, buffer.advantages[rows], gains)
        loss, metrics = (found.loss * self._weight(index)).mean(), found.metrics()
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

    def _policy_loss(
        self,
        step: Transition,
        log_prob: Tensor,
        old: Tensor,
        old_mean: Tensor | None,
        advantages: Tensor,
        gains: Tensor | None,
    ) -> StepLoss:
        """Return the loss of a trained step of B samples, before the weight of the step.

        Args:
            step: the transition under the new policy.
            log_prob: (B,) log-probability of the drawn latents under the new policy.
            old: (B,) the same under the policy of the rollout.
            old_mean: (B, ...) mean of the transition under the policy of the rollout; None if it was not kept.
            advantages: (B,) advantages.
            gains: (B,) their positive parts, for `loss_per: reward`; else None.
        """
        args = self.args
        if args.old_log_prob == "self":
            old, old_mean = log_prob.detach(), step.mean.detach()
        centre = old_mean if args.ratio_norm else None
        ratio = log_ratio(step, log_prob, old, old_mean=centre, reduction=args.log_prob_reduction)
        if args.policy_loss == "dppo":
            assert old_mean is not None
            with torch.no_grad():
                centred = log_prob - old + drift(step, old_mean, args.log_prob_reduction)
                kl = moved_kl(step, old_mean)
            return masked_loss(ratio, advantages, kl, centred, args.dppo_delta)
        return clipped_losses(ratio, advantages, gains, args.epsilon, args.high)

    @torch.no_grad()
    def _replay(self, buffer: Buffer) -> Tensor:
        """Compute the old probabilities of the buffer again, with the batches of training.

        The rollout may draw other batches than those of training, and in bfloat16 a prediction depends on the shape
        of its batch. Returns the largest absolute change of a log-probability.
        """
        paths, worst = buffer.paths, torch.zeros((), device=self.device)
        for rows in torch.arange(len(buffer.samples), device=self.device).split(self.batches.per_device):
            condition = self.conditions(buffer.number)([buffer.prompts[row] for row in rows.tolist()])
            for offset in self._offsets(buffer, rows):
                index = paths.start[rows] + offset
                x, y = paths.states[rows, offset], paths.states[rows, offset + 1]
                with self.meter.rollout(self.sampler.passes * len(rows)):
                    step = self.sampler.step(x, self.sampler.predict(x, index, condition), index)
                log_prob = step.log_prob(y, self.args.log_prob_reduction)
                worst = torch.maximum(worst, (log_prob - paths.log_probs[rows, offset]).abs().max())
                paths.log_probs[rows, offset] = log_prob
                if paths.means is not None:
                    paths.means[rows, offset] = step.mean
        return worst

    def _offsets(self, buffer: Buffer, rows: Tensor) -> list[Tensor]:
        """Return the trained steps of B rows, `kept` tensors (B,) of offsets from the start of each row's window."""
        table = [self.window.trained(buffer.number, buffer.samples[row]) for row in rows.tolist()]
        return list(torch.stack(table, 1).to(self.device))

    @torch.no_grad()
    def _reference(self, x: Tensor, index: Tensor, condition: Any) -> Tensor:
        with self.policy.reference(), self.meter.rollout(self.sampler.passes * len(x)):
            return self.sampler.predict(x, index, condition)


__all__ = ["DanceGRPOConfig", "DanceGRPOTrainer", "StepLoss"]
