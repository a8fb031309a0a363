"""Conversion of clips and frames from tensors to 8-bit pictures, with checks."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from postgen.video.ffmpeg import VideoError

Frames = Tensor | Iterable[Tensor]
"""A clip (F, 3, H, W), a frame (3, H, W), or an iterable of either."""

# Decoders overshoot [0, 1] by up to this much; larger excesses are values that were not scaled to [0, 1].
_SLACK = 0.05


def pictures(frames: Frames) -> Iterator[Tensor]:
    """Yield the frames one by one as (H, W, 3) uint8 tensors on the CPU.

    Raises:
        VideoError: an item is not a tensor of RGB frames, a frame differs in size from the first one, or values lie
            outside [0, 1].
    """
    size = None
    index = 0
    for item in [frames] if isinstance(frames, Tensor) else frames:
        if not isinstance(item, Tensor) or item.dim() not in (3, 4) or item.shape[-3] != 3:
            got = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
            raise VideoError(f"frame {index}: expected a tensor (3, H, W) or (F, 3, H, W), got {got}")
        if 0 in item.shape[-2:]:
            raise VideoError(f"frame {index} has no pixels: its shape is {tuple(item.shape)}")
        for frame in item if item.dim() == 4 else item[None]:
            size = size or frame.shape
            if frame.shape != size:
                raise VideoError(f"frame {index} has shape {tuple(frame.shape)}, those before it {tuple(size)}")
            yield _picture(frame.detach(), index)
            index += 1


def _picture(frame: Tensor, index: int) -> Tensor:
    if frame.dtype != torch.uint8:
        if not frame.is_floating_point():
            raise VideoError(f"frame {index}: expected floating point in [0, 1] or uint8, got {frame.dtype}")
        low, high = (float(end) for end in frame.aminmax())
        # `not` around the comparison, so that NaN is refused too: every comparison with NaN is false.
        if not (low >= -_SLACK and high <= 1 + _SLACK):
            raise VideoError(f"frame {index}: values must lie in [0, 1], got [{low:.3g}, {high:.3g}]")
        frame = frame.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return frame.permute(1, 2, 0).contiguous().cpu()
