"""Small videos and pictures with captions, and a tiny Wan pipeline that encodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from postgen.families import Denoiser, denoiser_for
from postgen.sft.data import SftData
from postgen.sft.data_config import SftDataConfig
from postgen.video import write_video
from tests.tiny_wan import LATENT_CHANNELS, wan_components

CPU = torch.device("cpu")


def video(path: Path, frames: int = 9, height: int = 32, width: int = 32, *, fps: float = 8, seed: int = 0) -> Path:
    """Write a video of noise; a path without suffix is a folder of frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))
    write_video(path, clip, fps=fps, **({} if path.suffix else {"format": "frames"}))
    return path


def picture(path: Path, height: int = 32, width: int = 32, *, seed: int = 0) -> Path:
    """Write a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(values.numpy()).save(path)
    return path


def captioned(path: Path, caption: str) -> Path:
    """Write the caption of a file beside it."""
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def folder_of_clips(folder: Path, videos: int = 4, pictures: int = 2) -> Path:
    """Write videos of 9 frames and pictures, with captions."""
    for number in range(videos):
        captioned(video(folder / f"clip{number}.mp4", seed=number), f"clip {number}")
    for number in range(pictures):
        captioned(picture(folder / f"picture{number}.png", seed=number), f"picture {number}")
    return folder


def tiny(kind: str = "WanPipeline", *, seed: int = 0) -> tuple[Any, Denoiser]:
    """Return a tiny Wan pipeline and its denoiser."""
    import diffusers

    channels = 2 * LATENT_CHANNELS + 4 if "Image" in kind else LATENT_CHANNELS
    pipe = getattr(diffusers, kind)(**wan_components(in_channels=channels, seed=seed))
    return pipe, denoiser_for(pipe)


def settings(source: Path | str | None, **values: Any) -> SftDataConfig:
    """Return settings for clips of 32 x 32 pixels and 9 frames."""
    size = {"height": 32, "width": 32, "num_frames": 9, "aspects": []}
    return SftDataConfig(train_dataset=None if source is None else str(source), **{**size, **values})


def built(model: tuple[Any, Denoiser], config: SftDataConfig, folder: Path, **words: Any) -> SftData:
    """Read and encode the clips on the CPU."""
    return SftData.build(config, *model, CPU, folder=folder, **{"batch_size": 2, **words})
