"""Reinforcement learning on the forward process, without its losses: rollouts, noised samples, other policies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Condition
from postgen.sampling.forward import noised, wanted_of
from postgen.sampling.sampler import Sampler, Sampling
from postgen.sampling.schedule import Levels
from postgen.sampling.seeds import normal, seed_of
from postgen.training.swap import WeightsCopy

from .advantages import Advantages
from .forward_config import Decay, DiffusionNFTConfig
from .forward_groups import UpdateGroups
from .forward_losses import moded, pairs_of_equal_motion
from .group import GroupTrainer
from .numbers import PromptNumber, RolloutNumber, SampleNumber


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


class ForwardPolicies(GroupTrainer[DiffusionNFTConfig]):
    """Base of `DiffusionNFTTrainer`: everything but its losses."""

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
        """Whether the loss contains the reference policy, itself or through `beta`, or a guard."""
        return self.args.beta > 0 or self.args.compares_base or super().needs_reference

    @property
    def copies(self) -> int:
        """Number of copies of the trained weights, including the old policies."""
        return super().copies + len(self._decays())

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

    def choose(self, advantages: Advantages, motion: Tensor) -> Tensor:
        """Return the sample numbers to train on: the best and worst of each group, or a pair of equal motion."""
        if self.args.pair_by == "reward":
            return super().choose(advantages, motion)
        scores = advantages.unclipped.masked_fill(advantages.rewards.isnan(), torch.nan)
        return pairs_of_equal_motion(scores, motion, self.batches.group)

    def _noised(self, rows: Tensor, number: int, ahead: int = 0) -> Noised:
        """Return (B,) buffer rows, noised to the `number`-th of their random noise levels `ahead` updates later."""
        assert self.buffer is not None
        args, buffer, schedule = self.args, self.buffer, self.sampler.schedule
        clean = buffer.paths.clean[rows]
        prompts = [buffer.prompts[row] for row in rows.tolist()]
        samples = [buffer.samples[row] for row in rows.tolist()]
        # Seeds use the number of the update, not of the micro-batch, so that two processes draw the same noise as one
        # process with twice the accumulation.
        update = self.micro // self.batches.accumulation + ahead
        seeds = [
            seed_of(args.seed, "forward", update, number, one) for one in (prompts if args.shares_noise else samples)
        ]
        drawn = max(1, int(args.timestep_fraction * schedule.steps))
        index = torch.tensor([seed % drawn for seed in seeds], device=self.device)
        levels = schedule.levels(index, index + 1)
        noise = normal(clean.shape[1:], seeds, self.device)
        return Noised(
            rows=rows,
            clean=clean,
            x=noised(clean, noise, levels),
            target=wanted_of(clean, noise, levels, schedule.prediction_type),
            index=index,
            levels=levels,
            condition=self.conditions(buffer.number)(prompts),
            advantages=moded(buffer.advantages[rows], args.adv_mode),
        )

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
