"""Where the depth of given frames comes from: the world's own, or an estimator of transformers."""

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
"""Kind of transformers' model -> whether it gives distances; False is disparity up to scale and shift."""


class DepthSource(Protocol):
    """Gives the disparity of a clip."""

    def __call__(self, frames: Tensor) -> Tensor:
        """Return (T, H, W) float32 disparity, near is large, of frames (T, H, W, 3) in [0, 1]."""


class ExactDepth:
    """The disparity of a scene of `postgen.world`, 1 / metres and 0 at the backdrop, of frames that it rendered.

    Args:
        spec: the scene.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, frames: Tensor) -> Tensor:
        """Return the disparity of the scene's first frames.

        Args:
            frames: (T, H, W, 3) in [0, 1], as `render` gives them; of these only length and size are read.

        Raises:
            UserError: pictures that are not square, as the world's are.
        """
        count, height, width = _sizes(frames)
        if height != width:
            raise UserError(f"frames of {height} x {width} are none of the world, whose pictures are square")
        depth = render([self.spec], num_frames=count, size=height, supersample=1, device=frames.device).depth_BFHW
        assert depth is not None
        return disparity_of(depth[0])


class TransformersDepth:
    """A depth estimator of transformers, as Depth Anything, DPT, ZoeDepth or DepthPro.

    It is asked for `predicted_depth`, frame by frame, never for the picture, which is scaled to each frame. What an
    estimator gives still flickers, so scale and shift follow from frame to frame (`align_scales`).

    Args:
        model: folder or Hub id, with its image processor.
        metric: whether it gives distances; False is disparity. None asks the model's configuration.
        align: whether the frames are aligned.
        device: where it runs.
        dtype: in which.

    Raises:
        UserError: a model that cannot be loaded, or of which nobody knows whether it is metric.
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
            made = pipeline("depth-estimation", model=str(model), device=torch.device(device), dtype=dtype)
        except (ImportError, KeyError, OSError, ValueError) as error:
            raise UserError(
                f"depth estimator {model} cannot be loaded: {first_line(error)} Give a folder or a Hub id of a model"
                " of transformers' pipeline depth-estimation"
            ) from error
        self._pipe: Any = made
        config = self._pipe.model.config
        kind = getattr(config, "depth_estimation_type", None)
        found = METRIC.get(config.model_type) if kind is None else kind == "metric"
        if metric is None and found is None:
            raise UserError(f"whether {config.model_type} gives distances is not known: give metric=True or False")
        self.metric, self.align = found if metric is None else metric, align

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Return the disparity of a clip.

        Args:
            frames: (T, H, W, 3) in [0, 1].

        Raises:
            UserError: another shape.
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
    """Return disparity whose frames have the scale and shift of the first, by the pixels that stand still.

    Frame t is scaled and shifted so that its still pixels have the mean and the spread that they have in frame t - 1.
    That is the least-squares line which treats both frames alike; a regression of one on the other would shrink the
    scale a little with every frame. A frame with too few still pixels, or whose depth there says nothing, goes as the
    one before it.

    Args:
        disparity: (T, H, W).
        frames: (T, H, W, 3) in [0, 1].
        still: mean change of the three colours up to which a pixel stands still.
        least: share of the pixels that must.

    Raises:
        UserError: shapes that do not fit, or numbers out of range.
    """
    if disparity.shape != frames.shape[:3] or _sizes(frames)[0] < 1:
        raise UserError(f"disparity of shape {tuple(disparity.shape)} for frames of {tuple(frames.shape)}")
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
        raise UserError(f"frames of shape {tuple(frames.shape)}: give (frames, height, width, 3)")
    count, height, width, _ = frames.shape
    return count, height, width
