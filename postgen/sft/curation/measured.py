"""Measure one file: find its shots and bars, and apply all filters to sampled frames of each shot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from postgen.video import NoFFmpegError, VideoError, iter_video, probe, read_picture

from .bars import Box, enlarged, find_bars
from .config import CurationConfig
from .cuts import find_cuts, shots, thumbnails
from .filters import FILTERS
from .hashes import Embed, packed, perceptual_hash, written
from .meta import Meta, picked

_HELD = 2**28
"""Bytes of small frames that are held. The frames of a longer video are read a second time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """What was measured in one shot of a video, or in an image."""

    first: int
    """Index of its first frame in the file."""
    count: int
    """Number of its frames."""
    box: Box | None
    """Picture between black bars, in pixels of the file; None without bars."""
    bars: float
    """Share of the picture that black bars cover."""
    values: dict[str, float | None]
    """Filter -> value; None if the filter does not apply."""
    hash: str
    """Perceptual hash (`packed`)."""
    embedding: str | None
    """Embedding (`written`); None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was measured in one file."""

    height: int = 0
    width: int = 0
    frames: int = 0
    fps: float = 0.0
    cuts: tuple[int, ...] = ()
    """Frames that begin a new shot; empty with `cuts: keep`."""
    shots: tuple[Shot, ...] = ()
    error: str | None = None
    """Why the file cannot be read; None if it can."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Self:
        """Return the result of `to_dict` as an object.

        Raises:
            TypeError, KeyError: the values were not written by `to_dict`.
        """
        parts = [Shot(**{**one, "box": None if one["box"] is None else Box(**one["box"])}) for one in told["shots"]]
        return cls(**{**told, "shots": tuple(parts), "cuts": tuple(told["cuts"])})


def measure(
    path: Path, kind: Literal["image", "video"], config: CurationConfig, embed: Embed | None = None
) -> Measured:
    """Measure a video, or a picture file.

    A video is decoded twice, once for its rate and once for its frames; a long one (256 MiB of small frames) three
    times.

    Args:
        path: a video file, a folder of frames, or a picture file.
        kind: which of them it is.
        config: the settings.
        embed: embedder of `embedder`; None: no embedding.

    Returns:
        The measurements; for a damaged file, only the error.

    Raises:
        NoFFmpegError: ffmpeg is missing.
        UserError: OpenCV is missing, which `flow` needs.
    """
    try:
        return _picture(path, config, embed) if kind == "image" else _video(path, config, embed)
    except NoFFmpegError:
        raise
    except (VideoError, OSError) as error:
        return Measured(error=" ".join(str(error).split()))


def _picture(path: Path, config: CurationConfig, embed: Embed | None) -> Measured:
    pixels = torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1)[None]
    height, width = pixels.shape[-2:]
    small = _small(pixels.float() / 255, config.side)
    meta = Meta(kind="image", height=height, width=width)
    return Measured(height=height, width=width, frames=1, shots=(_shot(small, 0, meta, config, embed),))


def _video(path: Path, config: CurationConfig, embed: Embed | None) -> Measured:
    info = probe(path)
    thumbs: list[Tensor] = []
    held: list[Tensor] | None = []
    for chunk in iter_video(path):
        thumbs.append(thumbnails(chunk))
        if held is not None:
            held.append(_eight_bit(_small(chunk, config.side)))
            held = held if sum(one.numel() for one in held) <= _HELD else None
    count = sum(map(len, thumbs))
    found_cuts = find_cuts(torch.cat(thumbs), change=config.cut_change, ratio=config.cut_ratio)
    cuts = [] if config.cuts == "keep" else found_cuts
    spans = shots(count, cuts if config.cuts == "split" else [])
    picks = [picked(length, config.pairs) for _, length in spans]
    found = _in_memory(torch.cat(held), spans, picks) if held is not None else _again(path, config.side, spans, picks)
    told = []
    for (first, length), indices, frames in zip(spans, picks, found, strict=True):
        meta = Meta(kind="video", height=info.height, width=info.width, frames=length, fps=info.fps, indices=indices)
        told.append(_shot(frames.float() / 255, first, meta, config, embed))
    return Measured(
        height=info.height, width=info.width, frames=count, fps=info.fps, cuts=tuple(cuts), shots=tuple(told)
    )


Spans = list[tuple[int, int]]
Picks = list[tuple[int, ...]]


def _in_memory(frames: Tensor, spans: Spans, picks: Picks) -> Iterator[Tensor]:
    for (first, _), indices in zip(spans, picks, strict=True):
        yield frames[[first + index for index in indices]]


def _again(path: Path, side: int, spans: Spans, picks: Picks) -> Iterator[Tensor]:
    """Yield the picked frames of each shot from one more pass through the file; one shot is in memory at a time."""
    # Whole chunks are made small, as in the first pass, because rounding may depend on the number of frames.
    chunks = (_eight_bit(_small(chunk, side)) for chunk in iter_video(path))
    chunk, start = next(chunks), 0
    for (first, _), indices in zip(spans, picks, strict=True):
        own = []
        for index in indices:
            while first + index >= start + len(chunk):
                start += len(chunk)
                chunk = next(chunks)
            own.append(chunk[first + index - start])
        yield torch.stack(own)


def _shot(frames: Tensor, first: int, meta: Meta, config: CurationConfig, embed: Embed | None) -> Shot:
    small = (frames.shape[-2], frames.shape[-1])
    box = None if config.bars == "keep" else find_bars(frames)
    bars, full = 0.0 if box is None else box.area(*small), None
    if box is not None and config.bars == "crop":
        full = enlarged(box, small, (meta.height, meta.width))
        frames = box.cut(frames)
        meta = replace(meta, height=full.height, width=full.width)
    skipped = set() if config.measured()["flow"] else {"flow"}
    values = {name: None if name in skipped else apply(frames, meta) for name, apply in FILTERS.items()}
    return Shot(
        first=first,
        count=meta.frames,
        box=full,
        bars=bars,
        values=values,
        hash=packed(perceptual_hash(frames)),
        embedding=None if embed is None else written(embed(frames)),
    )


def _small(frames: Tensor, side: int) -> Tensor:
    height, width = frames.shape[-2:]
    scale = side / min(height, width)
    if scale >= 1:
        return frames
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return interpolate(frames, size, mode="bicubic", antialias=True).clamp(0, 1)


def _eight_bit(frames: Tensor) -> Tensor:
    return (frames * 255).round().byte()
