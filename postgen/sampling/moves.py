"""What the sampler takes and yields: samples to draw, the moves of their latents, and the states after the moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .schedule import Levels
from .transition import Transition


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
    traced: Sequence[int] = ()
    """Which of the n rows keep the autograd graphs of their predictions, rising numbers from 0 to n - 1."""


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
    """Noise levels before and after the step; the network received `Schedule.received(start)`."""
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
    traced: Sequence[int] = ()
    """`Move.traced`."""
    graph: Tensor | None = None
    """(len(traced), ...) predictions of the traced rows with their autograd graphs; None if no row is traced."""


class Graphs(Protocol):
    """Chooses the predictions of `Sampler.draw` that keep their autograd graphs, and receives them."""

    def wanted(self, sample: Sample, step: int) -> bool:
        """Return whether the prediction of a sample at a stochastic step keeps its graph."""

    def take(self, samples: Sequence[Sample], state: State) -> None:
        """Receive the state of a step with graphs, and the samples of its traced rows."""
