"""Scores batches with several rewards and survives their failures."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from postgen.errors import UserError, is_number, is_whole, named_error, shown
from postgen.rewards.base import Clip, Reward
from postgen.rewards.batches import Batch, Notes, Rows, micro_batches
from postgen.rewards.registry import Source, get_rewards

_log = logging.getLogger(__name__)
# Threads of functions that took too long. A process that ends while torch computes in one of them would crash.
_left: dict[int, threading.Thread] = {}
_GRACE = 10.0
NO_PROMPT = "it needs a prompt, and there is none"
"""How a reward fails on a clip without a prompt."""
_SILENT = "it gave no finite number"
_LARGEST = 1e9
"""Weight of a reward, either sign."""
_LONGEST = 10_000_000
"""Seconds that a call may take: threads cannot wait for more than a few times that."""


@atexit.register
def _await_left() -> None:
    end = time.monotonic() + _GRACE
    for thread in _left.values():
        thread.join(max(0.0, end - time.monotonic()))


def _leave(key: int, thread: threading.Thread) -> None:
    for other in [other for other, old in _left.items() if not old.is_alive()]:
        del _left[other]
    _left[key] = thread


def _is_weight(value: object) -> bool:
    return is_number(value) and abs(cast(float, value)) <= _LARGEST


class AllRewardsFailed(UserError):
    """No row of a batch was scored by any reward: training on it would learn nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """The scores of N clips under K rewards."""

    values: Tensor
    """(N,K) float32 on the CPU, NaN where a reward gave none."""
    names: tuple[str, ...]
    """The K rewards."""
    weights: tuple[float, ...]
    """Weight of each reward, 0 for one that is only measured."""
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
    failures: dict[str, dict[int, str]]
    """Reward -> clip -> how it failed on it, or what it lacked; only clips without a score."""
    reasons: dict[str, dict[int, str]]
    """Reward -> clip -> why it did not fail and yet has no score for it."""

    def weighted(self) -> Tensor:
        """Return the weighted sum of the rewards that scored each clip, (N,); NaN for a clip that none scored.

        A reward of weight 0 is only looked at: it makes no clip count as scored.
        """
        weights = torch.tensor(self.weights)
        total = (self.values.nan_to_num() * weights).sum(1)
        return torch.where(self.values[:, weights != 0].isnan().all(1), torch.nan, total)

    def column(self, name: str) -> Tensor:
        """Return the scores (N,) of one reward."""
        return self.values[:, self.names.index(name)]


