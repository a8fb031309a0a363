"""A video that is written while it is made: whole after every piece, and continued by another process.

An mp4 that grows is a fragmented one (ISO/IEC 14496-12): a head, then a fragment for each piece, encoded by itself and
appended in one step. So what stands there can be played at any time, and the bytes do not depend on where a process
stopped and the next one went on.
"""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory

from postgen.files import replacing
from postgen.interrupts import held
from postgen.video.ffmpeg import VideoError
from postgen.video.pictures import Frames
from postgen.video.write import check_target, checked_rate, write_piece, write_video

GROWING = ("mp4", "frames")
"""Formats that can grow."""
_HEAD, _BODY = (b"ftyp", b"moov"), (b"moof", b"mdat")
_BLOCK = 2**20
_TAIL = 2**16
"""Bytes before a mark by which the video is known again."""
_NUMBER = re.compile(r"frame_([0-9]{5,})\.png")
Mark = tuple[int, int, int]
"""Where a growing video ends: frames, bytes of the file, and a number for what stands before."""


class GrowingVideo:
    """A video to which frames are appended.

    Args:
        path: the mp4 file, or the folder of frames; an old one is replaced by the first piece.
        fps: frames per second.
        format: mp4 or frames; None takes it from the suffix.
        mark: `mark` of an earlier writer of this file, to go on from: what stands behind it is cut off.

    Raises:
        VideoError: another format, a rate that it does not have, a place that cannot be written, or a video that is
            not the one of the mark.
    """

    def __init__(self, path: str | Path, *, fps: float, format: str | None = None, mark: Mark | None = None) -> None:
        self.path = Path(path)
        self.kind = check_target(self.path, format)
        if self.kind not in GROWING:
            raise VideoError(f"a {self.kind} cannot be written as it is made: choose {' or '.join(GROWING)}")
        self.rate = checked_rate(fps, self.kind)
        self.frames, self._size, _ = mark or (0, 0, 0)
        if mark is not None and self.frames:
            check_mark(self.path, mark)

    @property
    def mark(self) -> Mark:
        """Where the video ends."""
        return self.frames, self._size, _known(self.path, self.frames, self._size) if self.frames else 0

    def cut(self, mark: Mark) -> None:
        """Take away what stands behind a mark; before the first frame, the video itself.

        Raises:
            VideoError: the place cannot be written.
        """
        try:
            with held():
                self.frames, self._size, _ = mark
                if self.kind == "frames":
                    for old in self._behind():
                        old.unlink()
                    if not self.frames and self.path.is_dir():
                        self.path.rmdir()
                elif not self.frames:
                    self.path.unlink(missing_ok=True)
                else:
                    with self.path.open("r+b") as file:
                        file.truncate(self._size)
        except OSError as error:
            raise VideoError(f"cannot write {self.path}: {error.strerror or error}") from error

    def append(self, frames: Frames) -> None:
        """Write further frames; all of them stand there afterwards, or none.

        Args:
            frames: as for `write_video`, at least one, of the size of those before.

        Raises:
            VideoError: frames that cannot be written, or that do not fit those before.
        """
        try:
            if self.kind == "mp4":
                self._append_fragment(frames)
            else:
                self._append_pictures(frames)
        except OSError as error:
            raise VideoError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _append_fragment(self, frames: Frames) -> None:
        # A tick is a part of a frame, so that no time is rounded.
        parts = max(1, 1000 // self.rate.numerator)
        options = ["-movflags", "+empty_moov+default_base_moof+frag_keyframe", "-bf", "0", "-sc_threshold", "0"]
        options += ["-g", "1000000", "-video_track_timescale", str(self.rate.numerator * parts)]
        with TemporaryDirectory() as folder:
            piece = Path(folder) / "piece.mp4"
            count = write_piece(piece, frames, self.rate, options)
            boxes = list(_boxes(piece.read_bytes()))
        head = b"".join(box for kind, box in boxes if kind in _HEAD)
        ticks = self.frames * self.rate.denominator * parts
        body = b"".join(
            _moved(box, ticks, self.frames) if kind == b"moof" else box for kind, box in boxes if kind in _BODY
        )
        if not self.frames:
            with replacing(self.path) as part:
                part.write_bytes(head + body)
            self.frames, self._size = count, len(head) + len(body)
            return
        # No buffer: what cannot be written, on a full disk, must not wait until the file is closed.
        with self.path.open("r+b", buffering=0) as file:
            if file.read(len(head)) != head:
                raise VideoError(
                    f"{self.path} has frames of another size, or is of another ffmpeg: what follows needs a new file"
                )
            if (size := file.seek(0, os.SEEK_END)) < self._size:
                raise VideoError(f"{self.path} was changed by somebody else: it has {size} of {self._size} bytes")
            with held(), _whole(file, self._size):
                file.truncate(self._size)
                file.seek(self._size)
                left = memoryview(body)
                while left:
                    left = left[file.write(left) :]
                self.frames, self._size = self.frames + count, self._size + len(body)

    def _append_pictures(self, frames: Frames) -> None:
        if not self.frames:
            self.frames = write_video(self.path, frames, fps=self.rate, format="frames").frames
            return
        for old in self._behind():
            old.unlink()
        with TemporaryDirectory() as folder:
            made = write_video(Path(folder) / "piece", frames, fps=self.rate, format="frames").frames
            try:
                for number in range(made):
                    with replacing(self.path / _name(self.frames + number)) as part:
                        part.write_bytes((Path(folder) / "piece" / _name(number)).read_bytes())
            except BaseException:
                for new in self._behind():
                    new.unlink()
                raise
        self.frames += made

    def _behind(self) -> list[Path]:
        """Pictures that a process wrote that was killed before it could say so."""
        numbers = ((_NUMBER.fullmatch(file.name), file) for file in self.path.glob("frame_*.png"))
        return [file for number, file in numbers if number and int(number[1]) >= self.frames]


def check_mark(path: Path, mark: Mark) -> None:
    """Refuse a video that is not the one of a mark.

    Raises:
        VideoError: it is missing, shorter, or something else has been written there.
    """
    frames, size, known = mark
    there = path.stat().st_size if path.is_file() else 0
    if path.is_dir() and not (path / _name(frames - 1)).is_file():
        other = f"there is no {_name(frames - 1)}"
    elif there < size:
        other = f"it has {there} of {size} bytes"
    else:
        other = "" if _known(path, frames, size) == known else "something else has been written there"
    if other:
        raise VideoError(f"{path} is not the video that was to go on: {other}")


def _known(path: Path, frames: int, size: int) -> int:
    """Return a number for the last bytes before the end, or for the last picture."""
    try:
        if path.is_dir():
            return zlib.crc32((path / _name(frames - 1)).read_bytes())
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL))
            return zlib.crc32(file.read(min(_TAIL, size)))
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _whole(file: FileIO, size: int) -> Iterator[None]:
    """Where the block fails, cut a file back to a size."""
    try:
        yield
    except BaseException:
        file.truncate(size)
        raise


