"""A long video in place of a clip: frames are read on demand, so that only a window of frames is in memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.video.ffmpeg import VideoError
from postgen.video.read import VideoInfo, iter_video, probe

WINDOW = 2**18
"""Pixels of the frames that are in memory at once; a pixel takes 12 bytes."""


_TRIM = 16
"""Number of windows after which free memory is returned to the operating system."""


class TooLongError(UserError):
    """All frames of a video are requested at once and take more memory than is allowed."""


class Footage:
    """A video file or a folder of frames in place of a clip (F, 3, H, W) in [0, 1], with the clip's shape and length.

    Args:
        path: a video file or a folder, as for `iter_video`.
        info: the result of `probe` for this video; None calls `probe`.
        most: largest number of bytes (12 per pixel) that `whole` may read; None sets no limit.

    Raises:
        VideoError: as `probe`; methods that read frames also raise it, as `iter_video`.
    """

    ndim = 4
    dtype = torch.float32

    def __init__(self, path: str | Path, info: VideoInfo | None = None, *, most: int | None = None) -> None:
        self.path, self.info, self.most = Path(path), info or probe(path), most
        self.error: str | None = None
        """Why the frames could not be read, after a read has failed; None before."""
        self.closed = False
        """Set this to True, from any thread, to make every running read raise `VideoError` at its next window."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the clip: frames, 3, height, width."""
        return torch.Size((self.info.frames, 3, self.info.height, self.info.width))

    def __len__(self) -> int:
        return self.info.frames

    def numel(self) -> int:
        """Return the number of values in the whole clip."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Return True, because frames are float32."""
        return True

    def windows(self, overlap: int = 0, step: int = 1) -> Iterator[Tensor]:
        """Yield every `step`-th frame in windows (f, 3, H, W) that overlap by `overlap` frames.

        Every window has more than `overlap` frames, except for a video with at most `overlap` frames in all.
        """
        kept: Tensor | None = None
        fresh = start = 0
        for chunk in self._read(max(overlap + 1, WINDOW // (self.info.height * self.info.width))):
            frames = chunk[-start % step :: step]
            start += len(chunk)
            fresh += len(frames)
            kept = frames if kept is None else torch.cat((kept, frames))
            if fresh and len(kept) > overlap:
                yield kept
                kept, fresh = kept[len(kept) - overlap :].clone() if overlap else None, 0
        if fresh and kept is not None:
            yield kept

    def picked(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield the frames with these indices, in windows; the indices must be in ascending order."""
        start = 0
        for chunk in self._read(max(1, WINDOW // (self.info.height * self.info.width)), indices[-1] + 1):
            if own := [index - start for index in indices if start <= index < start + len(chunk)]:
                yield chunk[own]
            start += len(chunk)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Return the frames with these indices as one clip; the indices must be in ascending order."""
        return torch.cat(list(self.picked(indices)))

    def whole(self) -> Tensor:
        """Return all frames as one clip.

        Raises:
            TooLongError: the frames take more than `most` bytes.
        """
        size = 4 * self.numel()
        if self.most is not None and size > self.most:
            count, _, height, width = self.shape
            raise TooLongError(
                f"all frames are needed at once, and {count} frames of {width}x{height} take {size / 2**20:.0f} MiB,"
                f" more than the {self.most / 2**20:.0f} MiB allowed: give a shorter or smaller video, or raise the"
                " limit (`most`, --whole-mb)"
            )
        return torch.cat(list(self._read(64)))

    def _read(self, chunk: int, stop: int | None = None) -> Iterator[Tensor]:
        seen = 0
        try:
            for number, frames in enumerate(iter_video(self.path, chunk=chunk, count=stop), 1):
                seen += len(frames)
                if self.closed:
                    raise VideoError(f"reading of {self.path} was stopped: its Footage was closed")
                yield frames
                if number % _TRIM == 0:
                    _give_back()
            if seen != (wanted := len(self) if stop is None else stop):
                raise VideoError(f"{self.path} had {wanted} frames and now has {seen}: it changed while it was read")
        except (VideoError, OSError) as error:
            self.error = " ".join(str(error).split())
            raise


def _give_back() -> None:
    """Make glibc return free memory: values kept from each window fragment the heap and hold its pages."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # musl has no malloc_trim
        libc.malloc_trim(0)
