"""Videos that are written piece by piece: a complete file after every piece, which another process can continue.

A growing mp4 is a fragmented mp4 (ISO/IEC 14496-12): a header, then one fragment per piece. Each piece is encoded on
its own and appended in one step. The file is therefore playable at any time, and its bytes do not depend on where one
process stopped and the next one continued.
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
"""Formats that `GrowingVideo` can write."""
_HEAD, _BODY = (b"ftyp", b"moov"), (b"moof", b"mdat")
_BLOCK = 2**20
_TAIL = 2**16
"""Number of bytes before a mark whose checksum identifies the video."""
_NUMBER = re.compile(r"frame_([0-9]{5,})\.png")
Mark = tuple[int, int, int]
"""End of a growing video: number of frames, bytes of the file (mp4), and a checksum of the last bytes or picture."""


class GrowingVideo:
    """A video to which frames are appended.

    Args:
        path: the mp4 file, or the folder of frames; the first piece replaces an existing one.
        fps: frames per second.
        format: mp4 or frames; None takes the format from the suffix of `path`.
        mark: the `mark` of an earlier `GrowingVideo` with this path, from which to continue. The next piece replaces
            everything after the mark. None starts a new video.

    Raises:
        VideoError: the format is another one, the format does not support the rate, `path` cannot be written, or the
            video at `path` does not match the mark.
    """

    def __init__(self, path: str | Path, *, fps: float, format: str | None = None, mark: Mark | None = None) -> None:
        self.path = Path(path)
        self.kind = check_target(self.path, format)
        if self.kind not in GROWING:
            raise VideoError(f"a {self.kind} cannot be written piece by piece: choose {' or '.join(GROWING)}")
        self.rate = checked_rate(fps, self.kind)
        self.frames, self._size, _ = mark or (0, 0, 0)
        if mark is not None and self.frames:
            check_mark(self.path, mark)

    @property
    def mark(self) -> Mark:
        """The current end of the video; pass it to a later `GrowingVideo` to continue from there."""
        return self.frames, self._size, _known(self.path, self.frames, self._size) if self.frames else 0

    def cut(self, mark: Mark) -> None:
        """Remove everything after a mark; for a mark with 0 frames, delete the video.

        Raises:
            VideoError: the video cannot be changed.
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
        """Append frames to the video: either all of them or, after an error, none.

        Args:
            frames: at least one frame, as for `write_video`, of the same size as the frames before.

        Raises:
            VideoError: the frames cannot be written, or differ in size from the frames before.
        """
        try:
            if self.kind == "mp4":
                self._append_fragment(frames)
            else:
                self._append_pictures(frames)
        except OSError as error:
            raise VideoError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _append_fragment(self, frames: Frames) -> None:
        # The duration of a frame is a whole number of ticks, so that no timestamp is rounded.
        parts = max(1, 1000 // self.rate.numerator)
        options = ["-movflags", "+empty_moov+default_base_moof+frag_keyframe", "-bf", "0", "-sc_threshold", "0"]
        options += ["-g", "1000000", "-video_track_timescale", str(self.rate.numerator * parts)]
        # Encode the piece as a fragmented mp4 of its own, then take its header and its fragments.
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
        # Without a buffer, so that an error of a full disk is raised here and not when the file is closed.
        with self.path.open("r+b", buffering=0) as file:
            if file.read(len(head)) != head:
                raise VideoError(
                    f"{self.path} has frames of another size, or was written by another ffmpeg: start a new file"
                )
            if (size := file.seek(0, os.SEEK_END)) < self._size:
                raise VideoError(f"{self.path} was changed by another program: it has {size} of {self._size} bytes")
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
        """Return the pictures after the end of the video, which a process wrote before it was killed."""
        numbers = ((_NUMBER.fullmatch(file.name), file) for file in self.path.glob("frame_*.png"))
        return [file for number, file in numbers if number and int(number[1]) >= self.frames]


def check_mark(path: Path, mark: Mark) -> None:
    """Check that a video matches a mark.

    Raises:
        VideoError: the video is missing, is shorter than the mark, or has other content before the mark.
    """
    frames, size, known = mark
    there = path.stat().st_size if path.is_file() else 0
    if path.is_dir() and not (path / _name(frames - 1)).is_file():
        other = f"there is no {_name(frames - 1)}"
    elif there < size:
        other = f"it has {there} of {size} bytes"
    else:
        other = "" if _known(path, frames, size) == known else "its content has changed"
    if other:
        raise VideoError(f"{path} is not the video to continue: {other}")


def _known(path: Path, frames: int, size: int) -> int:
    """Return the CRC-32 of the last bytes before `size`, or of the last picture in a folder."""
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
    """Truncate a file to a size if the block raises an exception."""
    try:
        yield
    except BaseException:
        file.truncate(size)
        raise


def copy_video(source: Path, target: Path, mark: Mark) -> None:
    """Copy a growing video up to a mark, so that two videos can continue from there.

    Raises:
        VideoError: the source does not match the mark, or a file cannot be read or written.
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
    """Yield the name and the bytes of each top-level box, header included."""
    place = 0
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, place + 8)
        yield kind, data[place : place + length]
        place += length


def _moved(moof: bytes, ticks: int, sequence: int) -> bytes:
    """Return the header (moof) of a fragment with `ticks` added to its time and `sequence` to its number."""
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
    """Yield the name and the offset of each box between two offsets, and of the boxes inside track fragments."""
    while place < stop:
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, place
        if kind == b"traf":
            yield from _inside(data, place + 8, place + length)
        place += length
