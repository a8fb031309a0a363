"""Settings of the calibration points, and the defaults of a model for them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from postgen.errors import UserError
from postgen.families.loaded import defaults_of, sizes_of_pipeline
from postgen.families.video_calls import RANGES
from postgen.reconstruct import RecordsConfig
from postgen.settings import Part

_FRAMES = 17
"""Largest default number of frames. A block's input for 81 frames is five times as large, with the same statistics."""


@dataclass(kw_only=True)
class CalibrationConfig(Part):
    """Settings of the calibration points.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    num_frames: int | None = None
    """Frames of a clip; None is the model's default, at most 17."""

    height: int | None = None
    """Height in pixels; None is the model's default, as for `width`."""

    width: int | None = None
    """Width in pixels."""

    num_inference_steps: int | None = None
    """Steps of a trajectory; None is the model's default. Use the number that the model will run with."""

    guidance_scale: float | None = None
    """Scale of classifier-free guidance; None is the model's default. Above 1, each point has a twin with the negative
    prompt. Values up to 1 switch guidance off."""

    negative_prompt: str = ""
    """Negative prompt of rows that have none of their own."""

    points: int = 64
    """Number of points of the training prompts, for each transformer and each text. The prompts share them equally, so
    the number is rounded, and a prompt has at most one point per noise level."""

    bins: int = 8
    """Number of bins of the noise level, for each transformer."""

    held_out_prompts: int = 1
    """Number of prompts at the end of the list that only measure errors. At least 1, and fewer than all."""

    batch_size: int = 1
    """Points that go through the model together."""

    seed: int = 0
    """Seed of the initial noise, and of the choice of noise levels."""

    max_gb: float = 50.0
    """Largest allowed size of recorded inputs and outputs of blocks in gigabytes, see `RecordsConfig.max_gb`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_frames", "height", "width", "num_inference_steps", "guidance_scale"):
            self.require_in(RANGES[name], name)
        for name in ("points", "bins", "held_out_prompts", "batch_size"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(self.seed >= 0, "seed", "at least 0")
        self.require(self.max_gb > 0, "max_gb", "above 0")

    def records(self, pipe: Any, prompts: int) -> RecordsConfig:
        """Return the settings of recordings, with the defaults of a model.

        Args:
            pipe: the pipeline.
            prompts: number of all prompts.

        Raises:
            UserError: a value is not given and the model has no default for it.
        """
        size = self._size(pipe)
        steps = int(_usual(pipe, "num_inference_steps", self.num_inference_steps))
        return RecordsConfig(
            num_frames=size["num_frames"],
            height=size["height"],
            width=size["width"],
            num_inference_steps=steps,
            levels_per_prompt=min(max(1, round(self.points / max(1, prompts - self.held_out_prompts))), steps),
            guidance_scale=_guidance(pipe, self.guidance_scale),
            negative_prompt=self.negative_prompt,
            held_out_prompts=self.held_out_prompts,
            batch_size=self.batch_size,
            seed=self.seed,
            max_gb=self.max_gb,
        )

    def _size(self, pipe: Any) -> dict[str, int]:
        makes_clips = "num_frames" in inspect.signature(type(pipe).__call__).parameters
        names = ("num_frames", "height", "width") if makes_clips else ("height", "width")
        size = {"num_frames": 1, **{name: int(_usual(pipe, name, getattr(self, name))) for name in names}}
        if self.num_frames is None and size["num_frames"] > _FRAMES:
            step = (sizes_of_pipeline(pipe) or (1, 1, 1))[2]
            size["num_frames"] = _FRAMES - (_FRAMES - 1) % max(step, 1)
        return size


def _usual(pipe: Any, name: str, given: float | None) -> float:
    """Return a setting of a call: the given one, that of the model's folder, or that of the pipeline's signature."""
    if given is not None:
        return given
    own = getattr(defaults_of(pipe), name)
    parameters = inspect.signature(type(pipe).__call__).parameters
    found = own if own is not None else parameters[name].default if name in parameters else None
    if not isinstance(found, int | float):
        raise UserError(f"{name} is not given, and {type(pipe).__name__} has no default: set it")
    return found


def _guidance(pipe: Any, given: float | None) -> float:
    if given is None:
        # These pipelines call the distilled guidance, an input of the network, `guidance_scale`.
        real = inspect.signature(type(pipe).__call__).parameters.get("true_cfg_scale")
        if real is not None:
            return float(real.default or 1)
    return float(_usual(pipe, "guidance_scale", given))
