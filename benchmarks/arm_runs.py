"""What the runs of experiments have in common: the names and files of an arm's training, and options of their jobs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch

from benchmarks.command import ended
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


def arms_named(words: Sequence[str], arms: Collection[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the arms for names of arms and groups, each once, in the order of the words.

    Raises:
        UserError: an unknown name.
    """
    found: dict[str, None] = {}
    for word in words:
        if word not in arms and word not in groups:
            raise UserError(
                f"unknown arm {word!r}.{did_you_mean(word, [*groups, *arms])} Groups: {', '.join(groups)}; arms:"
                f" {', '.join(arms)}"
            )
        found |= dict.fromkeys([word] if word in arms else groups[word])
    return list(found)


def add_job_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that all jobs of an experiment share; `out` is the default output folder."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=Path(out), help="output folder")
    parser.add_argument("--device", default=usual, choices=["cpu", "cuda"], help="device of the models")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, only to show that everything runs")


def run_job(
    name: str,
    about: str | None,
    named: str,
    out: str,
    work: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """Run the command of one job of an experiment, and return the exit code.

    Args:
        name: name of the command, for messages.
        about: help text of the command.
        named: help text of its only argument, the name of the job.
        out: default output folder.
        work: does the job, with the options of the command line.
        argv: the words; None for those of the process.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=named)
    add_job_options(parser, out)
    options = parser.parse_args(argv)

    def run() -> int:
        work(options)
        return 0

    return ended(name, run)


def use_fast_matmul() -> None:
    """Use TF32 in matrix products and convolutions, as all measurements of an experiment do."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
