"""The sampling loop: deterministic and stochastic steps, with the latents and log-probabilities that training needs.

The window is a run of consecutive stochastic steps. The steps before it are deterministic, and samples of a prompt
with the same initial noise share them, so they are taken once. The steps after the window are deterministic,
optionally on a coarser grid and with a faster solver. The last step is always deterministic. It ends in the clean
latents that the network predicts there, and these are decoded.

`Sampler.walk` is the loop, a generator of states. `Sampler.states` passes the steps of samples to `walk`, and
`Sampler.draw` collects the states. Callers with noise levels per frame, or with other steps, call `walk` directly.
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
    """A sample to draw."""

    index: int
    """Number of the sample in the whole rollout, over all processes."""
    prompt: int
    """Number of its prompt; the `Conditions` function receives this number."""
    initial: int
    """Seed of its initial noise; samples with the same seed share the noise."""
    step_seed: Callable[[int], int]
    """Step index -> seed of the noise of that step."""
    start: int
    """Step index of its first stochastic step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A step that n rows of the latents take together, with one call of the network."""

    rows: slice
    """The n rows, as `slice(low, high)`."""
    start: Sequence[int] | Tensor
    """(n,) step indices before the step, or (n, T), one for each latent frame."""
    stop: Sequence[int] | Tensor
    """(n,) or (n, T) step indices after the step; a frame with equal indices does not change."""
    seeds: Sequence[int] | None = None
    """n seeds of the noise of a stochastic step; None for a deterministic step."""
    multistep: bool = False
    """Use DPM-Solver++ instead of Euler for a deterministic step. `rows` must then begin with the first row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Result of one step of n rows."""

    samples: tuple[tuple[int, ...], ...]
    """For each row the positions (in the list of samples) of its samples; several if they share their first steps."""
    start: Tensor
    """(n,) or (n, T) step indices before the step."""
    stop: Tensor
    """(n,) or (n, T) step indices after the step."""
    levels: Levels
    """Noise levels before and after the step; the network received `levels.s`."""
    x: Tensor
    """(n, ...) latents before the step, float32, the input of the network."""
    prediction: Tensor
    """(n, ...) prediction of the network."""
    transition: Transition
    """The step as a Gaussian; `transition.clean` is the estimate of the clean latents."""
    after: Tensor
    """(n, ...) latents after the step."""
    stochastic: bool
    """Whether the step added noise."""


@dataclass(slots=True)
class Trajectories:
    """The latents and log-probabilities that are kept of n drawn samples. Latents are float32."""

    clean: Tensor
    """(n, ...) clean latents at the end."""
    start: Tensor
    """(n,) step index of the first stochastic step."""
    states: Tensor
    """(n, w + 1, ...) latents before, between and after the w stochastic steps; (n, 0) if w is 0."""
    log_probs: Tensor
    """(n, w) log-probabilities of the stochastic steps under the policy that drew them."""
    means: Tensor | None = None
    """(n, w, ...) means of the stochastic transitions; None unless `Sampling.keep_means`."""
    kept: Tensor | None = None
    """(n, k, ...) latents at the k step indices `keep` of `Sampler.draw`; None without them."""

    def rows(self, rows: Tensor) -> Trajectories:
        """Return the trajectories of some rows, (m,) row indices."""
        means = None if self.means is None else self.means[rows]
        kept = None if self.kept is None else self.kept[rows]
        return Trajectories(self.clean[rows], self.start[rows], self.states[rows], self.log_probs[rows], means, kept)

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """Concatenate the rows of several trajectories, in order."""
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
    """Settings of a `Sampler`."""

    kind: Kind = "ode"
    """Transition of the stochastic steps, one of `transition.KINDS`; no effect without stochastic steps."""
    noise: float = 0.0
    """Strength of the noise of stochastic steps."""
    window: int = 0
    """Number of stochastic steps of a sample; with 0 all steps are deterministic."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; values up to 1 disable guidance."""
    solver: Solver = "euler"
    """Solver of the steps after the window."""
    fraction: float = 1.0
    """Share in (0, 1] of the steps after the window that are taken, on a coarser grid."""
    reduction: Reduction = "mean"
    """Reduction of log-probabilities over latent values."""
    keep_means: bool = False
    """Whether trajectories keep the means of the stochastic transitions."""
    size: dict[str, int] = field(default_factory=dict)
    """`num_frames`, `height` and `width`, the arguments of `Denoiser.latent_shape`."""


