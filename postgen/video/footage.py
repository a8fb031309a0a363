"""A long video as a clip that is read where it is looked at, so that only a window of it is in memory."""

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
"""Pixels of the frames that are in memory at once, 12 bytes each."""


_TRIM = 16
"""Windows after which free memory is given back to the system."""


class TooLongError(UserError):
    """All frames of a video were asked for at once, and they are more than was allowed."""


class Footage:
    """A video file or folder of frames in place of a clip (F,3,H,W) in [0,1]; it has a clip's shape and length.

    Args:
        path: as for `iter_video`.
        info: what `probe` says of it; None asks.
        most: bytes (12 a pixel) that `whole` may read; None sets no bound.

    Raises:
        VideoError: as `probe`, and when frames are read, as `iter_video`.
    """

    ndim = 4
    dtype = torch.float32

    def __init__(self, path: str | Path, info: VideoInfo | None = None, *, most: int | None = None) -> None:
        self.path, self.info, self.most = Path(path), info or probe(path), most
        self.error: str | None = None
        """Why its frames could not be read, after that has failed."""
        self.closed = False
        """Set it, from any thread, to end what reads frames at the next window."""

    @property
    def shape(self) -> torch.Size:
        """Frames, 3, height, width."""
        return torch.Size((self.info.frames, 3, self.info.height, self.info.width))

    def __len__(self) -> int:
        return self.info.frames

    def numel(self) -> int:
        """Return the number of values of the whole clip."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Return True: frames are float32."""
        return True

    def windows(self, overlap: int = 0, step: int = 1) -> Iterator[Tensor]:
        """Yield every `step`-th frame in windows (f,3,H,W), each beginning with the last `overlap` of the one before.

        Every window has more than `overlap` frames, but for the only one of a video that has no more.
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
        """Yield the frames of these indices, which rise, in windows."""
        start = 0
        for chunk in self._read(max(1, WINDOW // (self.info.height * self.info.width)), indices[-1] + 1):
            if own := [index - start for index in indices if start <= index < start + len(chunk)]:
                yield chunk[own]
            start += len(chunk)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Return the frames of these indices, which rise."""
        return torch.cat(list(self.picked(indices)))

    def whole(self) -> Tensor:
        """Return all frames at once.

        Raises:
            TooLongError: they take more than `most` bytes.
        """
        size = 4 * self.numel()
        if self.most is not None and size > self.most:
            count, _, height, width = self.shape
            raise TooLongError(
                f"it needs all frames at once, and {count} of {width}x{height} take {size / 2**20:.0f} MiB, more than "
                f"the {self.most / 2**20:.0f} that are allowed"
            )
        return torch.cat(list(self._read(64)))

    def _read(self, chunk: int, stop: int | None = None) -> Iterator[Tensor]:
        seen = 0
        try:
            for number, frames in enumerate(iter_video(self.path, chunk=chunk, count=stop), 1):
                seen += len(frames)
                if self.closed:
                    raise VideoError(f"{self.path} was closed while it was read")
                yield frames
                if number % _TRIM == 0:
                    _give_back()
            if seen != (wanted := len(self) if stop is None else stop):
                raise VideoError(f"{self.path} had {wanted} frames and now {seen}: it was changed while it was read")
        except (VideoError, OSError) as error:
            self.error = " ".join(str(error).split())
            raise


def _give_back() -> None:
    """Have glibc give free memory back: the little that is kept of each window lies between what the others left."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # musl has none
        libc.malloc_trim(0)
