"""The part of a configuration that says what is drawn and how."""

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
    """Sizes of clips, steps, guidance, solver, batches.

    Raises:
        UserError: a value outside its range.
    """

    part: ClassVar[str] = "sampling"

    height: int | None = None
    """Pixels; none takes the model's default, as for `width` and `num_frames`."""

    width: int | None = None
    """Pixels."""

    num_frames: int | None = None
    """Frames of a clip, 1 for image models."""

    fps: float | None = None
    """Frames per second that rewards are told and videos are written with; none takes the model's default."""

    num_inference_steps: int = 16
    """Steps of a rollout."""

    guidance_scale: float = 1.0
    """Classifier-free guidance in rollouts and in training passes alike; up to 1 is off, which halves the cost."""

    negative_prompt: str = ""
    """Text of the unconditional pass for rows without one of their own."""

    sigma_schedule: SigmaSchedule = "pipeline"
    """Noise levels of a rollout: the pipeline's, or for flow models `linspace`, equal steps from 1 to 0, shifted."""

    rollout_solver: Solver = "euler"
    """How the steps after the stochastic ones are taken; dpm++ is DPM-Solver++ (2M)."""

    rollout_solver_fraction: float = 1.0
    """Share of the steps after the stochastic ones that are taken, on a coarser grid, in (0, 1]."""

    rollout_batch_size: int | None = None
    """Samples that a process draws at a time; none is `per_device_train_batch_size`."""

    decode_batch_size: int | None = None
    """Samples that are decoded at a time; none is as many as are drawn at a time."""

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
        """Refuse sizes that a model cannot make, by the rules of `postgen generate`; no weights are read.

        Args:
            source: a folder, a hub id, a pipeline, or None for the embedded model.
            here: leave alone what is on the hub.

        Raises:
            UserError: names the nearest sizes that are allowed; or there is no such model.
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
        """Return `num_frames`, `height` and `width` of what is made.

        Args:
            pipe: the pipeline; without an argument `num_frames` it makes pictures.
            defaults: what the model's folder says about sizes.

        Raises:
            UserError: neither the configuration nor the model gives one of them.
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
