"""The rewards of a run: those that are trained on, and held-out ones that are only ever measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerState

from postgen.errors import UserError
from postgen.families.loading import check_device
from postgen.rewards import AllRewardsFailed, RewardResult, RewardRunner
from postgen.sampling.conditions import Row
from postgen.training.prompts import columns

from .config import RewardConfig
from .numbers import SampleNumber

RewardLike = str | Callable[..., Any]
Rewards = RewardLike | Sequence[RewardLike]


class Scoring:
    """Calls rewards with what they may want to know of a sample and of the run.

    Args:
        args: names of rewards, their weights and devices.
        rewards: instead of those named in `args`.
        gold: instead of the held-out ones named there.
        state: of the run, for rewards that look at its step.

    Raises:
        UserError: there is no reward to train on, or an unknown one.
    """

    def __init__(self, args: RewardConfig, rewards: Rewards, gold: Rewards, state: TrainerState) -> None:
        self.args, self.state = args, state
        if args.reward_device is not None:
            try:
                check_device(args.reward_device)
            except UserError as error:
                raise UserError(f"reward_device: {error}") from None
        rewards, gold = rewards or args.reward_funcs, gold or args.eval_reward_funcs
        if not rewards:
            raise UserError("there is no reward: give reward_funcs, names or functions")
        self.runner = self._runner(rewards, args.reward_weights or None)
        self.gold = self._runner(gold, None) if gold else None
        self._dead = dict.fromkeys(self.runner.names, 0)

    def score(self, rows: Sequence[Row], clips: Sequence[Tensor], latents: Tensor, *, fps: float) -> RewardResult:
        """Return the rewards of samples of this process."""
        return self._call(self.runner, rows, clips, fps=fps, latents=latents)

    def score_gold(self, rows: Sequence[Row], clips: Sequence[Tensor], *, fps: float) -> RewardResult:
        """Return the held-out rewards of samples of this process."""
        assert self.gold is not None
        return self._call(self.gold, rows, clips, fps=fps)

    def check_alive(self, values: Tensor, step: int) -> None:
        """End a run that would go on without one of its rewards.

        Args:
            values: (N, K) of all processes, NaN where there is no score. Rollouts are counted from the start of this
                process: a run that is resumed begins anew.
            step: of the run, for the message.

        Raises:
            AllRewardsFailed: a reward with a weight has scored nothing in `reward_patience` rollouts in a row.
        """
        for name, weight, column in zip(self.runner.names, self.runner.weights, values.T, strict=True):
            self._dead[name] = self._dead[name] + 1 if weight and bool(column.isnan().all()) else 0
            if self.args.reward_patience and self._dead[name] >= self.args.reward_patience:
                raise AllRewardsFailed(
                    f"the reward {name} has scored no sample in {self._dead[name]} rollouts up to step {step}: the"
                    " warnings above say why. Mend it, take it out, or set reward_patience (0 goes on without it)"
                )

    def _call(self, runner: RewardRunner, rows: Sequence[Row], clips: Sequence[Tensor], **more: Any) -> RewardResult:
        prompts = [row["prompt"] for row in rows]
        return runner(prompts, clips, **more, trainer_state=self.state, must_score=False, **columns(rows))

    def _runner(self, rewards: Any, weights: Sequence[float] | None) -> RewardRunner:
        return RewardRunner(rewards, weights, device=self.args.reward_device, offload=self.args.offload_reward)


def gathered(values: Tensor, indices: Sequence[SampleNumber], total: int, step: int) -> Tensor:
    """Return the rewards of all processes in the order of the samples, (total, K), on the CPU.

    Args:
        values: (n, K) of this process.
        indices: numbers of its samples.
        total: samples of all processes.
        step: of the run, for the message.

    Raises:
        AllRewardsFailed: no sample of any process has a reward.
    """
    rewards = torch.full((total, values.shape[1]), torch.nan)
    for numbers, part in gather_object([(list(indices), values)]):
        rewards[torch.tensor(numbers)] = part
    if bool(rewards.isnan().all()):
        raise AllRewardsFailed(
            f"every reward failed on every one of {total} samples of step {step}: the warnings above say why"
        )
    return rewards


def reward_metrics(result: RewardResult, spent: Mapping[str, float]) -> dict[str, float]:
    """Return means, spreads and failures of each reward under TRL's names, and what a rollout has cost.

    Args:
        result: of this process.
        spent: passes and seconds of the rollout, by the names of `Meter`.
    """
    found: dict[str, float] = {**result.metrics}
    for name in result.names:
        known = result.column(name)
        known = known[~known.isnan()]
        found[f"rewards/{name}/failed"] = float(result.failed[name])
        if len(known):
            found[f"rewards/{name}/mean"] = known.mean().item()
            found[f"rewards/{name}/std"] = known.std().item() if len(known) > 1 else 0.0
    found["nfe/rollout"] = spent["forwards"] / max(1, len(result.values))
    for name in ("rollout", "decode", "reward"):
        found[f"timing/{name}"] = spent[f"{name}_seconds"]
    return found