def copy_video(source: Path, target: Path, mark: Mark) -> None:
    """Copy a growing video up to a mark, so that two can go on from there.

    Raises:
        VideoError: the source is not the video of the mark, or a file cannot be read or written.
    """
    check_mark(source, mark)
    frames, size, _ = mark
    try:
        with replacing(target) as part:
            if source.is_dir():
                part.mkdir()
                for number in range(frames):
                    (part / _name(number)).write_bytes((source / _name(number)).read_bytes())
            else:
                with source.open("rb") as old, part.open("wb") as new:
                    for begin in range(0, size, _BLOCK):
                        new.write(old.read(min(_BLOCK, size - begin)))
    except OSError as error:
        raise VideoError(f"cannot copy {source} to {target}: {error.strerror or error}") from error


def _name(number: int) -> str:
    return f"frame_{number:05d}.png"


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and bytes of each box, header included."""
    place = 0
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, place + 8)
        yield kind, data[place : place + length]
        place += length


def _moved(moof: bytes, ticks: int, sequence: int) -> bytes:
    """Return the head of a fragment with a later time, and a number above those before."""
    data = bytearray(moof)
    for kind, place in _inside(moof, 8, len(moof)):
        if kind == b"mfhd":
            (number,) = struct.unpack_from(">I", moof, place + 12)
            struct.pack_into(">I", data, place + 12, number + sequence)
        elif kind == b"tfdt":
            form = ">Q" if moof[place + 8] == 1 else ">I"
            (time,) = struct.unpack_from(form, moof, place + 12)
            struct.pack_into(form, data, place + 12, time + ticks)
    return bytes(data)


def _inside(data: bytes, place: int, stop: int) -> Iterator[tuple[bytes, int]]:
    """Yield name and place of each box in a box, and of those in its tracks."""
    while place < stop:
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, place
        if kind == b"traf":
            yield from _inside(data, place + 8, place + length)
        place += length
