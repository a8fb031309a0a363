"""Settings of the two halves: what is recorded of a teacher, and how students are trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from postgen.families.video_calls import RANGES
from postgen.settings import Part
from postgen.training.updates import UpdatesConfig

from .loss import Loss


@dataclass(kw_only=True)
class RecordsConfig(Part):
    """Which calls of the teacher are recorded.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    num_frames: int
    """Frames of the teacher's clips, 1 for image models."""

    height: int
    """Pixels."""

    width: int
    """Pixels."""

    num_inference_steps: int = 16
    """Steps of a trajectory: the noise levels that there are."""

    levels_per_prompt: int | None = None
    """Noise levels that are recorded of each trajectory, spread over it; none records all. All levels of the schedule
    come equally often, give or take one."""

    guidance_scale: float = 1.0
    """Classifier-free guidance of the trajectories; up to 1 is off. Above 1 the calls with the negative prompt are
    recorded as well."""

    negative_prompt: str = ""
    """Text of the unconditional pass for rows without one of their own."""

    batch_size: int = 1
    """Prompts that go through the teacher together. A record has a row of each, of different noise levels, and it is a
    micro-batch of training."""

    held_out_prompts: int = 1
    """The last prompts, whose records only measure errors. At least 1, and fewer than all."""

    seed: int = 0
    """Of the initial noise, and of the order in which noise levels are given to prompts."""

    max_gb: float = 50.0
    """Gigabytes (10^9 bytes) that the records may take; more is refused before anything is recorded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_frames", "height", "width", "num_inference_steps", "guidance_scale"):
            self.require_in(RANGES[name], name)
        for name in ("batch_size", "held_out_prompts"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        levels = self.levels_per_prompt
        self.require(self.num_inference_steps >= 2, "num_inference_steps", "at least 2")
        fits = levels is None or 1 <= levels <= self.num_inference_steps
        self.require(fits, "levels_per_prompt", f"from 1 to num_inference_steps, {self.num_inference_steps}")
        self.require(self.seed >= 0, "seed", "at least 0")
        self.require(self.max_gb > 0, "max_gb", "above 0")

    @property
    def size(self) -> dict[str, int]:
        """`num_frames`, `height` and `width`."""
        return {"num_frames": self.num_frames, "height": self.height, "width": self.width}


@dataclass(kw_only=True)
class ReconstructConfig(UpdatesConfig):
    """How the student of every block is trained.

    `max_steps` is for each block. A micro-batch is a record, so `gradient_accumulation_steps` records make a step.
    `learning_rate` is that of inherited parameters.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    may_change: ClassVar[tuple[str, ...]] = ("output_dir", "resume", "save_steps", "device")

    output_dir: str
    """Folder of the run."""

    resume: bool = False
    """Go on with what `output_dir` holds: finished blocks are not trained again. Without it a folder that holds an
    earlier run of these blocks is refused. Where there is none, a run begins."""

    learning_rate_new: float | None = None
    """Peak rate of parameters that the teacher does not have; none is `learning_rate`."""

    loss: Loss = "centred_l2"
    """What is minimised, see `postgen.reconstruct.loss`."""

    save_steps: int = 500
    """Write a checkpoint of the block in work every so many steps; 0 only when the run is interrupted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.output_dir), "output_dir", "the name of a folder")
        self.require(self.learning_rate_new is None or self.learning_rate_new > 0, "learning_rate_new", "above 0")
        self.require(self.save_steps >= 0, "save_steps", "at least 0")

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)
