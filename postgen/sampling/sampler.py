"""Samples drawn step by step, some steps stochastic, with what training needs of them.

The steps before the window are deterministic and, with a shared initial noise, the same for all samples of a prompt:
they are taken once. The steps after it are deterministic too, on a coarser grid and with a faster solver if wanted.
The last step always is: it ends in the clean latents that the network predicts there, which are what is decoded.

There is one loop, `Sampler.walk`, a generator of states. `states` gives it the steps of samples, `draw` collects what
`states` yields. Noise levels per frame, or steps that no `Sample` describes, go to `walk` directly.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Condition, Denoiser

from .conditions import Conditions
from .meter import Meter
from .schedule import Levels, Schedule
from .seeds import normal
from .solver import Multistep, Solver, coarser
from .transition import Kind, Reduction, Transition, transition


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample to draw."""

    index: int
    """Its number in the whole rollout, over all processes."""
    prompt: int
    """Number of its prompt, as the conditions know it."""
    initial: int
    """Seed of its initial noise; equal for the samples of a prompt that share it."""
    step_seed: Callable[[int], int]
    """Step -> seed of that step's noise."""
    start: int
    """Its first stochastic step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A step that some rows take together: one call of the network."""

    rows: slice
    """Which rows of the latents, as `slice(low, high)`."""
    start: Sequence[int] | Tensor
    """(n,) step indices where they stand, or (n, T), one for each latent frame."""
    stop: Sequence[int] | Tensor
    """Step indices where they go, of the same shape; a frame whose index stays the same waits."""
    seeds: Sequence[int] | None = None
    """Seeds of the noise of a stochastic step, a row each; none is a deterministic step."""
    multistep: bool = False
    """Whether a deterministic step is DPM-Solver++'s instead of Euler's. Its rows must begin with the first row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A step that has been taken, n rows."""

    samples: tuple[tuple[int, ...], ...]
    """Of each row, the samples that it belongs to, by position: several where they begin alike."""
    start: Tensor
    """(n,) or (n, T) step indices before the step."""
    stop: Tensor
    """Step indices after it."""
    levels: Levels
    """The noise levels there; `levels.s` is what the network was told."""
    x: Tensor
    """(n, ...) latents before the step, float32: what the network was shown."""
    prediction: Tensor
    """(n, ...) what it answered."""
    transition: Transition
    """The step as a Gaussian; `transition.clean` is the estimate of the clean latents."""
    after: Tensor
    """(n, ...) latents after the step."""
    stochastic: bool
    """Whether noise was added."""


