"""The window: which steps of a rollout are stochastic, and which of them are trained."""

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.sampling.seeds import seed_of

from .config import DanceGRPOConfig, Strategy
from .numbers import RolloutNumber, SampleNumber


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A window of `size` consecutive stochastic steps within [first, stop). All draws depend on the run's seed only.

    The moving window is from MixGRPO (arXiv:2507.21802). A window of one step, drawn for each prompt, is the
    iso-temporal grouping of arXiv:2604.25427 and Flash-GRPO (arXiv:2605.15980).
    """

    size: int
    """Number of stochastic steps of a sample."""
    first: int
    """First step that may be stochastic."""
    stop: int
    """The step after the last one that may be stochastic."""
    strategy: Strategy
    """Position of the window, see `DanceGRPOConfig.sde_window_strategy`."""
    interval: int
    """Rollouts between two moves of the progressive window."""
    kept: int
    """Number of steps of the window that are trained for each sample."""
    seed: int
    """Seed of the run."""

    @classmethod
    def of(cls, args: DanceGRPOConfig) -> "Window":
        """Return the window that a configuration describes."""
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
        """Indices of the steps that may be stochastic."""
        return range(self.first, self.stop)

    def start(self, rollout: RolloutNumber, *index: int) -> int:
        """Return the index of the first stochastic step.

        Args:
            rollout: number of the rollout.
            index: numbers that a random window depends on besides the rollout: none for one window per rollout, the
                prompt number for one per prompt, prompt number and sample number for one per sample.
        """
        positions = self.stop - self.first - self.size + 1
        if self.strategy == "fixed" or positions == 1:
            return self.first
        if self.strategy == "progressive":
            return self.first + rollout // self.interval % positions
        return self.first + seed_of(self.seed, "window", rollout, *index) % positions

    def trained(self, rollout: RolloutNumber, sample: SampleNumber) -> Tensor:
        """Return the (kept,) steps to train for a sample, in training order, as offsets from the window's start."""
        if self.kept == self.size:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "kept", rollout, sample))
        return torch.randperm(self.size, generator=generator)[: self.kept]
