"""Encode the given beginning of a long video: an image or a video."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from postgen.errors import UserError, first_line
from postgen.video import rgb_picture
from postgen.worldweaver.depth import DisparityRange, disparity_of
from postgen.worldweaver.levels import Modality
from postgen.worldweaver.model import WorldWeaverModel

_SLACK = 0.05
"""Values of pictures may lie outside their range by this much, because of rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """The encoded beginning of a video."""

    latents: Tensor
    """(B, M * C, n, h, w) latents; unknown modalities are zeros."""
    unknown: Collection[Modality]
    """Modalities that were not given."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Entries for `RolloutState.extra`: the disparity range."""


def given_of(
    model: WorldWeaverModel, rows: int, size: tuple[int, int], image: Any = None, video: Any = None, depth: Any = None
) -> Given | None:
    """Encode an image or a video, and its depth.

    Args:
        model: the model.
        rows: B. A single image or video is repeated for all rows.
        size: height and width in pixels. The given pictures are resized to it.
        image: any image format that diffusers pipelines accept; also PIL images in any mode and uint8 arrays.
        video: any video format that diffusers pipelines accept; also frames as PIL images in any mode and uint8
            arrays. The number of frames must be one that the autoencoder can encode.
        depth: distances (F, H, W) or (B, F, H, W) of a video, or (H, W) of an image, at the size of the video.

    Raises:
        UserError: both an image and a video, pixel values out of range, depth without an image or video, a wrong
            number or size of frames, or depth for a model without depth.
    """
    if image is not None and video is not None:
        raise UserError("image and video are both given: give one of them")
    if image is None and video is None:
        if depth is not None:
            raise UserError("depth is given without image or video: give the image or video that it belongs to")
        return None
    clips = _clips(image, video, size)
    if len(clips) not in (1, rows):
        raise UserError(f"{len(clips)} images or videos for {rows} prompts: give one, or one for each prompt")
    parts = {"rgb": model.encode(clips).expand(rows, -1, -1, -1, -1)}
    extra: dict[str, Tensor] = {}
    if depth is not None:
        if "depth" not in model.modalities:
            raise UserError("this model has no depth: omit depth")
        disparity = _disparity(depth, clips, rows)
        limits = DisparityRange.of(disparity)
        parts["depth"] = model.encode(limits.picture(disparity), "depth")
        extra = limits.tensors()
    zeros = torch.zeros_like(parts["rgb"])
    latents = torch.cat([parts.get(name, zeros) for name in model.modalities], 1)
    return Given(latents=latents, unknown=[name for name in model.modalities if name not in parts], extra=extra)


def _clips(image: Any, video: Any, size: tuple[int, int]) -> Tensor:
    """Return (B, F, 3, H, W) in [0, 1]."""
    from diffusers.video_processor import VideoProcessor

    processor = VideoProcessor(vae_scale_factor=1)
    what = "image" if image is not None else "video"
    try:
        if image is not None:
            pixels: Tensor = processor.preprocess(_plain(image), height=size[0], width=size[1])[:, None]
        else:
            pixels = processor.preprocess_video(_plain(video), height=size[0], width=size[1]).transpose(1, 2)
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"diffusers cannot read the {what}, give PIL images, arrays or tensors: {first_line(error)[:200]}"
        ) from error
    if pixels.dim() != 5 or pixels.shape[2] != 3 or not pixels.numel():
        raise UserError(
            f"the {what} has shape {tuple(pixels.shape)}, (videos, frames, channels, height, width): give RGB frames"
        )
    # Float arrays with values from 0 to 255 would silently become white pictures in diffusers.
    low, high = (float(end) for end in pixels.float().aminmax())
    if not -1 - _SLACK <= low <= high <= 1 + _SLACK:
        raise UserError(f"the {what} has values out of range: give uint8 values, or floats from 0 to 1")
    return (pixels.float() * 0.5 + 0.5).clamp(0, 1)


def _plain(given: Any) -> Any:
    """Convert pictures to RGB as a viewer shows them, and uint8 arrays to floats from 0 to 1."""
    if isinstance(given, Image.Image):
        return rgb_picture(given)
    if isinstance(given, np.ndarray) and given.dtype == np.uint8:
        return given.astype(np.float32) / 255
    if isinstance(given, Tensor) and given.dtype == torch.uint8:
        return given.float() / 255
    return [_plain(each) for each in given] if isinstance(given, list | tuple) else given


def _disparity(depth: Any, clips: Tensor, rows: int) -> Tensor:
    try:
        distances = torch.as_tensor(np.array(depth) if isinstance(depth, Image.Image) else depth).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"depth cannot be converted to distances, give an array or a tensor of numbers: {first_line(error)}"
        ) from error
    given, wanted = tuple(distances.shape), (clips.shape[1], *clips.shape[3:])
    distances = distances[None] if distances.dim() == 2 else distances
    distances = distances[None] if distances.dim() == 3 else distances
    if distances.dim() != 4 or distances.shape[1:] != wanted or len(distances) not in (1, rows):
        raise UserError(f"depth has shape {given}: give distances of shape {wanted}")
    return disparity_of(distances.expand(rows, -1, -1, -1))