@dataclass(slots=True)
class Trajectories:
    """What is left of drawn samples, n rows. Latents are float32."""

    clean: Tensor
    """(n, ...) finished latents."""
    start: Tensor
    """(n,) first stochastic step."""
    states: Tensor
    """(n, w + 1, ...) latents before, between and after the w stochastic steps; (n, 0) without any."""
    log_probs: Tensor
    """(n, w) of the stochastic steps under the policy that drew them."""
    means: Tensor | None = None
    """(n, w, ...) means of their transitions, if they are wanted."""
    kept: Tensor | None = None
    """(n, k, ...) latents on reaching the k steps that were asked for, if any were."""

    def rows(self, rows: Tensor) -> Trajectories:
        """Return some of the rows."""
        means = None if self.means is None else self.means[rows]
        kept = None if self.kept is None else self.kept[rows]
        return Trajectories(self.clean[rows], self.start[rows], self.states[rows], self.log_probs[rows], means, kept)

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """Return the rows of several, in their order."""
        means = [part.means for part in parts if part.means is not None]
        kept = [part.kept for part in parts if part.kept is not None]
        return Trajectories(
            torch.cat([part.clean for part in parts]),
            torch.cat([part.start for part in parts]),
            torch.cat([part.states for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            torch.cat(means) if means else None,
            torch.cat(kept) if kept else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How samples are drawn."""

    kind: Kind = "ode"
    """Transition of the stochastic steps, one of `transition.KINDS`; without such steps it does not matter."""
    noise: float = 0.0
    """Strength of their noise."""
    window: int = 0
    """Stochastic steps; with 0 everything is deterministic."""
    guidance: float = 1.0
    """Scale of classifier-free guidance."""
    solver: Solver = "euler"
    """Of the steps after the window."""
    fraction: float = 1.0
    """Share of those that are taken."""
    reduction: Reduction = "mean"
    """Of log-probabilities."""
    keep_means: bool = False
    """Whether training needs the means of the transitions."""
    size: dict[str, int] = field(default_factory=dict)
    """`num_frames`, `height` and `width`, as `Denoiser.latent_shape` takes them."""


class Sampler:
    """Draws samples with a denoiser and scores transitions with it again: one function for both.

    Args:
        denoiser: the policy.
        schedule: noise levels of the steps.
        sampling: how to draw.
        meter: counts and times the passes through the network; None is one of its own.
        device: where latents live.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        sampling: Sampling,
        meter: Meter | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.denoiser, self.schedule, self.how = denoiser, schedule, sampling
        self.device = torch.device(device)
        self.meter = meter or Meter(self.device)
        self.passes = 2 if sampling.guidance > 1 else 1

    def predict(self, x: Tensor, start: Tensor, condition: Condition) -> Tensor:
        """Return the network's prediction at step indices (B,), or (B, T) where the model takes levels per frame."""
        sigma = self.schedule.sigmas[start].to(torch.float32)
        return self.denoiser.predict(x, sigma, condition, self.how.guidance)

    def step(self, x: Tensor, prediction: Tensor, start: Tensor, stop: Tensor | None = None) -> Transition:
        """Return the step from indices `start`: stochastic to the next index, or the ode's to `stop`.

        Sampling and training both come here.
        """
        levels = self.schedule.levels(start, start + 1 if stop is None else stop)
        return self._transition(x, prediction, levels, stochastic=stop is None)

    @torch.no_grad()
    def draw(
        self, samples: Sequence[Sample], conditions: Conditions, batch: int, *, keep: Sequence[int] = ()
    ) -> Trajectories:
        """Draw samples, up to `batch` at a time, wherever their windows lie.

        Args:
            samples: which ones.
            conditions: of their prompts.
            batch: samples drawn together.
            keep: step indices whose latents are kept as `Trajectories.kept`, in this order: 0 is the initial noise,
                the number of steps the clean latents.

        Raises:
            UserError: no samples, a batch of none, or a step of `keep` that a sample does not reach, as on a coarser
                grid.
        """
        if not samples or batch < 1:
            raise UserError(
                f"there is nothing to draw: {len(samples)} samples, {batch} at a time; give at least 1 each"
            )
        self._check_keep(samples, keep)
        order = sorted(range(len(samples)), key=lambda row: samples[row].start)
        chunks = [order[low : low + batch] for low in range(0, len(order), batch)]
        parts = [self._collect([samples[row] for row in rows], conditions, keep) for rows in chunks]
        back = torch.tensor(order, device=self.device).argsort()
        return Trajectories.join(parts).rows(back)

    @torch.no_grad()
    def states(self, samples: Sequence[Sample], conditions: Conditions) -> Iterator[State]:
        """Draw samples in one batch and yield every step that is taken.

        Equal beginnings are drawn once: such a row belongs to several samples. The last state is that of all samples,
        and its `after` are their clean latents, in the order of their windows (`State.samples` names them).

        Args:
            samples: which ones, in any order.
            conditions: of their prompts.

        Raises:
            ValueError: a window that reaches the last step.
        """
        if not samples:
            return
        order = sorted(range(len(samples)), key=lambda row: samples[row].start)
        rows = [samples[row] for row in order]
        if rows and rows[-1].start + self.how.window >= self.schedule.steps:
            raise ValueError(f"the last of {self.schedule.steps} steps has no noise, a window ends after it")
        owners: dict[tuple[int, int, int], list[int]] = {}
        for row, sample in zip(order, rows, strict=True):
            owners.setdefault((sample.initial, sample.prompt, sample.start), []).append(row)
        starts = [start for _, _, start in owners]
        x = self.noise([initial for initial, _, _ in owners])
        told = conditions([prompt for _, prompt, _ in owners]) if max(starts) else {}
        x = yield from self.walk(x, _prefix(starts), told, list(map(tuple, owners.values())))
        index = {key: row for row, key in enumerate(owners)}
        x = x[self._index([index[sample.initial, sample.prompt, sample.start] for sample in rows])]
        told = conditions([sample.prompt for sample in rows])
        yield from self.walk(x, [*self._window(rows), *self._tail(rows)], told, [(row,) for row in order])

    @torch.no_grad()
    def walk(
        self,
        x: Tensor,
        moves: Iterable[Move],
        condition: Condition,
        samples: Sequence[tuple[int, ...]] | None = None,
    ) -> Generator[State, None, Tensor]:
        """Take steps one after the other, yield each, and return the latents at the end.

        Args:
            x: (B, ...) latents at the beginning, float32.
            moves: the steps.
            condition: of the B rows.
            samples: what `State.samples` says of each row; none is the number of the row.

        Raises:
            UserError: a move with another number of rows, indices or seeds, or a `multistep` without the first row.
        """
        names = [(row,) for row in range(len(x))] if samples is None else samples
        solver = Multistep()
        for move in moves:
            part, told = x[move.rows], {name: value[move.rows] for name, value in condition.items()}
            start, stop = self._index(move.start), self._index(move.stop)
            _check_move(move, len(part), start, stop)
            levels = self.schedule.levels(start, stop)
            with self.meter.rollout(self.passes * len(part)):
                prediction = self.predict(part, start, told)
            step = self._transition(part, prediction, levels, stochastic=move.seeds is not None)
            if move.seeds is not None:
                after = step.sample(self.noise(move.seeds))
            else:
                after = solver.step(part, step.clean, levels) if move.multistep else step.mean
            low, high, _ = move.rows.indices(len(x))
            x = after if len(after) == len(x) else torch.cat([x[:low], after, x[high:]])
            yield State(
                samples=tuple(names[low:high]),
                start=start,
                stop=stop,
                levels=levels,
                x=part,
                prediction=prediction,
                transition=step,
                after=after,
                stochastic=move.seeds is not None,
            )
        return x

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Return initial or step noise, a row for each seed."""
        return normal(self.denoiser.latent_shape(**self.how.size), seeds, self.device)

    def _transition(self, x: Tensor, prediction: Tensor, levels: Levels, *, stochastic: bool) -> Transition:
        kind: Kind = self.how.kind if stochastic else "ode"
        return transition(kind, x, prediction, levels, self.how.noise, self.schedule.prediction_type)

    def _window(self, samples: Sequence[Sample]) -> Iterator[Move]:
        """Return the stochastic steps, which all samples take together, wherever they stand."""
        for offset in range(self.how.window):
            now = [sample.start + offset for sample in samples]
            seeds = [sample.step_seed(step) for sample, step in zip(samples, now, strict=True)]
            yield Move(rows=slice(0, len(now)), start=now, stop=[step + 1 for step in now], seeds=seeds)

    def _grid(self, sample: Sample) -> list[int]:
        """Return the step indices from the end of a sample's window to the clean latents."""
        return coarser(sample.start + self.how.window, self.schedule.steps, self.how.fraction)

    def _tail(self, samples: Sequence[Sample]) -> Iterator[Move]:
        """Return the steps after the windows; the first rows have the most, the others join them."""
        grids = [self._grid(sample) for sample in samples]
        for left in range(len(grids[0]) - 1, 0, -1):
            count = sum(len(grid) > left for grid in grids)
            now = [grid[-1 - left] for grid in grids[:count]]
            then = [grid[-left] for grid in grids[:count]]
            yield Move(rows=slice(0, count), start=now, stop=then, multistep=self.how.solver == "dpm++")

    def _check_keep(self, samples: Sequence[Sample], keep: Sequence[int]) -> None:
        for sample in samples if keep else ():
            reached = {*range(sample.start + self.how.window), *self._grid(sample)}
            if missing := [step for step in keep if step not in reached]:
                raise UserError(
                    f"keep names steps {missing}, which are not taken: choose from {sorted(reached)}, or take all "
                    "steps after the window (a fraction of 1)"
                )

    def _collect(self, samples: Sequence[Sample], conditions: Conditions, keep: Sequence[int]) -> Trajectories:
        """Draw samples that are in the order of their windows."""
        states: list[Tensor] = []
        log_probs: list[Tensor] = []
        means: list[Tensor] = []
        kept: list[dict[int, Tensor]] = [{} for _ in samples]
        for state in self.states(samples, conditions):
            if keep:
                _keep(state, kept, keep)
            if state.stochastic:
                states += [state.after] if states else [state.x, state.after]
                log_probs.append(state.transition.log_prob(state.after, self.how.reduction))
                means += [state.transition.mean] if self.how.keep_means else []
        clean = state.after
        nothing = clean.new_zeros(len(clean), 0)
        return Trajectories(
            clean,
            self._index([sample.start for sample in samples]),
            torch.stack(states, dim=1) if states else nothing,
            torch.stack(log_probs, dim=1) if log_probs else nothing,
            torch.stack(means, dim=1) if means else None,
            torch.stack([torch.stack([row[step] for step in keep]) for row in kept]) if keep else None,
        )

    def _index(self, indices: Sequence[int] | Tensor) -> Tensor:
        return torch.as_tensor(indices, device=self.device)


def _check_move(move: Move, rows: int, start: Tensor, stop: Tensor) -> None:
    """Refuse what broadcasting would take, one seed for several rows for instance, and a history of other rows."""
    seeds = rows if move.seeds is None else len(move.seeds)
    if not rows or start.shape != stop.shape or start.shape[:1] != (rows,) or seeds != rows:
        raise UserError(
            f"a move of {rows} rows has start {tuple(start.shape)}, stop {tuple(stop.shape)} and {seeds} seeds:"
            " give one of each for each of its rows, at least one"
        )
    if move.rows.step not in (None, 1):
        raise UserError(f"the rows of a move stand side by side, got {move.rows}")
    if move.multistep and move.rows.start:
        raise UserError(f"the rows of a multistep move begin with the first, got {move.rows}: walk the others alone")


def _prefix(starts: Sequence[int]) -> Iterator[Move]:
    """Return the deterministic steps to the windows; `starts` are in order, so that the first rows end first."""
    for index in range(max(starts)):
        done = sum(start <= index for start in starts)
        left = len(starts) - done
        yield Move(rows=slice(done, len(starts)), start=[index] * left, stop=[index + 1] * left)


def _keep(state: State, kept: Sequence[dict[int, Tensor]], wanted: Sequence[int]) -> None:
    """Note the latents of the wanted steps, by sample: before the step, and after the last one."""
    for steps, latents in ((state.start, state.x), (state.stop, state.after)):
        for row, step in enumerate(steps.tolist()):
            for sample in state.samples[row] if step in wanted else ():
                kept[sample].setdefault(step, latents[row])
