"""The router of attention: it runs the fastest kernel for a shape on this GPU, among the kernels with right results.

Before its first use each backend is tried on a tiny input. A backend that raises, or differs from plain torch by more
than its number format explains, is not used in this process. The other backends are timed once per shape, on the
tensors of the call, and the choice is kept in memory and on disk.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from postgen.kernels.attention import naive
from postgen.kernels.attention.backends import ASKED_FOR, LAST_RESORTS, TIMED, Backend, Call, Result
from postgen.kernels.attention.store import Store
from postgen.kernels.dispatch import warn_once

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""The largest relative L2 error, against float64, of a backend that is used. float32 leaves room for TF32."""
ROUNDS = 5
"""How many times each backend is timed; the median is compared."""
HOPELESS = 1.5
"""A backend that takes this many times as long as the fastest one in the first round is not timed again."""

Clock = Callable[[Callable[[], object], torch.device], float]
"""Runs a function on a device and returns how long it took, in milliseconds."""


class Problem(NamedTuple):
    """The properties of a call on which the choice depends.

    Numbers of tokens are rounded up (`bucket`), so that not every clip length is timed.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    channels: int
    lengths: bool
    lse: bool

    @classmethod
    def of(cls, call: Call) -> Problem:
        """Return the problem of a call."""
        batch, queries, heads, channels = call.query.shape
        keys, key_heads = call.key.shape[1:3]
        of_tensor = call.query.device, call.query.dtype
        sizes = batch, bucket(queries), bucket(keys), heads, key_heads, channels
        return cls(*of_tensor, *sizes, call.key_lengths is not None, call.lse)

    def __str__(self) -> str:
        """Return the key of the problem in the file of choices, without the device."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{dtype} B{self.batch} N{self.queries} M{self.keys} H{self.heads}/{self.key_heads} D{self.channels}"
        return sizes + " lengths" * self.lengths + " lse" * self.lse


class Trait(NamedTuple):
    """The properties of a call on which the correctness of a backend depends.

    These are the properties of `Problem` without the numbers of samples, tokens and heads; of the heads only whether
    several share one key head.
    """

    device: torch.device
    dtype: torch.dtype
    channels: int
    grouped: bool
    lengths: bool
    lse: bool

    @classmethod
    def of(cls, call: Call) -> Trait:
        """Return the trait of a call."""
        query = call.query
        return cls(query.device, query.dtype, query.shape[-1], call.grouped, call.key_lengths is not None, call.lse)


