"""The rewards of a run: rewards that training uses, and held-out (gold) rewards that are only measured."""

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

from .advantages import group_stds
from .config import RewardConfig
from .numbers import SampleNumber

RewardLike = str | Callable[..., Any]
Rewards = RewardLike | Sequence[RewardLike]


class Scoring:
    """Calls the rewards of a run with prompts, clips, the columns of the prompt rows and the state of the run.

    Args:
        args: names of rewards, their weights and devices.
        rewards: rewards to train on; empty uses those named in `args`.
        gold: held-out rewards; empty uses those named in `args`.
        state: state of the run, for rewards that depend on the step.
        device: device on which this process trains.

    Raises:
        UserError: there is no reward to train on, a reward is unknown, or its device does not exist.
    """

    def __init__(
        self, args: RewardConfig, rewards: Rewards, gold: Rewards, state: TrainerState, device: torch.device
    ) -> None:
        self.args, self.state = args, state
        self.device = device_of_rewards(args.reward_device, device)
        rewards, gold = rewards or args.reward_funcs, gold or args.eval_reward_funcs
        if not rewards:
            raise UserError("there is no reward: give reward_funcs, names of rewards or functions")
        self.runner = self._runner(rewards, args.reward_weights or None)
        self.gold = self._runner(gold, None) if gold else None
        self._dead = dict.fromkeys(self.runner.names, 0)

    def score(self, rows: Sequence[Row], clips: Sequence[Tensor], latents: Tensor, *, fps: float) -> RewardResult:
        """Compute the rewards of samples of this process.

        Args:
            rows: prompt row of each sample.
            clips: clips (F, 3, H, W) in [0, 1].
            latents: (n, ...) clean latents of the clips.
            fps: frames per second of the clips.
        """
        return self._call(self.runner, rows, clips, fps=fps, latents=latents)

    def score_gold(self, rows: Sequence[Row], clips: Sequence[Tensor], *, fps: float) -> RewardResult:
        """Compute the held-out rewards of samples of this process; the arguments are those of `score`."""
        assert self.gold is not None
        return self._call(self.gold, rows, clips, fps=fps)

    def check_alive(self, values: Tensor, step: int) -> None:
        """Stop the run if one of its rewards has scored no sample in `reward_patience` rollouts in a row.

        The count starts at 0 when a run starts or resumes.

        Args:
            values: (N, K) rewards of all processes in this rollout, NaN where there is no score.
            step: step of the run, for the message.

        Raises:
            AllRewardsFailed: a reward with a non-zero weight has scored no sample for too long.
        """
        for name, weight, column in zip(self.runner.names, self.runner.weights, values.T, strict=True):
            self._dead[name] = self._dead[name] + 1 if weight and bool(column.isnan().all()) else 0
            if self.args.reward_patience and self._dead[name] >= self.args.reward_patience:
                raise AllRewardsFailed(
                    f"the reward {name} has scored no sample in {self._dead[name]} rollouts up to step {step}: the"
                    " warnings above say why. Repair the reward, remove it from reward_funcs, or raise reward_patience"
                    " (0 continues without the reward)"
                )

    def _call(self, runner: RewardRunner, rows: Sequence[Row], clips: Sequence[Tensor], **more: Any) -> RewardResult:
        prompts = [row["prompt"] for row in rows]
        return runner(prompts, clips, **more, trainer_state=self.state, must_score=False, **columns(rows))

    def _runner(self, rewards: Any, weights: Sequence[float] | None) -> RewardRunner:
        return RewardRunner(rewards, weights, device=self.device, offload=self.args.offload_reward)


def device_of_rewards(asked: str | None, trainer: torch.device) -> torch.device:
    """Return the device of rewards that have a network and were not given a device of their own.

    Args:
        asked: the setting `reward_device`; None follows the trainer.
        trainer: device on which this process trains.

    Raises:
        UserError: the device is unknown, or the machine does not have it.
    """
    if asked is None:
        # Learned rewards are not tested on mps, where torch lacks some operations. `postgen score` avoids it too.
        return torch.device("cpu") if trainer.type == "mps" else trainer
    try:
        device = torch.device(check_device(asked))
    except UserError as error:
        raise UserError(f"reward_device: {error}") from None
    # A name without a number is this process's own GPU, also in threads, where torch's current GPU is the first one.
    return trainer if device.type == trainer.type and device.index is None else device


def gathered(values: Tensor, indices: Sequence[SampleNumber], total: int, step: int) -> Tensor:
    """Gather the rewards of all processes in the order of sample numbers; every process must call this.

    Args:
        values: (n, K) rewards of this process, NaN where there is no score.
        indices: sample number of each row of `values`.
        total: number of samples of all processes.
        step: step of the run, for the message.

    Returns:
        (total, K) rewards on the CPU; row i belongs to sample number i.

    Raises:
        AllRewardsFailed: no sample of any process has a reward.
    """
    rewards = in_order(values, indices, total)
    if bool(rewards.isnan().all()):
        raise AllRewardsFailed(
            f"every reward failed on every one of {total} samples of step {step}: the warnings above say why"
        )
    return rewards


def in_order(values: Tensor, indices: Sequence[SampleNumber], total: int) -> Tensor:
    """Gather (n, K) values of all processes as (total, K) values on the CPU; arguments are those of `gathered`."""
    everyone = torch.full((total, values.shape[1]), torch.nan)
    for numbers, part in gather_object([(list(indices), values)]):
        everyone[torch.tensor(numbers)] = part.to(everyone)
    return everyone


def reward_metrics(result: RewardResult, spent: Mapping[str, float], everyone: Tensor, group: int) -> dict[str, float]:
    """Return mean, std and failures of each reward under TRL's metric names, and the cost of a rollout.

    Args:
        result: rewards of this process.
        spent: passes and seconds of the rollout, under the names of `Meter`.
        everyone: (N, K) rewards of all processes, prompt by prompt; NaN without a score.
        group: number of samples of one prompt.
    """
    found: dict[str, float] = {**result.metrics}
    for name, column, spread in zip(result.names, everyone.T, group_stds(everyone, group).tolist(), strict=True):
        known = column[~column.isnan()]
        found[f"rewards/{name}/failed"] = float(len(column) - len(known))
        if spread == spread:
            found[f"rewards/{name}/group_std"] = spread
        if len(known):
            found[f"rewards/{name}/mean"] = known.mean().item()
            found[f"rewards/{name}/std"] = known.std().item() if len(known) > 1 else 0.0
    found["nfe/rollout"] = spent["forwards"] / max(1, len(result.values))
    for name in ("rollout", "decode", "reward"):
        found[f"timing/{name}"] = spent[f"{name}_seconds"]
    return found
