"""Division of the work among processes, with the ranks of `torchrun` and `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from postgen.errors import UserError, is_whole, shown
from postgen.training.launch import check_device

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The part of one process among several. The processes work independently and exchange no data.

    Raises:
        UserError: the rank is not one of the processes.
    """

    rank: int = 0
    """Rank of this process, from 0."""
    processes: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Rank of this process on its machine; also the index of its GPU."""

    def __post_init__(self) -> None:
        if not is_whole(self.processes, 1) or not is_whole(self.rank, 0, self.processes - 1):
            raise UserError(
                f"rank {shown(self.rank)} of {shown(self.processes)} processes is not valid: ranks go from 0 to"
                " processes - 1"
            )

    @classmethod
    def launched(cls) -> Share:
        """Return the share of this process from the launcher's environment variables; without a launcher, everything.

        Raises:
            UserError: an environment variable is not a number.
        """
        names = {"rank": "RANK", "processes": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        said = {field: os.environ[name] for field, name in names.items() if name in os.environ}
        if "rank" not in said or "processes" not in said:
            return cls()
        if wrong := [text for text in said.values() if not text.isdigit()]:
            raise UserError(
                f"the environment variables RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, one is"
                f" {shown(wrong[0])}"
            )
        return cls(**{field: int(text) for field, text in said.items()})

    def of(self, things: Sequence[T]) -> list[T]:
        """Return the items of this process; items are assigned to the processes in turn."""
        return list(things[self.rank :: self.processes])

    def device(self, wanted: str) -> torch.device:
        """Return the device of this process.

        Args:
            wanted: "cpu", "cuda", or "auto" for a GPU if there is one.

        Raises:
            UserError: there is no GPU, or fewer GPUs than processes on this machine.
        """
        check_device(wanted)
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {self.local_rank} of this machine has no GPU, because there are only"
                f" {torch.cuda.device_count()}: start at most as many processes as GPUs"
            )
        return torch.device("cuda", self.local_rank)
