"""The sampling part of a configuration: sizes of clips, steps, guidance, solver, batch sizes."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.families.loaded import defaults_of, sizes_of_pipeline
from postgen.families.loading import inspect_model
from postgen.families.model_folder import Defaults, is_hub_id
from postgen.families.video_calls import RANGES
from postgen.families.wan_sizes import check_size
from postgen.settings import Part

from .schedule import SigmaSchedule
from .solver import Solver

_SIZES = ("num_frames", "height", "width")


@dataclass(kw_only=True)
class SamplingConfig(Part):
    """Settings of the sampler: sizes of clips, steps, guidance, solver, batch sizes.

    Raises:
        UserError: a value is outside its range.
    """

    part: ClassVar[str] = "sampling"

    height: int | None = None
    """Height of a clip in pixels. None uses the model's default, as for `width` and `num_frames`."""

    width: int | None = None
    """Width of a clip in pixels."""

    num_frames: int | None = None
    """Number of frames of a clip; 1 for image models."""

    fps: float | None = None
    """Frames per second, for rewards and for written videos. None uses the model's default."""

    num_inference_steps: int = 16
    """Number of sampling steps of a rollout."""

    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, both in rollouts and in training passes. Values up to 1 disable guidance,
    which halves the cost."""

    negative_prompt: str = ""
    """Negative prompt of rows without their own."""

    sigma_schedule: SigmaSchedule = "pipeline"
    """Noise levels of a rollout: those of the pipeline's scheduler, or for flow models `linspace`: equal steps from 1
    to 0, then shifted."""

    rollout_solver: Solver = "euler"
    """Solver of the deterministic steps after the stochastic ones. "dpm++" is DPM-Solver++ (2M)."""

    rollout_solver_fraction: float = 1.0
    """Share in (0, 1] of the steps after the stochastic ones that the solver takes, on a coarser grid."""

    rollout_batch_size: int | None = None
    """Number of samples that a process draws together. None uses `per_device_train_batch_size`."""

    decode_batch_size: int | None = None
    """Number of samples that are decoded together. None uses the number of samples that are drawn together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rollout_batch_size", "decode_batch_size"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, name, "at least 1")
        self.require(self.num_inference_steps >= 2, "num_inference_steps", "at least 2")
        for name in (*_SIZES, "fps", "num_inference_steps", "guidance_scale"):
            self.require_in(RANGES[name], name)
        self.require(0 < self.rollout_solver_fraction <= 1, "rollout_solver_fraction", "in (0, 1]")

    def check_size(self, source: Any, *, here: bool = False) -> None:
        """Check that a model can make clips of these sizes, by the rules of `postgen generate`. Reads no weights.

        Args:
            source: a folder, a hub id, a pipeline, or None for the embedded model.
            here: do not contact the hub; a hub id is then not checked.

        Raises:
            UserError: the model cannot make these sizes (the message names the nearest allowed ones), or the model
                does not exist.
        """
        if source is None or isinstance(source, str | Path):
            folder = embedded_model() if source is None else source
            if here and is_hub_id(folder):
                return
            facts = inspect_model(folder, images=True)
            defaults, steps = facts.defaults, facts.multiples
        else:
            defaults, steps = defaults_of(source), sizes_of_pipeline(source)
        if steps is not None:
            frames, height, width = (getattr(self, name) or getattr(defaults, name) for name in _SIZES)
            check_size(frames, height, width, *steps)

    def clip_size(self, pipe: Any, defaults: Defaults) -> dict[str, int]:
        """Return `num_frames`, `height` and `width` of a clip: configured sizes, else the model's defaults.

        Args:
            pipe: the pipeline. If its call has no argument `num_frames`, it makes images, and `num_frames` is 1.
            defaults: default sizes from the model's folder.

        Raises:
            UserError: a size is neither configured nor has a default.
        """
        takes = inspect.signature(type(pipe).__call__).parameters
        found = {}
        for name in _SIZES:
            value = getattr(self, name) or getattr(defaults, name)
            if value is None and name == "num_frames" and "num_frames" not in takes:
                value = 1
            if value is None:
                raise UserError(f"{name} is not given, and {type(pipe).__name__} has no default: set it")
            found[name] = int(value)
        return found
