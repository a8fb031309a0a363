"""Which part of the work is that of this process, as `torchrun` and `accelerate launch` number them."""

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
    """One process of several. They never wait for each other: what each does depends on no other.

    Raises:
        UserError: there is no such process.
    """

    rank: int = 0
    """Number of this process, from 0."""
    processes: int = 1
    """How many there are."""
    local_rank: int = 0
    """Number of this process on its machine: that of its GPU."""

    def __post_init__(self) -> None:
        if not is_whole(self.processes, 1) or not is_whole(self.rank, 0, self.processes - 1):
            raise UserError(
                f"rank {shown(self.rank)} of {shown(self.processes)} processes: ranks go from 0 to processes - 1"
            )

    @classmethod
    def launched(cls) -> Share:
        """Return the share of this process by the environment variables of its launcher; without one, everything.

        Raises:
            UserError: they are no numbers.
        """
        names = {"rank": "RANK", "processes": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        said = {field: os.environ[name] for field, name in names.items() if name in os.environ}
        if "rank" not in said or "processes" not in said:
            return cls()
        if wrong := [text for text in said.values() if not text.isdigit()]:
            raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, one is {shown(wrong[0])}")
        return cls(**{field: int(text) for field, text in said.items()})

    def of(self, things: Sequence[T]) -> list[T]:
        """Return what this process does: the things are dealt out one by one."""
        return list(things[self.rank :: self.processes])

    def device(self, wanted: str) -> torch.device:
        """Return the device of this process.

        Args:
            wanted: "cpu", "cuda", or "auto" for a GPU where there is one.

        Raises:
            UserError: there is no GPU, or none for this process.
        """
        check_device(wanted)
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {self.local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}: start"
                " as many processes as GPUs"
            )
        return torch.device("cuda", self.local_rank)
