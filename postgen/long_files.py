"""Files of a long video that the command line generates: the video, its depth, and the rollout state beside them.

If generation stops for any reason, even a full disk, the video ends where the state continues, or neither exists. A
killed process may leave one chunk in the video that the state does not include; the next process removes that chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from postgen.errors import UserError
from postgen.interrupts import held
from postgen.locks import NAME as LOCK
from postgen.locks import FolderLock
from postgen.video import GrowingVideo, check_mark, copy_video
from postgen.worldweaver.chunks import WorldWeaverChunk
from postgen.worldweaver.state import RolloutState

REQUEST = "request"
"""Key of the request in `RolloutState.model`."""
_MARKS = ("written.video", "written.depth")
WHOLE_UP_TO = 2**28
"""Largest size in bytes of the decoder caches that are saved after every chunk. Larger caches are omitted (Wan at
480 x 832 has 3.8 GB, and as much again for depth); a process that continues then decodes the last latents again and
returns the same frames. Smaller caches are faster to save than to rebuild: the embedded model at 128 x 128 has 13 MB,
and would need some seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Paths of the files of a long video."""

    video: Path
    depth: Path
    """Depth video; written only with `--depth`."""
    sheet: Path
    state: Path
    """Folder of the rollout state."""
    kind: str
    """Format of the video: mp4 or frames."""


class LongFiles:
    """Writes a long video chunk by chunk.

    Args:
        places: paths to write.
        rate: frames per second.
        depth: whether to write the depth video too.
        state: state of an earlier process from which to continue; None: begin a new video.
        source: files of the earlier process, if they must not be changed; None: they are at `places`. The files are
            copied when the first new chunk arrives.

    Raises:
        UserError: a path that cannot be written, or videos that do not match the state.
    """

    def __init__(
        self,
        places: Places,
        rate: float,
        *,
        depth: bool,
        state: RolloutState | None = None,
        source: Places | None = None,
    ) -> None:
        self.places, self._rate = places, rate
        self._marks = _marks_of(state, depth=depth)
        self._sources = [] if source is None else [source.video, source.depth][: 1 + depth]
        self._videos: list[GrowingVideo] = []
        if source is None:
            self._open()
        for path, mark in zip(self._sources, self._marks, strict=False):
            if mark[0]:
                check_mark(path, mark)
        self.saved = state is not None and source is None
        """Whether there is a saved state from which to continue."""

    @property
    def frames(self) -> int:
        """Number of frames of the video that the state includes."""
        return self._marks[0][0]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context manager that locks the files against other processes.

        Raises:
            UserError: another process holds the lock, or the folder cannot be written.
        """
        folder = self.places.state
        made, lock = not folder.exists(), FolderLock(folder, setting="state")
        try:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except OSError as error:
                raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
            yield
        finally:
            if made and not self.saved:
                with suppress(OSError):
                    (folder / LOCK).unlink(missing_ok=True)
                    folder.rmdir()
            lock.release()

    def take(self, chunk: WorldWeaverChunk, note: dict[str, Any]) -> None:
        """Write a chunk and then the state after it. Either both are written or neither.

        Args:
            chunk: with frames and depth as tensors.
            note: the request as JSON values.

        Raises:
            UserError: the disk reports an error.
        """
        state = chunk.state
        clips = [chunk.frames[0]]
        if len(self._marks) > 1:
            clips.append(chunk.depth[0][:, None].expand(-1, 3, -1, -1))
        try:
            if not self._videos:
                self._open()
            for video, clip in zip(self._videos, clips, strict=True):
                if len(clip):  # empty while an autoencoder that looks ahead has not decoded the first frames
                    video.append(clip)
            marks = [video.mark for video in self._videos]
            state.extra |= {name: torch.tensor(mark) for name, mark in zip(_MARKS, marks, strict=False)}
            state.model[REQUEST] = note
            kept = state.light() if state.decoder_bytes > WHOLE_UP_TO else state
            with held():
                kept.save(self.places.state)
                self.saved, self._marks = True, marks
        except BaseException as error:
            self._cut()
            if isinstance(error, OSError):
                more = f"; after freeing space: postgen generate --continue {self.places.state}" if self.saved else ""
                raise UserError(f"cannot write {self.places.state}: {error.strerror or error}{more}") from error
            raise

    @property
    def _paths(self) -> list[Path]:
        return [self.places.video, self.places.depth][: len(self._marks)]

    def _open(self) -> None:
        """Open the videos. If the source files must stay unchanged, copy them first."""
        for number, (path, mark) in enumerate(zip(self._paths, self._marks, strict=True)):
            if self._sources and mark[0]:
                copy_video(self._sources[number], path, mark)
            self._videos.append(GrowingVideo(path, fps=self._rate, format=self.places.kind, mark=mark))

    def _cut(self) -> None:
        """Remove frames that no saved state includes."""
        for video, mark in zip(self._videos, self._marks, strict=False):
            if not self.saved or video.frames != mark[0]:
                video.cut(mark if self.saved else (0, 0, 0))


def _marks_of(state: RolloutState | None, *, depth: bool) -> list[tuple[int, int, int]]:
    names = _MARKS[: 1 + depth]
    if state is None:
        return [(0, 0, 0) for _ in names]
    found = [state.extra[name].tolist() for name in names]
    if any(len(mark) != 3 for mark in found):
        raise UserError("the state is of an older version of postgen and lacks data of the video: begin a new video")
    return [(frames, size, known) for frames, size, known in found]
