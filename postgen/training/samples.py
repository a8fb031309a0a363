"""Samples of an evaluation: the sampler that draws them, and the clips and pictures that a run writes to disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from postgen.families import Denoiser
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Sampler, Sampling
from postgen.sampling.schedule import schedule_of
from postgen.video import NoFFmpegError, contact_sheet, write_video


def evaluation_sampler(
    denoiser: Denoiser, steps: int, guidance: float, size: dict[str, int], device: torch.device
) -> Sampler:
    """Return a deterministic sampler with the pipeline's noise levels and Euler steps (DDIM steps with alpha-bars).

    Args:
        denoiser: the policy to evaluate.
        steps: number of sampling steps.
        guidance: scale of classifier-free guidance.
        size: `num_frames`, `height` and `width` of a clip.
        device: device of the latents.
    """
    schedule = schedule_of(denoiser, steps, denoiser.latent_shape(**size))
    how = Sampling(kind="ode", guidance=guidance, size=size)
    # The sampler has its own meter, because the reported cost of training leaves out evaluations.
    return Sampler(denoiser, schedule, how, Meter(device), device)


def write_samples(folder: Path, step: int, clips: Sequence[Tensor], prompts: Sequence[str], fps: float) -> None:
    """Write samples of an evaluation: `step-N.mp4` with the clips side by side, and `step-N.png`, a contact sheet.

    The video is left out if the clips have a single frame, or if there is no ffmpeg.
    """
    if not clips:
        return
    shown = [_displayable(clip) for clip in clips]
    columns = math.ceil(math.sqrt(len(shown)))
    name = f"step-{step:06d}"
    if len(shown[0]) > 1:
        _video_written(folder / f"{name}.mp4", tiled(shown, columns), fps)
    moments = torch.linspace(0, len(shown[0]) - 1, min(5, len(shown[0]))).round().long()
    frames = torch.cat([clip[moments] for clip in shown])
    title = f"step {step}: " + "; ".join(prompts[:3])
    contact_sheet(
        frames,
        folder / f"{name}.png",
        columns=len(moments),
        limit=max(2, len(frames)),
        title=title,
        indices=moments.tolist() * len(shown),
    )


def write_clip(path: Path, clip: Tensor, fps: float) -> None:
    """Write a clip as `path`.mp4. A single frame, or any clip if there is no ffmpeg, becomes the sheet `path`.png."""
    clip = _displayable(clip)
    if len(clip) == 1 or not _video_written(path.with_suffix(".mp4"), clip, fps):
        contact_sheet(clip, path.with_suffix(".png"), columns=min(len(clip), 6))


def _video_written(path: Path, clip: Tensor, fps: float) -> bool:
    """Write a video. Without ffmpeg, warn once and return False, because missing videos must not end a run."""
    try:
        write_video(path, clip, fps=fps)
    except NoFFmpegError as error:
        _say_once(f"samples are written as PNG sheets instead of videos: {error}")
        return False
    return True


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def tiled(clips: Sequence[Tensor], columns: int) -> Tensor:
    """Tile clips (F, 3, H, W) of equal size into one clip, row by row; empty places in the last row are black."""
    blank = torch.zeros_like(clips[0])
    padded = [*clips, *[blank] * (-len(clips) % columns)]
    rows = [torch.cat(padded[low : low + columns], dim=3) for low in range(0, len(padded), columns)]
    return torch.cat(rows, dim=2)


def _displayable(clip: Tensor) -> Tensor:
    return clip.detach().float().nan_to_num(0.0).clamp(0, 1).cpu()