class Sampler:
    """Draws samples with a denoiser; training calls the same `predict` and `step` to compute log-probabilities again.

    Args:
        denoiser: the policy.
        schedule: noise levels of the steps.
        sampling: settings.
        meter: counts and times the passes through the network; None creates a new meter.
        device: device of the latents.
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
        """Return the prediction (B, ...) for latents `x` at step indices `start`, (B,) or per latent frame (B, T)."""
        sigma = self.schedule.sigmas[start].to(torch.float32)
        return self.denoiser.predict(x, sigma, condition, self.how.guidance)

    def step(self, x: Tensor, prediction: Tensor, start: Tensor, stop: Tensor | None = None) -> Transition:
        """Return the step from step indices `start`: stochastic to the next index, or deterministic to `stop`."""
        levels = self.schedule.levels(start, start + 1 if stop is None else stop)
        return self._transition(x, prediction, levels, stochastic=stop is None)

    @torch.no_grad()
    def draw(
        self, samples: Sequence[Sample], conditions: Conditions, batch: int, *, keep: Sequence[int] = ()
    ) -> Trajectories:
        """Draw samples, whose windows may differ, and return their trajectories in the order of `samples`.

        Args:
            samples: the samples to draw.
            conditions: returns the conditions of prompt numbers.
            batch: maximum number of samples drawn together.
            keep: step indices whose latents `Trajectories.kept` returns, in this order. Index 0 is the initial noise,
                the number of steps is the clean latents.

        Raises:
            UserError: there are no samples, `batch` is below 1, or a sample does not reach a step of `keep`, for
                example because of a coarser grid.
        """
        if not samples or batch < 1:
            raise UserError(
                f"there is nothing to draw: {len(samples)} samples, batch {batch}; both must be at least 1"
            )
        self._check_keep(samples, keep)
        order = sorted(range(len(samples)), key=lambda row: samples[row].start)
        chunks = [order[low : low + batch] for low in range(0, len(order), batch)]
        parts = [self._collect([samples[row] for row in rows], conditions, keep) for rows in chunks]
        back = torch.tensor(order, device=self.device).argsort()
        return Trajectories.join(parts).rows(back)

    @torch.no_grad()
    def states(self, samples: Sequence[Sample], conditions: Conditions) -> Iterator[State]:
        """Draw samples in one batch and yield the state of every step.

        Steps that samples share before their windows are taken once; such a row belongs to several samples. The last
        state has all samples. Its `after` are their clean latents, ordered by the start of their windows, and
        `State.samples` names the sample of each row.

        Args:
            samples: the samples to draw, in any order.
            conditions: returns the conditions of prompt numbers.

        Raises:
            ValueError: a window contains the last step.
        """
        if not samples:
            return
        order = sorted(range(len(samples)), key=lambda row: samples[row].start)
        rows = [samples[row] for row in order]
        if rows and rows[-1].start + self.how.window >= self.schedule.steps:
            raise ValueError(f"the last of {self.schedule.steps} steps has no noise: a window must end before it")
        # `owners` maps each distinct beginning (seed, prompt, first stochastic step) to the samples that share it.
        owners: dict[tuple[int, int, int], list[int]] = {}
        for row, sample in zip(order, rows, strict=True):
            owners.setdefault((sample.initial, sample.prompt, sample.start), []).append(row)
        starts = [start for _, _, start in owners]
        x = self.noise([initial for initial, _, _ in owners])
        condition = conditions([prompt for _, prompt, _ in owners]) if max(starts) else {}
        x = yield from self.walk(x, _prefix(starts), condition, list(map(tuple, owners.values())))
        index = {key: row for row, key in enumerate(owners)}
        x = x[self._index([index[sample.initial, sample.prompt, sample.start] for sample in rows])]
        condition = conditions([sample.prompt for sample in rows])
        yield from self.walk(x, [*self._window(rows), *self._tail(rows)], condition, [(row,) for row in order])

    @torch.no_grad()
    def walk(
        self,
        x: Tensor,
        moves: Iterable[Move],
        condition: Condition,
        samples: Sequence[tuple[int, ...]] | None = None,
    ) -> Generator[State, None, Tensor]:
        """Take steps one after the other, yield the state of each, and return the latents (B, ...) at the end.

        Args:
            x: (B, ...) initial latents, float32.
            moves: the steps.
            condition: condition of the B rows.
            samples: value of `State.samples` for each row; None uses the index of the row.

        Raises:
            UserError: a move has different numbers of rows, indices and seeds, or a `multistep` move does not begin
                with the first row.
        """
        names = [(row,) for row in range(len(x))] if samples is None else samples
        solver = Multistep()
        for move in moves:
            part, part_condition = x[move.rows], {name: value[move.rows] for name, value in condition.items()}
            start, stop = self._index(move.start), self._index(move.stop)
            _check_move(move, len(part), start, stop)
            levels = self.schedule.levels(start, stop)
            with self.meter.rollout(self.passes * len(part)):
                prediction = self.predict(part, start, part_condition)
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
        """Return standard normal noise of the latents' shape, one row for each seed."""
        return normal(self.denoiser.latent_shape(**self.how.size), seeds, self.device)

    def _transition(self, x: Tensor, prediction: Tensor, levels: Levels, *, stochastic: bool) -> Transition:
        kind: Kind = self.how.kind if stochastic else "ode"
        return transition(kind, x, prediction, levels, self.how.noise, self.schedule.prediction_type)

    def _window(self, samples: Sequence[Sample]) -> Iterator[Move]:
        """Yield the stochastic steps; all samples take them together, at the step indices of their own windows."""
        for offset in range(self.how.window):
            now = [sample.start + offset for sample in samples]
            seeds = [sample.step_seed(step) for sample, step in zip(samples, now, strict=True)]
            yield Move(rows=slice(0, len(now)), start=now, stop=[step + 1 for step in now], seeds=seeds)

    def _grid(self, sample: Sample) -> list[int]:
        """Return the step indices from the end of a sample's window to the clean latents."""
        return coarser(sample.start + self.how.window, self.schedule.steps, self.how.fraction)

    def _tail(self, samples: Sequence[Sample]) -> Iterator[Move]:
        """Yield the steps after the windows; `samples` is sorted, so the first rows have the most steps left.

        Later rows join when they have as many steps left as the first row.
        """
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
                    f"keep has steps {missing}, which the sampler does not take: choose from {sorted(reached)}, or "
                    "take all steps after the window (fraction 1)"
                )

    def _collect(self, samples: Sequence[Sample], conditions: Conditions, keep: Sequence[int]) -> Trajectories:
        """Draw one batch, as `draw` does. The samples must already be sorted by the start of their windows."""
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
    """Check the sizes of a move: tensor broadcasting would accept, for example, one seed for several rows.

    A multistep move must begin with the first row, because the solver keeps the history of rows from the first on.
    """
    seeds = rows if move.seeds is None else len(move.seeds)
    if not rows or start.shape != stop.shape or start.shape[:1] != (rows,) or seeds != rows:
        raise UserError(
            f"a move of {rows} rows has start {tuple(start.shape)}, stop {tuple(stop.shape)} and {seeds} seeds:"
            " give at least one row, and one start, stop and seed for each row"
        )
    if move.rows.step not in (None, 1):
        raise UserError(f"the rows of a move must be consecutive, got {move.rows}: use a slice with step 1")
    if move.multistep and move.rows.start:
        raise UserError(
            f"a multistep move must begin with the first row, got {move.rows}: call walk separately for these rows"
        )


def _prefix(starts: Sequence[int]) -> Iterator[Move]:
    """Yield the deterministic steps before the windows; `starts` is sorted, so the first rows end first."""
    for index in range(max(starts)):
        done = sum(start <= index for start in starts)
        left = len(starts) - done
        yield Move(rows=slice(done, len(starts)), start=[index] * left, stop=[index + 1] * left)


def _keep(state: State, kept: Sequence[dict[int, Tensor]], wanted: Sequence[int]) -> None:
    """Store the latents of a state in `kept` (step index -> latents, for each sample), for wanted step indices."""
    for steps, latents in ((state.start, state.x), (state.stop, state.after)):
        for row, step in enumerate(steps.tolist()):
            for sample in state.samples[row] if step in wanted else ():
                kept[sample].setdefault(step, latents[row])
