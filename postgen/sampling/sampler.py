"""Rollouts: samples drawn step by step, some steps stochastic, with what training needs of them.

The steps before the window are deterministic and, with a shared initial noise, the same for all samples of a prompt:
they are taken once. The steps after it are deterministic too, on a coarser grid and with a faster solver if wanted.
The last step always is: it ends in the clean latents that the network predicts there, which are what is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from postgen.families import Condition, Denoiser

from .conditions import Conditions
from .meter import Meter
from .schedule import Schedule
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


@dataclass(slots=True)
class Trajectories:
    """What rollouts leave, n rows. Latents are float32."""

    clean: Tensor
    """(n, ...) finished latents."""
    start: Tensor
    """(n,) first stochastic step."""
    states: Tensor
    """(n, w + 1, ...) latents before, between and after the w stochastic steps; (n, 0) without any."""
    log_probs: Tensor
    """(n, w) of the stochastic steps under the policy that drew them."""
    means: Tensor | None
    """(n, w, ...) means of their transitions, if they are wanted."""

    def rows(self, rows: Tensor) -> Trajectories:
        """Return some of the rows."""
        means = None if self.means is None else self.means[rows]
        return Trajectories(self.clean[rows], self.start[rows], self.states[rows], self.log_probs[rows], means)

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """Return the rows of several, in their order."""
        means = [part.means for part in parts if part.means is not None]
        return Trajectories(
            torch.cat([part.clean for part in parts]),
            torch.cat([part.start for part in parts]),
            torch.cat([part.states for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            torch.cat(means) if means else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How samples are drawn."""

    kind: Kind
    """Kernel of the stochastic steps."""
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
    """`num_frames`, `height` and `width`, as `Denoiser.initial_latents` takes them."""


def latent_shape(denoiser: Denoiser, size: dict[str, int], device: torch.device) -> tuple[int, ...]:
    """Return the shape of one sample's latents.

    Args:
        denoiser: the model.
        size: `num_frames`, `height` and `width`.
        device: of its latents.
    """
    source = torch.Generator(device).manual_seed(0)
    return tuple(denoiser.initial_latents(1, **size, generator=source).shape[1:])


class Sampler:
    """Draws samples with a denoiser and scores transitions with it again: one function for both.

    Args:
        denoiser: the policy.
        schedule: noise levels of the steps.
        sampling: how to draw.
        meter: counts and times the passes through the network.
        device: where latents live.
    """

    def __init__(
        self, denoiser: Denoiser, schedule: Schedule, sampling: Sampling, meter: Meter, device: torch.device
    ) -> None:
        self.denoiser, self.schedule, self.how = denoiser, schedule, sampling
        self.meter, self.device = meter, device
        self.passes = 2 if sampling.guidance > 1 else 1
        self._shape: tuple[int, ...] | None = None

    def predict(self, x: Tensor, start: Tensor, condition: Condition) -> Tensor:
        """Return the network's prediction at step indices (B,)."""
        sigma = self.schedule.sigmas[start].to(torch.float32)
        return self.denoiser.predict(x, sigma, condition, self.how.guidance)

    def step(self, x: Tensor, prediction: Tensor, start: Tensor, stop: Tensor | None = None) -> Transition:
        """Return the step from indices `start` (B,): stochastic to the next index, or the ode's to `stop`.

        Sampling and training both come here.
        """
        kind: Kind = self.how.kind if stop is None else "ode"
        levels = self.schedule.levels(start, start + 1 if stop is None else stop)
        return transition(kind, x, prediction, levels, self.how.noise, self.schedule.prediction_type)

    @torch.no_grad()
    def draw(self, samples: Sequence[Sample], conditions: Conditions, batch: int) -> Trajectories:
        """Draw samples, up to `batch` at a time, wherever their windows lie."""
        order = sorted(range(len(samples)), key=lambda row: samples[row].start)
        chunks = [order[low : low + batch] for low in range(0, len(order), batch)]
        parts = [self._draw([samples[row] for row in rows], conditions) for rows in chunks]
        back = torch.tensor(order, device=self.device).argsort()
        return Trajectories.join(parts).rows(back)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Return initial or step noise, a row for each seed."""
        if self._shape is None:
            self._shape = latent_shape(self.denoiser, self.how.size, self.device)
        return normal(self._shape, seeds, self.device)

    def _draw(self, samples: Sequence[Sample], conditions: Conditions) -> Trajectories:
        """Draw samples that are in the order of their windows."""
        starts = [sample.start for sample in samples]
        first = self._index(starts)
        x = self._prefix(samples, conditions)
        condition = conditions([sample.prompt for sample in samples])
        states, log_probs, means = [x], [], []
        for place in range(self.how.window):
            now = first + place
            step = self.step(x, self._forward(x, now, condition), now)
            x = step.sample(self.noise([sample.step_seed(sample.start + place) for sample in samples]))
            log_probs.append(step.log_prob(x, self.how.reduction))
            states.append(x)
            if self.how.keep_means:
                means.append(step.mean)
        return Trajectories(
            self._tail(x, starts, condition),
            first,
            torch.stack(states, dim=1) if log_probs else x.new_zeros(len(x), 0),
            torch.stack(log_probs, dim=1) if log_probs else x.new_zeros(len(x), 0),
            torch.stack(means, dim=1) if means else None,
        )

    def _prefix(self, samples: Sequence[Sample], conditions: Conditions) -> Tensor:
        """Return the latents of every sample at the start of its window; equal beginnings are computed once."""
        keys = list(dict.fromkeys((sample.initial, sample.prompt, sample.start) for sample in samples))
        x = self.noise([initial for initial, _, _ in keys])
        stop = max(start for _, _, start in keys)
        condition = conditions([prompt for _, prompt, _ in keys]) if stop else {}
        for index in range(stop):
            # The first rows are there already.
            done = sum(start <= index for _, _, start in keys)
            part, now = x[done:], self._index([index] * (len(keys) - done))
            told = {name: value[done:] for name, value in condition.items()}
            x = torch.cat([x[:done], self.step(part, self._forward(part, now, told), now, now + 1).mean])
        place = {key: row for row, key in enumerate(keys)}
        return x[self._index([place[sample.initial, sample.prompt, sample.start] for sample in samples])]

    def _tail(self, x: Tensor, starts: Sequence[int], condition: Condition) -> Tensor:
        """Take the steps after the windows; the first rows have the most, the others join them."""
        fast = Multistep() if self.how.solver == "dpm++" else None
        steps, window, fraction = self.schedule.steps, self.how.window, self.how.fraction
        grids = [coarser(start + window, steps, fraction) for start in starts]
        for left in range(len(grids[0]) - 1, 0, -1):
            count = sum(len(grid) > left for grid in grids)
            now = self._index([grid[-1 - left] for grid in grids[:count]])
            then = self._index([grid[-left] for grid in grids[:count]])
            part, told = x[:count], {name: value[:count] for name, value in condition.items()}
            step = self.step(part, self._forward(part, now, told), now, then)
            moved = step.mean if fast is None else fast.step(part, step.clean, self.schedule.levels(now, then))
            x = torch.cat([moved, x[count:]])
        return x

    def _forward(self, x: Tensor, start: Tensor, condition: Condition) -> Tensor:
        with self.meter.rollout(self.passes * len(x)):
            return self.predict(x, start, condition)

    def _index(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor(indices, device=self.device)
