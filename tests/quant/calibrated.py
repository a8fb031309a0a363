"""Tiny pipelines with their calibration."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import WanPipeline

from postgen.quant.calibration import Calibration
from postgen.quant.calibration_config import CalibrationConfig
from tests.families.tiny_pipelines import drawn
from tests.reconstruct.toy import PROMPTS, pipeline
from tests.tiny_wan import wan_components

STEPS = 4
TOKENS = 32
"""Tokens of a text: the prompts fit, and it is encoded much faster than with the default of 512."""


def calibration_of(pipe: Any, size: dict[str, int], **values: Any) -> Calibration:
    """Return a calibration with 4 prompts and a held-out one, at 2 of 4 noise levels each, in 2 bins."""
    settings = {"num_inference_steps": STEPS, "points": 8, "bins": 2, "batch_size": 2, **size, **values}
    return short(Calibration(pipe, PROMPTS, CalibrationConfig(**settings)))


def short(calibration: Calibration) -> Calibration:
    """Let a calibration encode texts with few tokens."""
    calibration.denoiser.max_sequence_length = TOKENS
    return calibration


@functools.cache
def calibrated(name: str) -> tuple[Any, Calibration]:
    """Return a pipeline and its calibration, which tests do not change."""
    pipe, size = pipeline(name)
    return pipe, calibration_of(pipe, size)


def two_experts() -> tuple[Any, dict[str, int]]:
    """Return a tiny Wan 2.2 pipeline: each expert runs in two of four steps."""
    from diffusers import WanTransformer3DModel

    parts = wan_components()
    second = WanTransformer3DModel.from_config(parts["transformer"].config)
    pipe = drawn(WanPipeline(**parts, transformer_2=second.eval(), boundary_ratio=0.7))
    return pipe, {"num_frames": 5, "height": 16, "width": 32}
