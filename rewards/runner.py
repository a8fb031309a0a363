"""Scores batches with several rewards and continues when a reward fails."""

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
# Threads of functions that exceeded the timeout. A process that ends while torch computes in one of them would crash.
_left: dict[int, threading.Thread] = {}
_GRACE = 10.0
NO_PROMPT = "it needs a prompt, but the clip has none"
"""Failure message of a reward for a clip without a prompt."""
_SILENT = "it returned no finite number"
_LARGEST = 1e9
"""Largest absolute weight of a reward."""
_LONGEST = 10_000_000
"""Largest timeout in seconds; threads cannot wait for more than a few times that."""


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
    """No reward scored any row of a batch, so a training step on it would learn nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """The scores of N clips under K rewards."""

    values: Tensor
    """(N,K) float32 on the CPU, NaN where a reward returned no score."""
    names: tuple[str, ...]
    """Names of the K rewards."""
    weights: tuple[float, ...]
    """Weight of each reward, 0 for a reward that is only measured."""
    failed: dict[str, int]
    """Reward -> number of rows without a score, for any reason."""
    errors: dict[str, str]
    """Reward -> its latest error message; only rewards that failed."""
    seconds: dict[str, float]
    """Reward -> time spent on it; the outputs of one model share its time."""
    metrics: dict[str, float]
    """Values that rewards passed to `log_metric`, averaged over their calls with the number of rows as weight."""
    extra: dict[str, list[Any]]
    """Values that rewards passed to `log_extra`: N per column, None where there is none."""
    failures: dict[str, dict[int, str]]
    """Reward -> clip -> error message or missing input; only clips without a score."""
    reasons: dict[str, dict[int, str]]
    """Reward -> clip -> reason of a missing score, where the reward did not fail."""

    def weighted(self) -> Tensor:
        """Return the weighted sum of the scores of each clip, (N,); NaN for a clip without any score.

        Missing scores are left out. A reward of weight 0 does not make a clip count as scored.
        """
        weights = torch.tensor(self.weights)
        total = (self.values.nan_to_num() * weights).sum(1)
        return torch.where(self.values[:, weights != 0].isnan().all(1), torch.nan, total)

    def column(self, name: str) -> Tensor:
        """Return the scores (N,) of one reward."""
        return self.values[:, self.names.index(name)]


class RewardRunner:
    """Calls several rewards on a batch: async ones concurrently, each model once, large batches in micro-batches.

    If a reward raises, exceeds `timeout`, or returns a wrong number of scores, all rows of that call become NaN. A
    score that is NaN, infinite or None makes its row NaN. The runner counts and logs all of these.

    Args:
        reward_funcs: one or several inputs of `get_reward`.
        weights: one per reward; None uses 1 for each. A reward of weight 0 is measured but adds nothing to the sum.
        device: device of the rewards with a network that were not given a device of their own, as in
            "clip_score(device='cuda:1')"; None leaves them where they are, at first on the CPU.
        offload: keep networks on the device only during their calls. This saves memory but costs transfers.
        timeout: seconds that a call may take; None waits for ever. A function that exceeds it keeps running in its
            thread; its next calls give NaN immediately until it has returned.
        batch_bytes: largest size of the clips (float32) of a call in bytes, at least one clip; a reward's own
            `batch_bytes` takes precedence. A call that runs out of memory is repeated in halves.
        reward_error: "none" turns a failure into NaN, "raise" re-raises it.

    Raises:
        UserError: an unknown reward, two rewards of one name, a wrong number of weights, or a setting out of range.

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
        if not isinstance(weights, Sequence) or len(weights) != count:
            raise UserError(f"weights must be a list of one number per reward, {count} in total, got {shown(weights)}")
        if not all(map(_is_weight, weights)) or not any(weights):
            raise UserError(f"weights must be finite numbers, not all 0, got {shown(list(weights))}")

    def _check(self) -> None:
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise UserError(
                f"two rewards are named {twice[0]!r}: list each reward once, or give your own one another `name`"
            )
        if not is_whole(self.batch_bytes, 1, 2**36):
            raise UserError(f"batch_bytes must be above 0 and at most 2**36, got {shown(self.batch_bytes)}")
        if self.timeout is not None and not (is_number(self.timeout) and 0 < self.timeout <= _LONGEST):
            told = f"above 0 and at most {_LONGEST:,} seconds, got {shown(self.timeout)}"
            raise UserError(f"timeout must be {told}; leave it out for no limit")
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
            prompts: one per clip; None for a clip without a prompt, which rewards that need prompts do not receive.
            completions: clips (F,3,H,W) in [0,1], on any device; or `postgen.video.Footage`.
            fps: frames per second, one value or one per clip.
            latents: (N,...), for rewards that use them.
            trainer_state: passed to the rewards unchanged.
            must_score: raise an error if no row has a score.
            columns: one value per clip each.

        Raises:
            UserError: a column has a wrong length, a column that a reward needs is missing, or weights cannot be
                loaded.
            AllRewardsFailed: every reward with a non-zero weight failed on every row.
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
        """Prepare every reward before the first batch: load networks, check that servers respond.

        Raises:
            UserError: weights cannot be found, or a server cannot be reached.
        """
        for reward in self.rewards:
            reward.load(self.device)
            if hasattr(reward.function, "health"):
                try:
                    reward.function.health()
                except RuntimeError as error:
                    raise UserError(f"a remote reward does not respond: {error}") from error

    def call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call a function that is not async, within the timeout.

        Raises:
            TimeoutError: the call took too long, or the function is still busy with an earlier batch.
            BaseException: any error that the function raised.
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
        except BaseException:  # Ctrl-C reaches this thread only
            _leave(id(function), thread)
            raise
        if thread.is_alive():
            _leave(id(function), thread)
            raise TimeoutError(f"no result within {self.timeout:g} s")
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
    """The evaluation of one batch by the rewards of a runner."""

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
        """Run the async rewards in an event loop of a second thread, and the other rewards in this thread."""
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
            # The event loop applies the timeout, so a reward must have blocked the loop.
            _leave(id(loop), loop)
            for views in jobs:
                self._failed(views, range(len(self.batch)), TimeoutError("an async reward blocks its event loop"))

    def result(self) -> RewardResult:
        runner = self.runner
        missing = self.values.isnan().sum(0).tolist()
        return RewardResult(
            values=self.values.clone(),  # a call that timed out may still write to `self.values`
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
        """Return why rows have no score where the reward did not fail; outputs of one model share the reasons."""
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
            late = f"no result within {self.runner.timeout} s"
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
