"""The files of a long video that is made by the command line: the video, its depth, and the state beside them.

Whatever ends the work, even a full disk, leaves a video that ends where the state goes on, or neither of the two.
Killed, a process may leave a chunk more in the video than in the state; the next one cuts it off.
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
"""What `RolloutState.model` calls the request."""
_MARKS = ("written.video", "written.depth")
WHOLE_UP_TO = 2**28
"""Bytes of what decoders remember that are saved after every chunk. More are left out (in Wan at 480 x 832 they are
3.8 GB, for depth as much again): whoever goes on decodes the last latents once more, and gets the same frames. Fewer
are saved sooner than they are made again: in the embedded model at 128 x 128 it is 13 MB against some seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Files of a long video."""

    video: Path
    depth: Path
    """Of the depth; written with `--depth` alone."""
    sheet: Path
    state: Path
    """Folder of the state."""
    kind: str
    """mp4 or frames."""


class LongFiles:
    """Writes a long video chunk by chunk.

    Args:
        places: where to.
        rate: frames per second.
        depth: whether the depth is written too.
        state: of an earlier process, to go on from; None begins.
        source: where its files are, if they are to stay as they are; None: at the places. Once there is a chunk more,
            they are copied.

    Raises:
        UserError: a place that cannot be written, or videos that are not those of the state.
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
        """Whether there is a state to go on from."""

    @property
    def frames(self) -> int:
        """Frames of the video that the state knows of."""
        return self._marks[0][0]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes away while the block works on the files.

        Raises:
            UserError: another one is at them, or the place cannot be written.
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
        """Write a chunk, and then the state that begins behind it: all of it, or nothing.

        Args:
            chunk: with frames and depth as tensors.
            note: the request, as JSON has it.

        Raises:
            UserError: the disk refuses.
        """
        state = chunk.state
        clips = [chunk.frames[0]]
        if len(self._marks) > 1:
            clips.append(chunk.depth[0][:, None].expand(-1, 3, -1, -1))
        try:
            if not self._videos:
                self._open()
            for video, clip in zip(self._videos, clips, strict=True):
                if len(clip):  # an autoencoder that looks ahead gives the first frames later
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
                more = f"; with room for it: postgen generate --continue {self.places.state}" if self.saved else ""
                raise UserError(f"cannot write {self.places.state}: {error.strerror or error}{more}") from error
            raise

    @property
    def _paths(self) -> list[Path]:
        return [self.places.video, self.places.depth][: len(self._marks)]

    def _open(self) -> None:
        """Open the videos; copies first, where those of the state are to stay."""
        for number, (path, mark) in enumerate(zip(self._paths, self._marks, strict=True)):
            if self._sources and mark[0]:
                copy_video(self._sources[number], path, mark)
            self._videos.append(GrowingVideo(path, fps=self._rate, format=self.places.kind, mark=mark))

    def _cut(self) -> None:
        """Take away what no state knows of."""
        for video, mark in zip(self._videos, self._marks, strict=False):
            if not self.saved or video.frames != mark[0]:
                video.cut(mark if self.saved else (0, 0, 0))


def _marks_of(state: RolloutState | None, *, depth: bool) -> list[tuple[int, int, int]]:
    names = _MARKS[: 1 + depth]
    if state is None:
        return [(0, 0, 0) for _ in names]
    found = [state.extra[name].tolist() for name in names]
    if any(len(mark) != 3 for mark in found):
        raise UserError("the state is of an older version of postgen, which kept less of the video: begin it again")
    return [(frames, size, known) for frames, size, known in found]
