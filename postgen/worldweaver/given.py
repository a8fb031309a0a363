"""What a long video begins with: a picture, or a video, encoded once."""

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
"""Values of pictures so far outside their range are rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """The beginning of a video."""

    latents: Tensor
    """(B, M * C, n, h, w), zeros for what is not known."""
    unknown: Collection[Modality]
    """Modalities that were not given."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """For `RolloutState.extra`: the range of disparity."""


def given_of(
    model: WorldWeaverModel, rows: int, size: tuple[int, int], image: Any = None, video: Any = None, depth: Any = None
) -> Given | None:
    """Encode a picture or a video, and its depth.

    Args:
        model: the model.
        rows: B; one picture or video serves all of them.
        size: height and width in pixels: pictures are resized to it.
        image: as pipelines of diffusers take it; a picture of PIL in any mode, arrays also of uint8.
        video: likewise; its frames must be as many as the autoencoder puts into latent frames.
        depth: distances (F, H, W) or (B, F, H, W), or of one picture (H, W), of the size of the video.

    Raises:
        UserError: a picture and a video, values that are none of a picture, depth of neither, another number or size
            of frames, or a model without depth.
    """
    if image is not None and video is not None:
        raise UserError("image and video are both a beginning: give one of them")
    if image is None and video is None:
        if depth is not None:
            raise UserError("depth is that of an image or a video: give it too")
        return None
    clips = _clips(image, video, size)
    if len(clips) not in (1, rows):
        raise UserError(f"{len(clips)} pictures or videos for {rows} prompts: give one, or one for each")
    parts = {"rgb": model.encode(clips).expand(rows, -1, -1, -1, -1)}
    extra: dict[str, Tensor] = {}
    if depth is not None:
        if "depth" not in model.modalities:
            raise UserError("this model has no depth: leave depth out")
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
        raise UserError(f"the {what} is none that diffusers takes: {first_line(error)[:200]}") from error
    if pixels.dim() != 5 or pixels.shape[2] != 3 or not pixels.numel():
        raise UserError(f"the {what} is {tuple(pixels.shape)}, (videos, frames, channels, height, width): give RGB")
    # Of whole numbers from 0 to 255 that call themselves floats, diffusers makes white without a word.
    low, high = (float(end) for end in pixels.float().aminmax())
    if not -1 - _SLACK <= low <= high <= 1 + _SLACK:
        raise UserError(f"the {what} has values outside those of a picture: give uint8, or numbers from 0 to 1")
    return (pixels.float() * 0.5 + 0.5).clamp(0, 1)


def _plain(given: Any) -> Any:
    """Turn pictures into RGB as a viewer shows them, and bytes of arrays into numbers from 0 to 1."""
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
        raise UserError(f"depth is no array of distances: {first_line(error)}") from error
    given, wanted = tuple(distances.shape), (clips.shape[1], *clips.shape[3:])
    distances = distances[None] if distances.dim() == 2 else distances
    distances = distances[None] if distances.dim() == 3 else distances
    if distances.dim() != 4 or distances.shape[1:] != wanted or len(distances) not in (1, rows):
        raise UserError(f"depth of shape {given}: give distances {wanted}")
    return disparity_of(distances.expand(rows, -1, -1, -1))
