"""Which steps of a rollout are stochastic, and which of those a sample is trained on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.sampling.seeds import seed_of

from .config import DanceGRPOConfig, Strategy
from .numbers import RolloutNumber, SampleNumber


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """`size` stochastic steps in a row, anywhere in [first, stop). Everything follows from the run's seed.

    The moving window is MixGRPO's (arXiv:2507.21802); one step drawn per prompt is the iso-temporal grouping of
    arXiv:2604.25427 and Flash-GRPO (arXiv:2605.15980).
    """

    size: int
    first: int
    stop: int
    strategy: Strategy
    interval: int
    kept: int
    """Steps of the window that a sample is trained on."""
    seed: int

    @classmethod
    def of(cls, args: DanceGRPOConfig) -> "Window":
        """Return the window that a configuration asks for."""
        size, first, stop = args.window
        kept = max(1, int(args.timestep_fraction * size))
        return cls(
            size=size,
            first=first,
            stop=stop,
            strategy=args.sde_window_strategy,
            interval=args.sde_window_interval,
            kept=kept,
            seed=args.seed,
        )

    @property
    def steps(self) -> range:
        """Steps that may be stochastic."""
        return range(self.first, self.stop)

    def start(self, rollout: RolloutNumber, *index: int) -> int:
        """Return the first stochastic step.

        Args:
            rollout: number of the rollout.
            index: of the prompt or sample that draws its own, nothing for one window per rollout.
        """
        positions = self.stop - self.first - self.size + 1
        if self.strategy == "fixed" or positions == 1:
            return self.first
        if self.strategy == "progressive":
            return self.first + rollout // self.interval % positions
        return self.first + seed_of(self.seed, "window", rollout, *index) % positions

    def trained(self, rollout: RolloutNumber, sample: SampleNumber) -> Tensor:
        """Return (kept,) steps of the window, counted from its start, in the order they are trained."""
        if self.kept == self.size:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "kept", rollout, sample))
        return torch.randperm(self.size, generator=generator)[: self.kept]
