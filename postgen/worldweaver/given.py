"""What a long video begins with: a picture, or a video, encoded once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.worldweaver.depth import DisparityRange, disparity_of
from postgen.worldweaver.levels import Modality
from postgen.worldweaver.model import WorldWeaverModel


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
        image: as pipelines of diffusers take it.
        video: likewise; its frames must be as many as the autoencoder puts into latent frames.
        depth: distances (F, H, W) or (B, F, H, W), or of one picture (H, W), of the size of the video.

    Raises:
        UserError: a picture and a video, depth of neither, another number or size of frames, or a model without depth.
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
    try:
        if image is not None:
            pixels: Tensor = processor.preprocess(image, height=size[0], width=size[1])[:, None]
        else:
            pixels = processor.preprocess_video(video, height=size[0], width=size[1]).transpose(1, 2)
    except (ValueError, TypeError, IndexError) as error:
        what = "image" if image is not None else "video"
        raise UserError(f"the {what} is none that diffusers takes: {' '.join(str(error).split())[:200]}") from error
    return (pixels.float() * 0.5 + 0.5).clamp(0, 1)


def _disparity(depth: Any, clips: Tensor, rows: int) -> Tensor:
    distances = torch.as_tensor(depth).float()
    wanted = (clips.shape[1], *clips.shape[3:])
    distances = distances[None] if distances.dim() == 2 else distances
    distances = distances[None] if distances.dim() == 3 else distances
    if distances.dim() != 4 or distances.shape[1:] != wanted or len(distances) not in (1, rows):
        raise UserError(f"depth of shape {tuple(torch.as_tensor(depth).shape)}: give distances {wanted}")
    return disparity_of(distances.expand(rows, -1, -1, -1))
