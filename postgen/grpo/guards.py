"""Checks for broken runs and reward hacking: rewards that cannot score, a ratio that is not 1, diverging rewards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

from postgen.errors import UserError
from postgen.rewards import RewardRunner
from postgen.training.prompts import Prompts, columns

from .batches import Batches
from .config import DanceGRPOConfig


def check_columns(runners: Iterable[RewardRunner | None], prompts: Prompts | None) -> None:
    """Check before the first rollout that the prompt rows have the columns that rewards need.

    Args:
        runners: rewards; None is skipped.
        prompts: the rows to score; with None nothing is checked.

    Raises:
        UserError: a reward needs a column that no row has.
    """
    known = columns(prompts.rows) if prompts is not None else {}
    for runner in runners:
        for reward in runner.rewards if runner is not None and prompts is not None else ():
            reward.check_columns(known)


def check_groups(runner: RewardRunner, batches: Batches) -> None:
    """Check that each process has whole groups if a reward compares the samples of a prompt (`groupwise`).

    Raises:
        UserError: a reward is groupwise, and groups span processes.
    """
    names = [reward.name for reward in runner.rewards if reward.groupwise]
    if names and batches.processes > 1 and batches.part % batches.group:
        raise UserError(
            f"the reward {names[0]} compares all samples of a prompt, but groups span processes: make "
            f"per_device_train_batch_size x gradient_accumulation_steps ({batches.part}) a multiple of "
            f"num_generations ({batches.group})"
        )


def check_updates(args: DanceGRPOConfig, updates: int, *, sharded: bool) -> None:
    """Check settings that depend on the number of updates in all passes over a rollout, or on sharding.

    Raises:
        UserError: a setting has no effect with one update per rollout, or is wrong with several.
    """
    if args.policy_loss == "dppo" and updates < 2:
        raise UserError(
            "policy_loss dppo masks nothing with one update per rollout: set num_iterations to 2 or more, or "
            "steps_per_generation to a multiple of gradient_accumulation_steps"
        )
    if args.old_log_prob == "self" and updates > 1:
        raise UserError(
            f"old_log_prob self is for one update per rollout, this run has {updates}: use old_log_prob replay or "
            "rollout"
        )
    if args.reuse_graph != "off" and updates > 1:
        raise UserError(
            f"reuse_graph {args.reuse_graph} is for one update per rollout, this run has {updates}: later updates "
            "need forward passes of their own. Set reuse_graph off"
        )
    if args.reuse_graph != "off" and sharded:
        raise UserError(f"reuse_graph {args.reuse_graph} is not for sharded models: set reuse_graph off")


def check_equal_calls(processes: int, evaluated: int, *, one_window: bool) -> None:
    """Check that all processes call a sharded network equally often; otherwise the run would deadlock.

    Args:
        processes: number of processes that share the work.
        evaluated: number of prompts in an evaluation.
        one_window: whether all samples of a rollout take the same steps through the network.

    Raises:
        UserError: some processes would make more forward passes than others.
    """
    if not one_window:
        raise UserError(
            "sharded training needs sde_window_per: rollout, because all processes must call the network equally often"
        )
    if evaluated % processes:
        raise UserError(
            f"sharded training shares the {evaluated} prompts of an evaluation equally over {processes} processes: "
            f"set eval_prompts to a multiple of {processes}"
        )


def check_experts(shares_levels: bool) -> None:
    """Check that all processes call both experts of a sharded model equally often; otherwise the run would deadlock.

    Args:
        shares_levels: whether all samples of a rollout are trained at the same noise levels, which choose the expert.

    Raises:
        UserError: they are not.
    """
    if not shares_levels:
        raise UserError(
            "sharded training of a model with two experts needs the same noise levels in all processes: use method "
            "dancegrpo with sde_window_per rollout and timestep_fraction 1, without data_beta and eval_fm_clips, or "
            "train without fully_shard and FSDP"
        )


def load_rewards(runners: Iterable[RewardRunner | None]) -> None:
    """Load the networks of rewards and contact their servers, so that a run does not fail at its first evaluation.

    Raises:
        UserError: weights are missing, or a server cannot be reached.
    """
    for runner in runners:
        if runner is None:
            continue
        runner.load()
        for reward in runner.rewards if runner.offload else ():
            reward.offload()


class RatioCheck:
    """Check that every log-ratio is 0 before the first update after a rollout, while the policy is unchanged.

    A log-ratio other than 0 means that sampling and training compute different predictions: guidance, precision of
    latents, timesteps, dropout, attention backend or padding of prompts differ. Training would then learn from this
    difference instead of the rewards.

    Args:
        mode: reaction to a log-ratio above `limit`: a warning, an error, or none.
        limit: largest absolute log-ratio that is accepted.
    """

    def __init__(self, mode: Literal["warn", "raise", "off"], limit: float) -> None:
        self.mode, self.limit = mode, limit
        self.warned = False

    def __call__(self, worst: float) -> None:
        """Check the largest absolute log-ratio of an update.

        Raises:
            UserError: `worst` exceeds the limit, and `mode` is "raise".
        """
        if self.mode == "off" or worst <= self.limit:
            return
        text = (
            f"the policy has not changed since the rollout, but its log-probabilities differ by {worst:.3g} (allowed: "
            f"{self.limit:g}): sampling and training compute different predictions. Set rollout_batch_size to "
            "per_device_train_batch_size, use float32, or raise max_ratio_error"
        )
        if self.mode == "raise":
            raise UserError(text)
        if not self.warned:
            warnings.warn(text, stacklevel=2)
        self.warned = True


class HackingGuard:
    """Detects reward hacking: the trained reward rises over several evaluations while a held-out gold reward falls.

    Args:
        patience: number of evaluations in a row, each with a higher trained reward and a lower gold reward than the
            evaluation before, that count as hacking; 0 disables the detection.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.last: tuple[float, float] | None = None
        """Means of the last evaluation: (reward, gold reward)."""
        self.parted = 0
        """Number of evaluations in a row in which the reward rose and the gold reward fell."""

    def see(self, reward: float, gold: float) -> bool:
        """Record the mean rewards of an evaluation, and return whether they count as reward hacking."""
        if self.last is not None:
            self.parted = self.parted + 1 if reward > self.last[0] and gold < self.last[1] else 0
        self.last = reward, gold
        return bool(self.patience) and self.parted >= self.patience

    def watch(self, means: Mapping[str, float], gold: str) -> dict[str, float]:
        """Record the means of an evaluation, and warn if they show reward hacking.

        Args:
            means: mean metrics of the evaluation.
            gold: name of the gold reward.

        Returns:
            {"hacking": 0.0 or 1.0}; an empty dict if one of the two rewards has no mean.
        """
        reward, other = means.get("reward"), means.get(f"gold/{gold}/mean")
        if reward is None or other is None:
            return {}
        hacked = self.see(reward, other)
        if hacked:
            warnings.warn(
                f"possible reward hacking: over {self.parted} evaluations the reward rose to {reward:.4g} "
                f"while {gold} fell to {other:.4g}",
                stacklevel=2,
            )
        return {"hacking": float(hacked)}

    def state(self) -> dict[str, object]:
        """Return the state for a checkpoint, as JSON values."""
        return {"history": [] if self.last is None else [list(self.last)], "parted": self.parted}

    def load(self, history: list[list[float]], parted: int) -> None:
        """Restore the state of a checkpoint.

        Args:
            history: pairs (reward, gold reward) of evaluations; only the last one is used.
            parted: the counter `self.parted`.
        """
        self.last, self.parted = None, parted
        for reward, gold in history[-1:]:
            self.last = reward, gold
