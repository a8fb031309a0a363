"""Means over the samples of a prompt, for losses that compare them, also over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from .batches import Batches
from .buffer import Buffer
from .forward_losses import Errors


@dataclass(slots=True)
class Beside:
    """What a loss that compares samples needs of B rows, besides the new prediction. Nothing has a gradient."""

    old: Errors | None
    """Errors of the old policy; None if the loss does not need them."""
    difference: Tensor | None
    """(B,) mean square difference of the predictions of the new and the old policy."""
    mean: Tensor
    """(B,) mean of the loss's quantity over the group of each row."""

    def rows(self, rows: Tensor) -> Beside:
        """Return the values of some rows, (m,) row indices."""
        old = None if self.old is None else self.old.rows(rows)
        return Beside(old, None if self.difference is None else self.difference[rows], self.mean[rows])


class UpdateGroups:
    """The groups of one update. An update holds whole groups, but a group may span micro-batches and processes.

    The means then need the errors of all samples of a group before the first backward pass. They are computed at the
    beginning of the update, in one pass without gradients for each noise level, and summed over processes.

    Args:
        batches: division of a rollout into updates.
        accelerator: sums over the processes.
    """

    def __init__(self, batches: Batches, accelerator: Accelerator) -> None:
        self.batches, self._accelerator = batches, accelerator
        self.fit = batches.per_device % batches.kept == 0
        """Whether each group lies in one micro-batch."""
        self._ahead: list[Beside] = []

    def open(self, micro: int, buffer: Buffer, advantages: Tensor) -> None:
        """Begin an update.

        Args:
            micro: number of micro-batches of this process before the update.
            buffer: samples of the rollout.
            advantages: (n,) advantages of all rows of the buffer.
        """
        batches = self.batches
        update, part = micro % batches.micro_batches // batches.accumulation, batches.accumulation * batches.per_device
        self._low = update * part
        self.rows = torch.arange(self._low, self._low + part, device=advantages.device)
        """(m,) buffer rows of the update in this process."""
        self._count = part * batches.processes // batches.kept
        first = update * self._count
        owners = [buffer.prompts[row] - first for row in self.rows.tolist()]
        self._owners = torch.tensor(owners, device=advantages.device)
        mine = advantages[self.rows].double()
        self._centred = mine - self.mean(mine, self.rows)
        self._ahead = []

    def mean(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return the mean (b,) of values (b,) over the group of each row, float64.

        Args:
            values: (b,) values.
            rows: (b,) buffer rows: whole groups, or all rows of the update in this process.
        """
        owners = self._owners[rows - self._low]
        sums = torch.zeros(self._count, dtype=torch.float64, device=values.device)
        sums.index_add_(0, owners, values.double())
        if not self.fit:
            sums = self._accelerator.reduce(sums, "sum")
        return (sums / self.batches.kept)[owners]

    def add(self, parts: Sequence[Beside]) -> None:
        """Keep the values of the update's next noise level, given for each micro-batch before the mean is taken."""
        old = [part.old for part in parts if part.old is not None]
        apart = [part.difference for part in parts if part.difference is not None]
        joined = Beside(
            old=_joined(old) if old else None,
            difference=torch.cat(apart) if apart else None,
            mean=self.mean(torch.cat([part.mean for part in parts]), self.rows),
        )
        self._ahead.append(joined)

    def ahead(self, rows: Tensor, number: int) -> Beside | None:
        """Return the kept values of buffer rows at the `number`-th noise level; None if groups fit."""
        return None if self.fit else self._ahead[number].rows(rows - self._low)

    def centred(self, rows: Tensor) -> Tensor:
        """Return the advantages (b,) of buffer rows minus the means of their groups, float64."""
        return self._centred[rows - self._low]

    def side(self, rows: Tensor) -> Tensor:
        """Return 1 for rows above the mean advantage of their group, -1 below it, and 0 for equal advantages."""
        return self.centred(rows).sign()


def _joined(parts: Sequence[Errors]) -> Errors:
    return Errors(torch.cat([part.square for part in parts]), torch.cat([part.size for part in parts]))
