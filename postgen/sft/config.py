"""Settings of the training method `sft`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from postgen.families.video_calls import RANGES
from postgen.settings import Part
from postgen.training import TrainingConfig
from postgen.training.memory_config import MemoryConfig

from .data_config import SftDataConfig
from .noise import NoiseConfig


@dataclass(kw_only=True)
class SftEvaluationConfig(Part):
    """Settings of the evaluation on held-out clips: their loss at fixed noise, and samples for their captions.

    Raises:
        UserError: a value is outside its range.
    """

    part: ClassVar[str] = "held_out"

    eval_clips: int = 64
    """Largest number of held-out clips whose loss is measured, evenly spaced among them."""

    eval_noise_levels: int = 4
    """Number of noise levels at which the loss of each held-out clip is measured, evenly spaced over the schedule."""

    eval_samples: int = 0
    """Number of held-out captions for which the model draws a sample in each evaluation, with fixed seeds; 0 draws
    none."""

    eval_reward_funcs: list[str] = field(default_factory=list)
    """Rewards that score the samples, see `postgen score --list`. They are only measured."""

    eval_num_inference_steps: int = 20
    """Sampling steps of the samples, at least 2."""

    eval_guidance_scale: float | None = None
    """Guidance scale of the samples; up to 1 there is no guidance. None uses the one that the model's folder names in
    its `postgen.json`, else 1."""

    eval_negative_prompt: str = ""
    """Negative prompt of the samples."""

    eval_grid: int = 9
    """Number of samples in the picture and the video that each evaluation writes to `samples/`; 0 writes none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_clips", "eval_noise_levels"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("eval_samples", "eval_grid"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        self.require_in((2, RANGES["num_inference_steps"][1]), "eval_num_inference_steps")
        self.require_in(RANGES["guidance_scale"], "eval_guidance_scale")
        drawn = self.eval_samples > 0 or not self.eval_reward_funcs
        self.require(drawn, "eval_samples", "at least 1 with eval_reward_funcs")


@dataclass(kw_only=True)
class SftConfig(SftEvaluationConfig, NoiseConfig, SftDataConfig, MemoryConfig, TrainingConfig):
    """Settings of `SftTrainer`.

    Raises:
        UserError: a value is outside its range, or two settings exclude each other.
    """

    may_change: ClassVar[tuple[str, ...]] = ("dry_run",)

    fps: float | None = None
    """Frames per second of the clips, for samples and for models that encode the time of a frame in seconds (LTX).
    None uses the model's default."""

    dry_run: bool = False
    """Load the model, print an estimate of the memory of a step, and exit. No clip is encoded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in(RANGES["fps"], "fps")

    @property
    def takes_other_clips(self) -> bool:
        """Whether a checkpoint of other clips may be used: to evaluate it, or because a data setting may change."""
        return self.evaluate_only or any(item.name in self.allow_changed for item in fields(SftDataConfig))

    @property
    def held_out(self) -> bool:
        """Whether there are held-out clips."""
        return self.eval_dataset is not None or self.eval_share > 0
