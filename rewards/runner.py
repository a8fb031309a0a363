"""Scores batches with several rewards and survives their failures."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.rewards.base import Reward
from postgen.rewards.batches import Batch, Notes, Rows, micro_batches
from postgen.rewards.registry import get_reward

_log = logging.getLogger(__name__)


class AllRewardsFailed(RuntimeError):
    """No row of a batch was scored by any reward: training on it would learn nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """The scores of N clips under K rewards."""

    values: Tensor
    """(N,K) float32 on the CPU, NaN where a reward gave none."""
    names: tuple[str, ...]
    """The K rewards."""
    weights: tuple[float, ...]
    """Weight of each reward."""
    failed: dict[str, int]
    """Reward -> rows without a number, for whatever reason."""
    errors: dict[str, str]
    """Reward -> what it said last when it failed; only those that did."""
    seconds: dict[str, float]
    """Reward -> time spent on it; views of one model share its time."""
    metrics: dict[str, float]
    """What rewards gave to `log_metric`, the mean over their calls weighted by rows."""
    extra: dict[str, list[Any]]
    """What rewards gave to `log_extra`: N values each, None where there is none."""

    def weighted(self) -> Tensor:
        """Return the weighted sum of the rewards that scored each clip, (N,); NaN for a clip that none scored."""
        weights = torch.tensor(self.weights)
        total = (self.values.nan_to_num() * weights).sum(1)
        return torch.where(self.values.isnan().all(1), torch.nan, total)

    def column(self, name: str) -> Tensor:
        """Return the scores (N,) of one reward."""
        return self.values[:, self.names.index(name)]


