"""What the runs of experiments have in common: the names and files of an arm's training, and options of their jobs."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch

from postgen.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmRun:
    """Training of an arm with one seed."""

    arms: ClassVar[Collection[str]]
    """Names of the experiment's arms."""
    arm: str
    seed: int
    out: Path
    tiny: bool = False

    @classmethod
    def named(cls, name: str, out: Path, *, tiny: bool = False) -> Self:
        """Return the run with a name ARM.SEED.

        Raises:
            UserError: the arm is unknown.
        """
        arm, _, seed = name.rpartition(".")
        if arm not in cls.arms or not seed.isdigit():
            raise UserError(
                f"unknown run {name!r}.{did_you_mean(arm, cls.arms)} Give ARM.SEED with an arm of"
                f" {', '.join(cls.arms)}"
            )
        return cls(arm=arm, seed=int(seed), out=out, tiny=tiny)

    @property
    def name(self) -> str:
        """Its name, ARM.SEED."""
        return f"{self.arm}.{self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the training."""
        return self.out / "runs" / self.name

    @property
    def done(self) -> Path:
        """File that exists once the run has reached its end."""
        return self.folder / "done.json"

    @property
    def measured(self) -> Path:
        """File with its measurements."""
        return self.out / "measured" / f"{self.name}.json"


def add_job_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that all jobs of an experiment share; `out` is the default output folder."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=Path(out), help="output folder")
    parser.add_argument("--device", default=usual, choices=["cpu", "cuda"], help="device of the models")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, only to show that everything runs")
