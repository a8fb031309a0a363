"""Reuse of the rollout's forward passes for the only update of a rollout (LeanGRPO, arXiv:2609.03528).

With one update per rollout the ratio is 1, and the gradient of the loss is -A grad log p, where p is the probability
of a step that the rollout has just taken. A second forward pass in training would compute the same prediction again.

- `RetainedGraphs` keeps the autograd graphs of the trained steps until the advantages A are known.
- `ScoreGradients` runs the backward pass of log p at once, and keeps one gradient per sample to multiply by A later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from postgen.sampling.sampler import Sample, State

from .numbers import RolloutNumber, SampleNumber
from .window import Window


class TrainedSteps:
    """The steps of a rollout's samples that are trained. Base of the two classes below.

    Args:
        window: the window of stochastic steps.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self._rollout = RolloutNumber(0)
        self._steps: dict[int, set[int]] = {}

    def begin(self, rollout: RolloutNumber) -> None:
        """Forget the last rollout; the next samples belong to this one."""
        self._rollout = rollout
        self._steps = {}

    def wanted(self, sample: Sample, step: int) -> bool:
        """Return whether a step of a sample is trained. See `sampling.sampler.Graphs`."""
        if sample.index not in self._steps:
            offsets = self.window.trained(self._rollout, SampleNumber(sample.index)).tolist()
            self._steps[sample.index] = {sample.start + offset for offset in offsets}
        return step in self._steps[sample.index]


class RetainedGraphs(TrainedSteps):
    """Keeps the predictions of trained steps with their graphs, as leaves that collect the gradient of the loss.

    `predictions` returns the leaves of a micro-batch. The losses of all micro-batches run their backward passes into
    the leaves. Then `backward` runs each graph once, from the collected gradient.
    """

    def __init__(self, window: Window) -> None:
        super().__init__(window)
        self._kept: deque[tuple[Tensor, Tensor]] = deque()
        self._place: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def begin(self, rollout: RolloutNumber) -> None:
        """Drop the graphs of the last rollout."""
        super().begin(rollout)
        self._kept, self._place = deque(), {}

    def take(self, samples: Sequence[Sample], state: State) -> None:
        """Keep the graph of a step. See `sampling.sampler.Graphs`."""
        assert state.graph is not None
        leaf = state.graph.detach().requires_grad_(True)
        self._kept.append((state.graph, leaf))
        steps = state.start[list(state.traced)].tolist()
        for row, (sample, step) in enumerate(zip(samples, steps, strict=True)):
            self._place[sample.index, step] = leaf, row

    def predictions(self, samples: Iterable[SampleNumber], steps: Tensor) -> Tensor:
        """Return the (B, ...) predictions of B samples at step indices (B,), attached to the leaves."""
        found = [self._place[sample, step] for sample, step in zip(samples, steps.tolist(), strict=True)]
        return torch.stack([leaf[row] for leaf, row in found])

    def backward(self) -> None:
        """Run the backward passes of all graphs, add the gradients of the weights, and free the graphs."""
        while self._kept:  # in the order of the rollout, and each graph is freed as soon as it was used
            graph, leaf = self._kept.popleft()
            if leaf.grad is not None:
                torch.autograd.backward(graph, leaf.grad)
        self._place = {}


class ScoreGradients(TrainedSteps):
    """Keeps for each sample the gradient of its weighted log-probabilities by the trained weights.

    Args:
        window: the window of stochastic steps.
        weights: returns the trained weights.
        score: returns the sum over the traced rows of a state: log-probability times weight, with its graph.
    """

    def __init__(
        self, window: Window, weights: Callable[[], Mapping[str, nn.Parameter]], score: Callable[[State], Tensor]
    ) -> None:
        super().__init__(window)
        self._weights, self._score = weights, score
        self._gradients: dict[int, list[Tensor | None]] = {}

    def begin(self, rollout: RolloutNumber) -> None:
        """Drop the gradients of the last rollout."""
        super().begin(rollout)
        self._gradients = {}

    def take(self, samples: Sequence[Sample], state: State) -> None:
        """Run the backward pass of a step of one sample. See `sampling.sampler.Graphs`."""
        (sample,) = samples  # rollout_batch_size is 1
        with torch.enable_grad():
            score = self._score(state)
        found = torch.autograd.grad(score, list(self._weights().values()), allow_unused=True)
        before = self._gradients.get(sample.index, [None] * len(found))
        self._gradients[sample.index] = [_sum(one, other) for one, other in zip(before, found, strict=True)]

    @torch.no_grad()
    def add(self, factors: Mapping[SampleNumber, float]) -> None:
        """Add factor times the gradient of each sample to the gradients of the weights, and free it."""
        for sample, factor in factors.items():
            for weight, gradient in zip(self._weights().values(), self._gradients.pop(sample), strict=True):
                if gradient is not None:
                    weight.grad = _sum(weight.grad, gradient.mul_(factor))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one.add_(other)
