"""What tells a broken or a cheating run: rewards unable to score, a ratio that is not 1, rewards that part ways."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

from postgen.errors import UserError
from postgen.rewards import RewardRunner
from postgen.training.prompts import Prompts, columns

from .batches import Batches


def check_columns(runners: Iterable[RewardRunner | None], prompts: Prompts | None) -> None:
    """Find out before anything is drawn whether rewards get the columns that they need, if there is anything to score.

    Raises:
        UserError: a reward needs a column that no row has.
    """
    known = columns(prompts.rows) if prompts is not None else {}
    for runner in runners:
        for reward in runner.rewards if runner is not None and prompts is not None else ():
            reward.check_columns(known)


def check_groups(runner: RewardRunner, batches: Batches) -> None:
    """Refuse rewards that compare the samples of a prompt where a process has only some of them.

    Raises:
        UserError: such a reward, and groups that span processes.
    """
    names = [reward.name for reward in runner.rewards if reward.groupwise]
    if names and batches.processes > 1 and batches.part % batches.group:
        raise UserError(
            f"the reward {names[0]} looks at all samples of a prompt, but groups span processes: make "
            f"per_device_train_batch_size x gradient_accumulation_steps ({batches.part}) a multiple of "
            f"num_generations ({batches.group})"
        )


def check_equal_calls(processes: int, evaluated: int, *, one_window: bool) -> None:
    """Refuse what calls the network in some processes more often than in others, where its weights are cut.

    Args:
        processes: how many share the work.
        evaluated: prompts of an evaluation.
        one_window: whether all samples of a rollout take the same steps through the network.

    Raises:
        UserError: they would wait for one another.
    """
    if not one_window:
        raise UserError("sharded training needs sde_window_per: rollout, or processes would wait for one another")
    if evaluated % processes:
        raise UserError(f"sharded training needs eval_prompts that {processes} processes share equally")


def load_rewards(runners: Iterable[RewardRunner | None]) -> None:
    """Load the networks of rewards and ask their servers now, so that no run fails at its first evaluation.

    Raises:
        UserError: weights that cannot be found, or a server that cannot be reached.
    """
    for runner in runners:
        if runner is None:
            continue
        runner.load()
        for reward in runner.rewards if runner.offload else ():
            reward.offload()


class RatioCheck:
    """Before the first update after a rollout the policy is the one that drew it: every log-ratio must be 0.

    It is not when sampling and training differ in anything: guidance, precision of latents, timesteps, dropout,
    attention backend, padding of prompts. Training would then follow that difference.

    Args:
        mode: what to do about it.
        limit: largest log-ratio that counts as 0.
    """

    def __init__(self, mode: Literal["warn", "raise", "off"], limit: float) -> None:
        self.mode, self.limit = mode, limit
        self.warned = False

    def __call__(self, worst: float) -> None:
        """Look at the largest log-ratio of a batch.

        Raises:
            UserError: it is not 0, and `mode` is "raise".
        """
        if self.mode == "off" or worst <= self.limit:
            return
        text = (
            f"the policy has not changed since the rollout, but its log-probabilities differ by {worst:.3g} (allowed: "
            f"{self.limit:g}): sampling and training do not compute the same. Set rollout_batch_size to "
            "per_device_train_batch_size, use float32, or raise max_ratio_error"
        )
        if self.mode == "raise":
            raise UserError(text)
        if not self.warned:
            warnings.warn(text, stacklevel=2)
        self.warned = True


class HackingGuard:
    """Compares the trained reward with a gold reward from evaluation to evaluation.

    Args:
        patience: evaluations in a row with a trained reward above the last and a gold reward below the last that count
            as hacking; 0 never.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.last: tuple[float, float] | None = None
        """Means of the last evaluation: reward, gold reward."""
        self.parted = 0

    def see(self, reward: float, gold: float) -> bool:
        """Take the means of an evaluation; return whether the rewards have parted for long enough."""
        if self.last is not None:
            self.parted = self.parted + 1 if reward > self.last[0] and gold < self.last[1] else 0
        self.last = reward, gold
        return bool(self.patience) and self.parted >= self.patience

    def watch(self, means: Mapping[str, float], gold: str) -> dict[str, float]:
        """Look at the means of an evaluation and warn of reward hacking.

        Args:
            means: of the evaluation.
            gold: name of the gold reward.

        Returns:
            The metric `hacking`, or nothing where one of the two rewards has no mean.
        """
        reward, other = means.get("reward"), means.get(f"gold/{gold}/mean")
        if reward is None or other is None:
            return {}
        hacked = self.see(reward, other)
        if hacked:
            warnings.warn(
                f"reward hacking? Over {self.parted} evaluations the reward rose to {reward:.4g} "
                f"while {gold} fell to {other:.4g}",
                stacklevel=2,
            )
        return {"hacking": float(hacked)}

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps."""
        return {"history": [] if self.last is None else [list(self.last)], "parted": self.parted}

    def load(self, history: list[list[float]], parted: int) -> None:
        """Take it back. Checkpoints hold a list of pairs, of which the last counts."""
        self.last, self.parted = None, parted
        for reward, gold in history[-1:]:
            self.last = reward, gold