class RewardRunner:
    """Calls several rewards on a batch: async ones concurrently, views of one model once, large batches in pieces.

    A reward that raises, takes longer than `timeout`, or returns another number of scores gives NaN for the rows of
    that call; NaN, infinity and None give NaN for their row. All of them are counted and logged.

    Args:
        reward_funcs: one or several of what `get_reward` takes.
        weights: one a reward; None is 1 for each. One of weight 0 is measured beside the others and adds nothing.
        device: where rewards that hold a network compute; None leaves each where it is.
        offload: bring networks to the device for a call only. Saves memory, costs the way there and back.
        timeout: seconds a call may take; None waits for ever. A function that does not return in time is left to
            itself in its thread, and gives NaN at once until it has returned.
        batch_bytes: most bytes of clips (float32) in one call, at least one clip; a reward with an own `batch_bytes`
            keeps that. A call that runs out of memory is tried again in halves.
        reward_error: "none" turns a failure into NaN, "raise" lets it out.

    Raises:
        UserError: an unknown reward, two with one name, not a weight for each reward, or a setting out of range.

    >>> def brightness(completions):
    ...     return [clip.mean() for clip in completions]
    >>> runner = RewardRunner([brightness], weights=[2.0])
    >>> runner(prompts=["a", "b"], completions=[torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)]).weighted()
    tensor([0., 2.])
    """

    def __init__(
        self,
        reward_funcs: Sequence[Source] | Source,
        weights: Sequence[float] | None = None,
        *,
        device: torch.device | str | None = None,
        offload: bool = False,
        timeout: float | None = None,
        batch_bytes: int = 2**30,
        reward_error: Literal["none", "raise"] = "none",
    ) -> None:
        self.rewards = get_rewards(reward_funcs)
        self._check_weights(len(self.rewards), weights)
        self.names = tuple(reward.name for reward in self.rewards)
        self.weights = (1.0,) * len(self.rewards) if weights is None else tuple(float(weight) for weight in weights)
        self.device, self.offload, self.timeout = device, offload, timeout
        self.batch_bytes, self.reward_error = batch_bytes, reward_error
        self._check()

    @staticmethod
    def _check_weights(count: int, weights: Sequence[float] | None) -> None:
        if not count:
            raise UserError("there is no reward: give at least one name or function")
        if weights is None:
            return
        if not isinstance(weights, Sequence):
            raise UserError(f"{count} rewards need as many finite weights in a list, got {shown(weights)}")
        if len(weights) != count or not all(map(_is_weight, weights)) or not any(weights):
            raise UserError(f"{count} rewards need as many finite weights, not all 0, got {shown(list(weights))}")

    def _check(self) -> None:
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise UserError(f"two rewards are named {twice[0]!r}: their results could not be told apart")
        if not is_whole(self.batch_bytes, 1, 2**36):
            raise UserError(f"batch_bytes must be above 0 and at most 2**36, got {shown(self.batch_bytes)}")
        if self.timeout is not None and not (is_number(self.timeout) and 0 < self.timeout <= _LONGEST):
            raise UserError(
                f"timeout must be above 0 and at most {_LONGEST:,} seconds, or None for ever, got"
                f" {shown(self.timeout)}"
            )
        if self.reward_error not in ("none", "raise"):
            raise UserError(f"reward_error must be none or raise, got {self.reward_error!r}")

    def __call__(
        self,
        /,  # a column may be named self
        prompts: Sequence[str | None],
        completions: Sequence[Clip],
        *,
        fps: float | Sequence[float | None] | None = None,
        latents: Tensor | None = None,
        trainer_state: Any = None,
        must_score: bool = True,
        **columns: Sequence[Any],
    ) -> RewardResult:
        """Score a batch of N clips.

        Args:
            prompts: one a clip; None for one without, which is not given to rewards that need a prompt.
            completions: clips (F,3,H,W) in [0,1], on any device; or `postgen.video.Footage`.
            fps: frames per second, one value or one a clip.
            latents: (N,...), for rewards that look at them.
            trainer_state: handed on as it is.
            must_score: raise when nothing at all was scored.
            columns: one value a clip each.

        Raises:
            UserError: columns of other lengths, a column that a reward needs is missing, or weights that cannot be
                loaded.
            AllRewardsFailed: every reward with a weight failed on every row.
        """
        batch = Batch(list(prompts), list(completions), fps, latents, trainer_state, columns)
        for reward in self.rewards:
            reward.check_columns(columns)
        work = _Work(self, batch)
        work.run()
        if must_score and len(batch) and bool(work.values[:, [w != 0 for w in self.weights]].isnan().all()):
            told = "; ".join(f"{name}: {error}" for name, error in work.errors.items()) or "they returned no number"
            raise AllRewardsFailed(f"every reward failed on every one of {len(batch)} clips: {told}")
        return work.result()

    def load(self) -> None:
        """Make every reward ready now rather than at the first batch: load networks, ask servers whether they are up.

        Raises:
            UserError: weights that cannot be found, or a server that cannot be reached.
        """
        for reward in self.rewards:
            reward.load(self.device)
            if hasattr(reward.function, "health"):
                try:
                    reward.function.health()
                except RuntimeError as error:
                    raise UserError(f"a remote reward does not answer: {error}") from error

    def call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call a function that is not async, within the time limit.

        Raises:
            TimeoutError: it took too long, or is still busy with an earlier batch.
            BaseException: what it raised.
        """
        if self.timeout is None:
            with torch.no_grad():
                return function(**arguments)
        old = _left.get(id(function))
        if old is not None and old.is_alive():
            raise TimeoutError("still busy with an earlier batch")
        outcome: dict[str, Any] = {}
        thread = threading.Thread(target=_into, args=(outcome, function, arguments), daemon=True)
        thread.start()
        try:
            thread.join(self.timeout)
        except BaseException:  # Ctrl-C, which a thread does not get
            _leave(id(function), thread)
            raise
        if thread.is_alive():
            _leave(id(function), thread)
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
        self.failures: dict[str, dict[int, str]] = {name: {} for name in runner.names}
        self.seconds = dict.fromkeys(runner.names, 0.0)
        self.notes = Notes(len(batch))
        self.jobs: dict[int, list[int]] = {}
        for index, reward in enumerate(runner.rewards):
            self.jobs.setdefault(id(reward.function), []).append(index)
            self.failures[reward.name] |= dict.fromkeys(batch.unprompted(reward), NO_PROMPT)

    def run(self) -> None:
        """Run the async rewards in a loop of their own thread, the others meanwhile in this one."""
        asynchronous = [views for views in self.jobs.values() if self.runner.rewards[views[0]].is_async]
        for views in asynchronous:
            self.runner.rewards[views[0]].load(self.runner.device)
        outcome: dict[str, Any] = {}
        loop = threading.Thread(target=_into, args=(outcome, self._run_loop, {"jobs": asynchronous}), daemon=True)
        if asynchronous:
            loop.start()
        for views in self.jobs.values():
            if views not in asynchronous:
                self._score(views)
        if asynchronous:
            self._join(loop, asynchronous)
        if "error" in outcome:
            raise outcome["error"]

    def _run_loop(self, jobs: list[list[int]]) -> None:
        asyncio.run(self._gather(jobs))

    def _join(self, loop: threading.Thread, jobs: list[list[int]]) -> None:
        limit = self.runner.timeout
        loop.join(None if limit is None else limit + _GRACE)
        if loop.is_alive():
            # Its time limit is kept by the loop itself, so one of them never lets the loop run.
            _leave(id(loop), loop)
            for views in jobs:
                self._failed(views, range(len(self.batch)), TimeoutError("an async reward blocks its event loop"))

    def result(self) -> RewardResult:
        runner = self.runner
        missing = self.values.isnan().sum(0).tolist()
        return RewardResult(
            values=self.values.clone(),  # a call that was given up may still write its own
            names=runner.names,
            weights=runner.weights,
            failed=dict(zip(runner.names, missing, strict=True)),
            errors=self.errors,
            seconds=self.seconds,
            metrics=self.notes.metrics(),
            extra=self.notes.extra,
            failures={name: dict(rows) for name, rows in self.failures.items()},
            reasons={self.runner.names[i]: self._reasons(i, views[0]) for views in self.jobs.values() for i in views},
        )

    def _reasons(self, index: int, first: int) -> dict[int, str]:
        """Why a reward has no score where it did not fail; views of one model share what the first was told."""
        failed = self.failures[self.runner.names[index]]
        told = self.notes.reasons.get(self.runner.names[first]) or [None] * len(self.batch)
        gaps = self.values[:, index].isnan().nonzero()[:, 0].tolist()
        return {row: told[row] or _SILENT for row in gaps if row not in failed}

    def _pieces(self, reward: Reward) -> list[Rows]:
        most = reward.batch_bytes or self.runner.batch_bytes
        return micro_batches(self.batch, most, reward.groupwise, self.batch.unprompted(reward))

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
                self._failed(views, rows, error)
                return
            half = len(rows) // 2
            self._score_rows(views, reward, rows[:half])
            self._score_rows(views, reward, rows[half:])
        except Exception as error:
            self._failed(views, rows, error)
        else:
            self._store(views, rows, raw)

    async def _gather(self, jobs: list[list[int]]) -> None:
        await asyncio.gather(*(self._score_async(views) for views in jobs))

    async def _score_async(self, views: list[int]) -> None:
        reward, start = self.runner.rewards[views[0]], time.perf_counter()
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
            late = f"no answer within {self.runner.timeout} s"
            self._failed(views, rows, error if str(error) else TimeoutError(late))
        except Exception as error:
            self._failed(views, rows, error)
        else:
            self._store(views, rows, raw)

    def _arguments(self, reward: Reward, rows: Rows) -> dict[str, Any]:
        return reward.arguments(self.batch.rows(rows) | self.notes.loggers(rows, reward.name))

    def _store(self, views: list[int], rows: Rows, raw: Any) -> None:
        for index in views:
            try:
                scores = self.runner.rewards[index].read(raw, len(rows))
            except (TypeError, ValueError) as error:
                self._failed([index], rows, error)
            else:
                self.values[rows, index] = torch.tensor([math.nan if s is None else s for s in scores])

    def _failed(self, views: list[int], rows: Iterable[int], error: Exception) -> None:
        if self.runner.reward_error == "raise":
            raise error
        for index in views:
            name, told = self.runner.names[index], named_error(error)
            if self.errors.get(name) != told:
                _log.warning("reward %s failed: %s", name, told)
            self.errors[name] = told
            self.failures[name] |= {row: told for row in rows if row not in self.failures[name]}

    def _spent(self, views: list[int], start: float) -> None:
        for index in views:
            self.seconds[self.runner.names[index]] += (time.perf_counter() - start) / len(views)
