"""Bins of noise levels: scales and clips of activations can differ between early and late steps.

    bins = StepBins.of([999, 960, 900, 700, 300], 2)
    handle = bins.attach(pipe.transformer)  # every forward pass sets the bin of its rows from its timestep
    clip = bins.pick(table, x)              # inside a layer: entries of a table (bins, ...) for the rows of x

The bin is set once per forward pass, on the device and without a wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from postgen.errors import UserError, is_number, shown
from postgen.families.timesteps import timestep_of, timestep_per_row


class StepBins:
    """Bins of the timestep of one transformer, numbered from the noisiest to the cleanest.

    Args:
        edges: timesteps between neighbouring bins, strictly falling, one fewer than bins. A timestep equal to an edge
            belongs to the noisier bin. Units are those of the transformer's argument `timestep`.

    Raises:
        UserError: an edge is not a number, or the edges do not fall.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        if not all(map(is_number, edges)) or any(high <= low for high, low in pairwise(edges)):
            raise UserError(f"the edges of bins must be falling timesteps, got {shown(edges)}")
        self.edges = tuple(map(float, edges))
        self.current = torch.zeros(1, dtype=torch.int64)
        """Bin of each row of the running forward pass, (B,) or (1,). Bin 0 before the first pass."""
        self._rising = torch.tensor(self.edges[::-1], dtype=torch.float32)

    @classmethod
    def of(cls, timesteps: Sequence[float], count: int) -> Self:
        """Return bins with equally many steps of a schedule each, give or take one.

        Args:
            timesteps: timesteps of the steps, in any order; equal ones count once.
            count: largest number of bins; there are at most as many as timesteps.

        Raises:
            UserError: there are no timesteps, or `count` is below 1.
        """
        falling = sorted(set(timesteps), reverse=True)
        if not falling or count < 1:
            raise UserError(f"{len(falling)} timesteps cannot be split into {count} bins: both must be at least 1")
        count = min(count, len(falling))
        # An edge lies half-way between two steps, so a rounded timestep (bfloat16) keeps its bin.
        starts = [number * len(falling) // count for number in range(1, count)]
        return cls([(falling[start - 1] + falling[start]) / 2 for start in starts])

    @property
    def count(self) -> int:
        """Number of bins."""
        return len(self.edges) + 1

    def __repr__(self) -> str:
        return f"StepBins({self.count} bins, edges {', '.join(f'{edge:g}' for edge in self.edges) or 'none'})"

    def index(self, timestep: Tensor) -> Tensor:
        """Return the bins of timesteps (B,), or (B, ...) with one per frame or token: (B,) int64."""
        if self._rising.device != timestep.device:
            self._rising = self._rising.to(timestep.device)
        return len(self.edges) - torch.bucketize(timestep_per_row(timestep).float(), self._rising, right=True)

    def attach(self, model: nn.Module) -> RemovableHandle:
        """Set the bin at the beginning of every forward pass of a transformer.

        Returns:
            The handle of the hook; its `remove` ends this. A deep copy of the model with the layers that hold these
            bins has bins of its own.
        """
        return model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = self.index(timestep_of(model, args, kwargs))

    def pick(self, table: Tensor, x: Tensor) -> Tensor:
        """Return the entries of a table for the rows of an activation in the running forward pass.

        Args:
            table: (bins, ...) one entry per bin, whose further axes are the last axes of x.
            x: activation (B, ..., C), or with a first axis that joins the batch with tokens or frames.

        Returns:
            A tensor that broadcasts against x: (B, 1, ..., entry).

        Raises:
            UserError: the number of rows does not fit the batch of the forward pass.
        """
        rows = self.current.to(table.device)
        if len(rows) not in (1, len(x)):
            if len(x) % len(rows):
                raise UserError(
                    f"an activation with {len(x)} rows does not fit a forward pass of {len(rows)} samples: attach the"
                    " bins to the model that computes it"
                )
            rows = rows.repeat_interleave(len(x) // len(rows))
        found = table[rows]
        return found.reshape(len(rows), *(1,) * (x.dim() - found.dim()), *found.shape[1:])
