"""The buffer: the samples of a rollout that a process trains on, and their form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postgen.sampling.sampler import Trajectories

from .numbers import PromptNumber, RolloutNumber, SampleNumber


@dataclass(slots=True)
class Buffer:
    """The n samples of a rollout that this process trains on, in the order of its micro-batches.

    A buffer row, 0 to n - 1, indexes `paths`, `advantages`, `prompts` and `samples` alike.
    """

    number: RolloutNumber
    """Number of the rollout in the run."""
    paths: Trajectories
    """Latents and log-probabilities, n rows."""
    advantages: Tensor
    """(n,) clipped advantages."""
    prompts: list[PromptNumber]
    """Prompt number of each row."""
    samples: list[SampleNumber]
    """Sample number of each row."""
    gains: Tensor | None = None
    """(n,) positive parts of the advantages of all rewards; None if the rewards share one loss."""

    def state(self) -> dict[str, Any]:
        """Return the buffer as tensors and JSON values under flat names, for a checkpoint."""
        paths = self.paths
        state: dict[str, Any] = {"number": self.number, "prompts": self.prompts, "samples": self.samples}
        state |= {f"buffer.{name}": getattr(paths, name) for name in ("clean", "start", "states", "log_probs")}
        state["buffer.advantages"] = self.advantages
        optional = {"buffer.means": paths.means, "buffer.gains": self.gains}
        return state | {name: value for name, value in optional.items() if value is not None}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Buffer | None:
        """Return the buffer that a checkpoint holds, on a device; None if the checkpoint holds no buffer."""
        if "number" not in state:
            return None
        held = {key.removeprefix("buffer."): value for key, value in state.items() if key.startswith("buffer.")}
        held = {name: value.to(device) for name, value in held.items()}
        advantages, gains = held.pop("advantages"), held.pop("gains", None)
        return cls(state["number"], Trajectories(**held), advantages, state["prompts"], state["samples"], gains)