class RewardRunner:
    """Calls several rewards on a batch: async ones concurrently, views of one model once, large batches in pieces.

    A reward that raises, takes longer than `timeout`, or returns another number of scores gives NaN for the rows of
    that call; NaN, infinity and None give NaN for their row. All of them are counted and logged.

    Args:
        reward_funcs: one or several of what `get_reward` takes.
        weights: one a reward; None is 1 for each.
        device: where rewards that hold a network compute; None leaves each where it is.
        offload: bring networks to the device for a call only. Saves memory, costs the way there and back.
        timeout: seconds a call may take; None waits for ever. A function that does not return in time is left to
            itself in its thread, and gives NaN at once until it has returned.
        batch_bytes: most bytes of clips (float32) in one call, at least one clip; a reward with an own `batch_bytes`
            keeps that. A call that runs out of memory is tried again in halves.
        reward_error: "none" turns a failure into NaN, "raise" lets it out.

    Raises:
        UserError: an unknown reward, two with one name, as many weights as rewards missing, or a setting out of range.

    >>> def brightness(completions):
    ...     return [clip.mean() for clip in completions]
    >>> runner = RewardRunner([brightness], weights=[2.0])
    >>> runner(prompts=["a", "b"], completions=[torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)]).weighted()
    tensor([0., 2.])
    """

    def __init__(
        self,
        reward_funcs: Sequence[str | Callable[..., Any] | Reward] | str | Callable[..., Any] | Reward,
        weights: Sequence[float] | None = None,
        *,
        device: torch.device | str | None = None,
        offload: bool = False,
        timeout: float | None = None,
        batch_bytes: int = 2**30,
        reward_error: Literal["none", "raise"] = "none",
    ) -> None:
        several = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else list(reward_funcs)
        self.rewards = [get_reward(reward) for reward in several]
        self.names = tuple(reward.name for reward in self.rewards)
        self.weights = tuple(1.0 for _ in self.rewards) if weights is None else tuple(float(w) for w in weights)
        self.device, self.offload, self.timeout = device, offload, timeout
        self.batch_bytes, self.reward_error = batch_bytes, reward_error
        self._check()
        self._stuck: dict[int, threading.Thread] = {}

    def _check(self) -> None:
        if not self.rewards:
            raise UserError("there is no reward: give at least one name or function")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise UserError(f"two rewards are named {twice[0]!r}: their results could not be told apart")
        if len(self.weights) != len(self.rewards) or not all(math.isfinite(w) for w in self.weights):
            raise UserError(f"{len(self.rewards)} rewards need as many finite weights, got {list(self.weights)}")
        if self.batch_bytes < 1 or (self.timeout is not None and not self.timeout > 0):
            raise UserError(f"batch_bytes and timeout must be above 0, got {self.batch_bytes} and {self.timeout}")
        if self.reward_error not in ("none", "raise"):
            raise UserError(f"reward_error must be none or raise, got {self.reward_error!r}")

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Tensor],
        *,
        fps: float | Sequence[float | None] | None = None,
        latents: Tensor | None = None,
        trainer_state: Any = None,
        must_score: bool = True,
        **columns: Sequence[Any],
    ) -> RewardResult:
        """Score a batch of N clips.

        Args:
            prompts: one a clip.
            completions: clips (F,3,H,W) in [0,1], on any device.
            fps: frames per second, one value or one a clip.
            latents: (N,...), for rewards that look at them.
            trainer_state: handed on as it is.
            must_score: raise when nothing at all was scored.
            columns: one value a clip each.

        Raises:
            UserError: columns of other lengths, a column that a reward needs is missing, or weights that cannot be
                loaded.
            AllRewardsFailed: every reward failed on every row.
        """
        batch = Batch(list(prompts), list(completions), fps, latents, trainer_state, columns)
        for reward in self.rewards:
            reward.check_columns(columns)
        work = _Work(self, batch)
        work.run()
        if must_score and len(batch) and bool(work.values.isnan().all()):
            told = "; ".join(f"{name}: {error}" for name, error in work.errors.items()) or "they returned no number"
            raise AllRewardsFailed(f"every reward failed on every one of {len(batch)} clips: {told}")
        return work.result()

    def load(self) -> None:
        """Load every reward that holds a network now rather than at the first batch.

        Raises:
            UserError: weights that cannot be found.
        """
        for reward in self.rewards:
            reward.load(self.device)

    def call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call a function that is not async, within the time limit.

        Raises:
            TimeoutError: it took too long, or is still busy with an earlier batch.
            BaseException: what it raised.
        """
        if self.timeout is None:
            with torch.no_grad():
                return function(**arguments)
        old = self._stuck.get(id(function))
        if old is not None and old.is_alive():
            raise TimeoutError("still busy with an earlier batch")
        outcome: dict[str, Any] = {}
        thread = threading.Thread(target=_into, args=(outcome, function, arguments), daemon=True)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            self._stuck[id(function)] = thread
            raise TimeoutError(f"no answer within {self.timeout:g} s")
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]


def _into(outcome: dict[str, Any], function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        with torch.no_grad():
            outcome["value"] = function(**arguments)
    except BaseException as error:
        outcome["error"] = error


class _Work:
    """One batch on its way through the rewards of a runner."""

    def __init__(self, runner: RewardRunner, batch: Batch) -> None:
        self.runner, self.batch = runner, batch
        self.values = torch.full((len(batch), len(runner.rewards)), torch.nan)
        self.errors: dict[str, str] = {}
        self.seconds = dict.fromkeys(runner.names, 0.0)
        self.notes = Notes(len(batch))
        self.jobs: dict[int, list[int]] = {}
        for index, reward in enumerate(runner.rewards):
            self.jobs.setdefault(id(reward.function), []).append(index)

    def run(self) -> None:
        """Run the async rewards in a loop of their own thread, the others meanwhile in this one."""
        asynchronous = [views for views in self.jobs.values() if self.runner.rewards[views[0]].is_async]
        outcome: dict[str, Any] = {}
        thread = threading.Thread(
            target=_into, args=(outcome, asyncio.run, {"main": self._gather(asynchronous)}), daemon=True
        )
        if asynchronous:
            thread.start()
        for views in self.jobs.values():
            if views not in asynchronous:
                self._score(views)
        if asynchronous:
            thread.join()
        if "error" in outcome:
            raise outcome["error"]

    def result(self) -> RewardResult:
        runner = self.runner
        missing = self.values.isnan().sum(0).tolist()
        return RewardResult(
            values=self.values,
            names=runner.names,
            weights=runner.weights,
            failed=dict(zip(runner.names, missing, strict=True)),
            errors=self.errors,
            seconds=self.seconds,
            metrics=self.notes.metrics(),
            extra=self.notes.extra,
        )

    def _pieces(self, reward: Reward) -> list[Rows]:
        return micro_batches(self.batch, reward.batch_bytes or self.runner.batch_bytes, reward.groupwise)

    def _score(self, views: list[int]) -> None:
        reward, start = self.runner.rewards[views[0]], time.perf_counter()
        reward.load(self.runner.device)
        for rows in self._pieces(reward):
            self._score_rows(views, reward, rows)
        if self.runner.offload:
            reward.offload()
        self._spent(views, start)

    def _score_rows(self, views: list[int], reward: Reward, rows: Rows) -> None:
        try:
            raw = self.runner.call(reward.function, self._arguments(reward, rows))
        except torch.OutOfMemoryError as error:
            if len(rows) == 1 or reward.groupwise:
                self._failed(views, error)
                return
            half = len(rows) // 2
            self._score_rows(views, reward, rows[:half])
            self._score_rows(views, reward, rows[half:])
        except Exception as error:
            self._failed(views, error)
        else:
            self._store(views, rows, raw)

    async def _gather(self, jobs: list[list[int]]) -> None:
        await asyncio.gather(*(self._score_async(views) for views in jobs))

    async def _score_async(self, views: list[int]) -> None:
        reward, start = self.runner.rewards[views[0]], time.perf_counter()
        reward.load(self.runner.device)
        await asyncio.gather(*(self._await_rows(views, reward, rows) for rows in self._pieces(reward)))
        if self.runner.offload:
            reward.offload()
        self._spent(views, start)

    async def _await_rows(self, views: list[int], reward: Reward, rows: Rows) -> None:
        try:
            with torch.no_grad():
                raw = await asyncio.wait_for(
                    reward.function(**self._arguments(reward, rows)), timeout=self.runner.timeout
                )
        except TimeoutError as error:
            self._failed(views, error if str(error) else TimeoutError(f"no answer within {self.runner.timeout} s"))
        except Exception as error:
            self._failed(views, error)
        else:
            self._store(views, rows, raw)

    def _arguments(self, reward: Reward, rows: Rows) -> dict[str, Any]:
        return reward.arguments(self.batch.rows(rows) | self.notes.loggers(rows))

    def _store(self, views: list[int], rows: Rows, raw: Any) -> None:
        for index in views:
            try:
                scores = self.runner.rewards[index].read(raw, len(rows))
            except (TypeError, ValueError) as error:
                self._failed([index], error)
            else:
                self.values[rows, index] = torch.tensor([math.nan if s is None else s for s in scores])

    def _failed(self, views: list[int], error: Exception) -> None:
        if self.runner.reward_error == "raise":
            raise error
        for index in views:
            name, told = self.runner.names[index], f"{type(error).__name__}: {error}"
            if self.errors.get(name) != told:
                _log.warning("reward %s failed: %s", name, told)
            self.errors[name] = told

    def _spent(self, views: list[int], start: float) -> None:
        for index in views:
            self.seconds[self.runner.names[index]] += (time.perf_counter() - start) / len(views)
