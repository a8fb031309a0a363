"""Depth sources for given frames: exact depth of a world scene, or a depth estimator of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError, check_number, first_line
from postgen.world import Spec, render

from .depth import disparity_of

METRIC = {"depth_pro": True, "dpt": False, "glpn": True, "zoedepth": True}
"""Model type in transformers -> whether the model predicts distances (else disparity up to scale and shift)."""


class DepthSource(Protocol):
    """A callable that returns the disparity of a clip."""

    def __call__(self, frames: Tensor) -> Tensor:
        """Return disparity (T, H, W) float32, large where near, of frames (T, H, W, 3) in [0, 1]."""


class ExactDepth:
    """Exact disparity of a scene of `postgen.world`, for frames rendered from it: 1 / metres, 0 at the backdrop.

    Args:
        spec: the scene.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, frames: Tensor) -> Tensor:
        """Return the disparity of the first frames of the scene.

        Args:
            frames: (T, H, W, 3) in [0, 1] from `render`; only their number and size are used.

        Raises:
            UserError: frames that are not square, because `render` makes square frames.
        """
        count, height, width = _sizes(frames)
        if height != width:
            raise UserError(f"frames are {height} x {width}, but frames of the world are square: give rendered frames")
        depth = render([self.spec], num_frames=count, size=height, supersample=1, device=frames.device).depth_BFHW
        assert depth is not None
        return disparity_of(depth[0])


class TransformersDepth:
    """A depth estimator of transformers, for example Depth Anything, DPT, ZoeDepth or DepthPro.

    The source uses `predicted_depth` of each frame and not the depth picture, because the picture is normalised per
    frame. The estimates still flicker, so `align_scales` aligns scale and shift from frame to frame.

    Args:
        model: folder or Hub id of the model with its image processor.
        metric: whether the model predicts distances (else disparity); None: use the model's configuration.
        align: whether to align the frames.
        device: device of the model.
        dtype: dtype of the model.

    Raises:
        UserError: a model that cannot be loaded, or a model for which `metric` is required.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        metric: bool | None = None,
        align: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import pipeline

        try:
            self._pipe: Any = pipeline("depth-estimation", model=str(model), device=torch.device(device), dtype=dtype)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(
                f"the depth estimator {model} cannot be loaded, name a folder or a Hub id: {first_line(error)}"
            ) from error
        config = self._pipe.model.config
        kind = getattr(config, "depth_estimation_type", None)
        found = METRIC.get(config.model_type) if kind is None else kind == "metric"
        if metric is None and found is None:
            raise UserError(f"it is unknown whether {config.model_type} predicts distances: give metric=True or False")
        self.metric, self.align = found if metric is None else metric, align

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Return the disparity of a clip, (T, H, W).

        Args:
            frames: (T, H, W, 3) in [0, 1].

        Raises:
            UserError: a wrong shape.
        """
        from PIL import Image

        _, height, width = _sizes(frames)
        pixels = frames.mul(255).round().clamp(0, 255).to("cpu", torch.uint8)
        found = self._pipe([Image.fromarray(picture.numpy()) for picture in pixels])
        maps = [torch.as_tensor(each["predicted_depth"]).float()[None, None] for each in found]
        if any(one.shape[-2:] != (height, width) for one in maps):
            maps = [functional.interpolate(one, (height, width), mode="bicubic") for one in maps]
        values = torch.cat(maps)[:, 0].to(frames.device)
        disparity = 1 / values.clamp_min(1e-3) if self.metric else values
        return align_scales(disparity, frames) if self.align else disparity


def align_scales(disparity: Tensor, frames: Tensor, *, still: float = 0.02, least: float = 0.02) -> Tensor:
    """Align scale and shift of the disparity of all frames to the first frame, using pixels that do not move.

    Frame t is scaled and shifted so that its still pixels have the same mean and standard deviation as in frame t - 1.
    This line treats both frames symmetrically; a regression of one frame on the other would reduce the scale a little
    with every frame. A frame keeps the scale and shift of the frame before if it has too few still pixels, or if
    their disparity is constant or not positively correlated.

    Args:
        disparity: (T, H, W).
        frames: (T, H, W, 3) in [0, 1].
        still: largest mean change of the three colour channels of a still pixel.
        least: smallest share of still pixels in a frame.

    Raises:
        UserError: shapes that do not match, or numbers out of range.
    """
    if disparity.shape != frames.shape[:3] or _sizes(frames)[0] < 1:
        raise UserError(
            f"disparity has shape {tuple(disparity.shape)} and frames have {tuple(frames.shape)}: give (T, H, W) and"
            " (T, H, W, 3)"
        )
    check_number("still", still, 0, 1)
    check_number("least", least, 0, 1)
    aligned = disparity.double().clone()
    scale, shift = 1.0, 0.0
    for frame in range(1, len(aligned)):
        mask = (frames[frame] - frames[frame - 1]).abs().mean(-1) <= still
        before, now = aligned[frame - 1][mask], aligned[frame][mask]
        if mask.double().mean() >= least and mask.sum() > 1:
            spread = now.std()
            if spread > 0 and ((before - before.mean()) * (now - now.mean())).sum() > 0:
                scale = float(before.std() / spread)
                shift = float(before.mean() - scale * now.mean())
        aligned[frame] = scale * aligned[frame] + shift
    return aligned.to(disparity.dtype)


def _sizes(frames: Tensor) -> tuple[int, int, int]:
    if frames.dim() != 4 or frames.shape[3] != 3:
        raise UserError(f"frames have shape {tuple(frames.shape)}: give (frames, height, width, 3)")
    count, height, width, _ = frames.shape
    return count, height, width
