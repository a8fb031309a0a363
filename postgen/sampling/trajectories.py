"""What is kept of drawn samples: latents and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
