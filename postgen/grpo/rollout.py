"""Rollouts: samples drawn step by step, some steps stochastic, with what training needs of them.

The steps before the window are deterministic and, with a shared initial noise, the same for all samples of a prompt:
they are taken once. The steps after it are deterministic too, on a coarser grid and with a faster solver if wanted.
The last step always is: it ends in the clean latents that the network predicts there, which are what is decoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from postgen.families import Condition, Denoiser

from .config import Solver
from .kernels import Kind, Reduction, Schedule, Transition, transition
from .meter import Meter
from .seeds import normal
from .solver import Multistep, coarser

Conditions = Callable[[Sequence[int]], Condition]
"""Prompt numbers -> their conditions, stacked."""


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
    """(n, w + 1, ...) latents before, between and after the w stochastic steps."""
    log_probs: Tensor
    """(n, w) of the stochastic steps under the policy that drew them."""
    means: Tensor | None
    """(n, w, ...) means of their kernels, if they are wanted."""

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
    """Whether training needs the means of the kernels."""
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
        """Return the kernel of the step from indices `start` (B,): stochastic to the next index, or the ode to `stop`.

        Sampling and training both come here.
        """
        kind: Kind = self.how.kind if stop is None else "ode"
        levels = self.schedule.levels(start, start + 1 if stop is None else stop)
        return transition(kind, x, prediction, levels, self.how.noise, self.schedule.prediction_type)

    @torch.no_grad()
    def draw(self, samples: Sequence[Sample], conditions: Conditions, batch: int) -> Trajectories:
        """Draw samples, up to `batch` at a time; those of a batch have one window."""
        order: dict[int, list[int]] = {}
        for row, sample in enumerate(samples):
            order.setdefault(sample.start, []).append(row)
        chunks = [rows[low : low + batch] for rows in order.values() for low in range(0, len(rows), batch)]
        parts = [self._draw([samples[row] for row in rows], conditions) for rows in chunks]
        back = torch.tensor([row for rows in chunks for row in rows], device=self.device).argsort()
        return Trajectories.join(parts).rows(back)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Return initial or step noise, a row for each seed."""
        if self._shape is None:
            self._shape = latent_shape(self.denoiser, self.how.size, self.device)
        return normal(self._shape, seeds, self.device)

    def _draw(self, samples: Sequence[Sample], conditions: Conditions) -> Trajectories:
        begin, window = samples[0].start, self.how.window
        x, prompts = self._prefix(samples, conditions, begin)
        condition = conditions(prompts)
        states, log_probs, means = [x], [], []
        for index in range(begin, begin + window):
            now = self._index(index, len(samples))
            step = self.step(x, self._forward(x, now, condition), now)
            x = step.sample(self.noise([sample.step_seed(index) for sample in samples]))
            log_probs.append(step.log_prob(x, self.how.reduction))
            states.append(x)
            if self.how.keep_means:
                means.append(step.mean)
        return Trajectories(
            self._tail(x, begin + window, condition),
            self._index(begin, len(samples)),
            torch.stack(states, dim=1),
            torch.stack(log_probs, dim=1) if log_probs else x.new_zeros(len(x), 0),
            torch.stack(means, dim=1) if means else None,
        )

    def _prefix(self, samples: Sequence[Sample], conditions: Conditions, stop: int) -> tuple[Tensor, list[int]]:
        """Return the latents of every sample at step `stop`, and its prompt; equal beginnings are computed once."""
        keys = list(dict.fromkeys((sample.initial, sample.prompt) for sample in samples))
        x = self.noise([initial for initial, _ in keys])
        condition = conditions([prompt for _, prompt in keys]) if stop else {}
        for index in range(stop):
            now = self._index(index, len(keys))
            x = self.step(x, self._forward(x, now, condition), now, now + 1).mean
        place = {key: row for row, key in enumerate(keys)}
        rows = [place[sample.initial, sample.prompt] for sample in samples]
        return x[torch.tensor(rows, device=self.device)], [sample.prompt for sample in samples]

    def _tail(self, x: Tensor, start: int, condition: Condition) -> Tensor:
        """Take the steps after the window."""
        fast = Multistep() if self.how.solver == "dpm++" else None
        grid = coarser(start, self.schedule.steps, self.how.fraction)
        for index, after in itertools.pairwise(grid):
            now, then = self._index(index, len(x)), self._index(after, len(x))
            step = self.step(x, self._forward(x, now, condition), now, then)
            x = step.mean if fast is None else fast.step(x, step.clean, self.schedule.levels(now, then))
        return x

    def _forward(self, x: Tensor, start: Tensor, condition: Condition) -> Tensor:
        with self.meter.rollout(self.passes * len(x)):
            return self.predict(x, start, condition)

    def _index(self, index: int, rows: int) -> Tensor:
        return torch.full((rows,), index, device=self.device)
