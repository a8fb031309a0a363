"""Settings of block-wise reconstruction: the recording of the teacher, and the training of the students."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from postgen.training.drawn import DrawnConfig
from postgen.training.optimizers import check_optim
from postgen.training.updates import UpdatesConfig

from .loss import Loss


@dataclass(kw_only=True)
class RecordsConfig(DrawnConfig):
    """Settings of `collect`: which calls of the teacher are recorded.

    A record has one row for each of `batch_size` prompts, at different noise levels, and serves as one micro-batch of
    training. With `guidance_scale` above 1 the calls with the negative prompt are recorded as well.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    levels_per_prompt: int | None = None
    """Number of noise levels to record from each trajectory; None records all. Over all prompts each level occurs
    equally often, give or take one."""

    held_out_prompts: int = 1
    """Number of prompts at the end of the list whose records only measure errors. At least 1, and fewer than all."""

    seed: int = 0
    """Seed of the initial noise, and of the assignment of noise levels to prompts."""

    max_gb: float = 50.0
    """Largest allowed size of the records in gigabytes (10^9 bytes). Larger sizes are refused before recording."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.held_out_prompts >= 1, "held_out_prompts", "at least 1")
        levels = self.levels_per_prompt
        fits = levels is None or 1 <= levels <= self.num_inference_steps
        self.require(fits, "levels_per_prompt", f"from 1 to num_inference_steps, {self.num_inference_steps}")
        self.require(self.seed >= 0, "seed", "at least 0")
        self.require(self.max_gb > 0, "max_gb", "above 0")


@dataclass(kw_only=True)
class ReconstructConfig(UpdatesConfig):
    """Settings of `reconstruct`: how the student of every block is trained.

    `max_steps` counts the optimiser steps of each block. One micro-batch is one record, so a step takes
    `gradient_accumulation_steps` records. `learning_rate` applies to inherited parameters.

    Raises:
        UserError: a value has the wrong type or lies outside its range, or the package of the optimiser is missing.
    """

    may_change: ClassVar[tuple[str, ...]] = ("output_dir", "resume", "save_steps", "device")

    output_dir: str
    """Folder of the run."""

    resume: bool = False
    """Resume the run in `output_dir`; finished blocks are not trained again. If there is no earlier run, a new one
    starts. With False, a folder with an earlier run of these blocks is refused."""

    learning_rate_new: float | None = None
    """Peak learning rate of new parameters, which the teacher does not have; none uses `learning_rate`."""

    loss: Loss = "centred_l2"
    """Loss function, see `postgen.reconstruct.loss`."""

    save_steps: int = 500
    """Interval of checkpoints of the current block, in steps; 0 writes one only when the run is interrupted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.output_dir), "output_dir", "the name of a folder")
        self.require(self.learning_rate_new is None or self.learning_rate_new > 0, "learning_rate_new", "above 0")
        self.require(self.save_steps >= 0, "save_steps", "at least 0")
        check_optim(self)

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)
