"""Samples that a run writes to disk: a table and clips of its rollouts, and a grid of samples at every evaluation."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from postgen.files import replacing
from postgen.rewards import RewardResult
from postgen.sampling.conditions import Row
from postgen.video import NoFFmpegError, contact_sheet, write_video


class CompletionLog:
    """Writes the rollouts of the first process: `step-N.jsonl` with one row per sample, and the first few clips.

    Args:
        folder: folder of the files.
        clips: number of clips to write for each rollout.
        fps: frames per second of the clips.
    """

    def __init__(self, folder: Path, clips: int, fps: float) -> None:
        self.folder, self.clips, self.fps = folder, clips, fps

    def write(
        self,
        step: int,
        rows: Sequence[Row],
        clips: Sequence[Tensor],
        result: RewardResult,
        advantages: Sequence[float],
    ) -> None:
        """Write the samples of one rollout; all sequences have one entry per sample, in the same order.

        Args:
            step: optimiser steps done before the rollout.
            rows: prompt rows.
            clips: clips (F, 3, H, W) in [0, 1].
            result: rewards.
            advantages: clipped advantages.
        """
        lines = []
        for number, row in enumerate(rows):
            scores = {name: _number(result.values[number, k].item()) for k, name in enumerate(result.names)}
            extra = {name: values[number] for name, values in result.extra.items()}
            lines.append({"step": step, "prompt": row["prompt"], **scores, "advantage": advantages[number], **extra})
        with replacing(self.folder / f"step-{step:06d}.jsonl") as part:
            part.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))
        for number, clip in enumerate(clips[: self.clips]):
            write_clip(self.folder / f"step-{step:06d}-{number}", clip, self.fps)


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


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