class Router:
    """Chooses a backend for every call and remembers the choices.

    Args:
        timed: the backends that the router times against each other.
        last_resorts: the fallbacks, which are not timed. The first one that supports a call runs if no timed backend
            can. The last one must support every call.
        asked_for: backends that the router runs only by name.
        store: keeps choices on disk; None keeps them in memory only.
        clock: the function that times a backend; None is `milliseconds`.
    """

    def __init__(
        self,
        timed: Sequence[Backend] = TIMED,
        last_resorts: Sequence[Backend] = LAST_RESORTS,
        *,
        asked_for: Sequence[Backend] = ASKED_FOR,
        store: Store | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.timed, self.last_resorts, self.asked_for = tuple(timed), tuple(last_resorts), tuple(asked_for)
        self.times: dict[Problem, dict[str, float]] = {}
        """Problem -> name of a backend -> milliseconds, for all problems that this process has timed."""
        self._store, self._clock = store, clock or milliseconds
        self._chosen: dict[Problem, Backend] = {}
        self._failures: dict[tuple[str, Trait], str | None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all backends."""
        return tuple(dict.fromkeys(backend.name for backend in self._all))

    @property
    def _all(self) -> tuple[Backend, ...]:
        return *self.timed, *self.last_resorts, *self.asked_for

    def why_not(self, backend: Backend, call: Call) -> str | None:
        """Return why a backend cannot run calls like this one, or None; each kind of call is tried once."""
        if reason := backend.refusal(call):
            return reason
        trait = Trait.of(call)
        if (backend.name, trait) not in self._failures:
            if _recording(call):
                # Results cannot be checked during recording. Only the fallbacks, which are torch's own, run unchecked.
                return None if backend in self.last_resorts else "it was not tried before a CUDA graph was recorded"
            self._failures[backend.name, trait] = _failure(backend, trait)
        return self._failures[backend.name, trait]

    def run(self, call: Call, name: str | None = None) -> Result:
        """Run a call on the backend with this name, or on the fastest one.

        If a backend raises that worked before, a fallback runs instead, now and in later calls, with one warning.
        """
        backend = self.choose(call) if name is None else self.named(name, call)
        try:
            return backend.compute(call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a kernel may not support a size that has not been tried
            if backend is self.last_resorts[-1]:
                raise
            reason = self._failures[backend.name, Trait.of(call)] = _first_line(error)
        self._chosen = {problem: each for problem, each in self._chosen.items() if each is not backend}
        instead = self.last_resort(call)
        warn_once(f"attention runs on {instead.name}, not on {backend.name}: {reason}")
        return instead.compute(call)

    def named(self, name: str, call: Call) -> Backend:
        """Return the backend with this name; if it cannot run, warn with the reason and return the fastest one.

        Raises:
            ValueError: no backend has this name.
        """
        found = [backend for backend in self._all if backend.name == name]
        if not found:
            raise ValueError(f"unknown attention backend {name!r}. Known: {', '.join(self.names)}")
        reason = self.why_not(found[0], call)
        if reason is None:
            return found[0]
        chosen = self.choose(call)
        warn_once(f"attention runs on {chosen.name}, not on {name}: {reason}")
        return chosen

    def choose(self, call: Call) -> Backend:
        """Return the fastest backend for a call, and time the backends if it is not known yet.

        While a CUDA graph is recorded nothing is timed, and a fallback runs for unknown problems.
        """
        problem = Problem.of(call)
        if (known := self._chosen.get(problem)) is not None:
            return known
        if _recording(call):
            return self.last_resort(call)
        chosen = self._stored(problem, call) or self._fastest(problem, call)
        self._chosen[problem] = chosen
        return chosen

    def last_resort(self, call: Call) -> Backend:
        """Return the first fallback that can run a call."""
        usable = (backend for backend in self.last_resorts[:-1] if self.why_not(backend, call) is None)
        return next(usable, self.last_resorts[-1])

    def _stored(self, problem: Problem, call: Call) -> Backend | None:
        name = self._store.get(problem) if self._store is not None else None
        found = [backend for backend in self.timed if backend.name == name]
        return found[0] if found and self.why_not(found[0], call) is None else None

    def _fastest(self, problem: Problem, call: Call) -> Backend:
        racing = [each for each in self.timed if call.key_lengths is not None or each.races_without_lengths]
        usable = [backend for backend in racing if self.why_not(backend, call) is None]
        times = self._time(usable, call)
        if not times:
            return self.last_resort(call)
        self.times[problem] = times
        fastest = min(times, key=times.__getitem__)
        if self._store is not None:
            self._store.put(problem, fastest, times)
        return next(backend for backend in usable if backend.name == fastest)

    def _time(self, backends: Sequence[Backend], call: Call) -> dict[str, float]:
        """Return the median milliseconds of every backend that runs at this size and is not hopelessly slow."""
        runs: dict[str, list[float]] = {}
        for backend in backends:
            try:
                # The first run compiles and fills the caches, so it is not timed.
                backend.run(call)
                runs[backend.name] = [self._clock(partial(backend.run, call), call.query.device)]
            except Exception as error:  # a kernel may raise anything at a size that it does not support
                warn_once(f"attention backend {backend.name} is not used at this size: {_first_line(error)}")
        best = min((times[0] for times in runs.values()), default=0.0)
        runs = {name: times for name, times in runs.items() if times[0] <= HOPELESS * best}
        racing = [backend for backend in backends if backend.name in runs]
        # The backends take turns, so that a slowdown of the GPU affects all of them.
        for _ in range(ROUNDS - 1 if len(racing) > 1 else 0):
            for backend in racing:
                runs[backend.name].append(self._clock(partial(backend.run, call), call.query.device))
        return {name: statistics.median(times) for name, times in runs.items()}


def bucket(tokens: int) -> int:
    """Round a number of tokens up to a power of 2 or to the middle between two powers of 2.

    >>> [bucket(n) for n in (1, 100, 4992, 17776, 32760, 75600)]
    [1, 128, 6144, 24576, 32768, 98304]
    """
    power = 1 << max(0, tokens - 1).bit_length()
    return power * 3 // 4 if tokens <= power * 3 // 4 else power


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that a function takes on a device."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end))


def _recording(call: Call) -> bool:
    return call.query.is_cuda and torch.cuda.is_current_stream_capturing()


def _failure(backend: Backend, trait: Trait) -> str | None:
    """Try a backend on a tiny input and return its failure as text, or None if its result is right."""
    call = _tiny(trait)
    try:
        with _silence():
            out, lse = backend.run(call)
        error = _error(call, out, lse)
    except Exception as raised:  # a kernel or its import may raise anything
        return f"{type(raised).__name__}: {_first_line(raised)}"
    limit = backend.tolerance or TOLERANCE[trait.dtype]
    return None if error <= limit else f"its numbers are wrong (relative error {error:.1e}, at most {limit:.0e})"


@contextmanager
def _silence() -> Iterator[None]:
    """Silence log messages and warnings of packages, because `_failure` reports the failure in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _tiny(trait: Trait) -> Call:
    """Return a small call with a trait: odd sizes, an unusual scale, and the same random numbers every time."""
    numbers = torch.Generator().manual_seed(0)
    heads, key_heads = (4, 2) if trait.grouped else (2, 2)

    def drawn(tokens: int, heads: int) -> Tensor:
        return torch.randn(2, tokens, heads, trait.channels, generator=numbers).to(trait.device, trait.dtype)

    lengths = torch.tensor([201, 37], dtype=torch.int32, device=trait.device) if trait.lengths else None
    query, key, value = drawn(70, heads), drawn(201, key_heads), drawn(201, key_heads)
    return Call(query, key, value, 1.5 * trait.channels**-0.5, lengths, trait.lse)


def _error(call: Call, out: Tensor, lse: Tensor | None) -> float:
    """Return the larger of the relative errors of output and LSE; infinity if one is missing or has a wrong shape."""
    exact = (x.double() for x in call[:3])
    expected, divisor = naive.attention(*exact, scale=call.scale, key_lengths=call.key_lengths)
    pairs = [(out, expected)]
    if call.lse:
        if lse is None:
            return float("inf")
        pairs.append((lse, divisor))
    if any(found.shape != wanted.shape for found, wanted in pairs):
        return float("inf")
    return max(float((found.double() - wanted).norm() / wanted.norm()) for found, wanted in pairs)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
