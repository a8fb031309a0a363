"""A video that is written while it is made: whole after every piece, and continued by another process.

An mp4 that grows is a fragmented one (ISO/IEC 14496-12): a head, then a fragment for each piece, encoded by itself and
appended in one step. So what stands there can be played at any time, and the bytes do not depend on where a process
stopped and the next one went on.
"""

import struct
from collections.abc import Iterator
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


class GrowingVideo:
    """A video to which frames are appended.

    Args:
        path: the mp4 file, or the folder of frames; an old one is replaced by the first piece.
        fps: frames per second.
        format: mp4 or frames; None takes it from the suffix.
        mark: `mark` of an earlier writer of this file, to go on from: what stands behind it is cut off.

    Raises:
        VideoError: another format, a rate that it does not have, a place that cannot be written, or a file that is
            shorter than the mark says.
    """

    def __init__(
        self, path: str | Path, *, fps: float, format: str | None = None, mark: tuple[int, int] | None = None
    ) -> None:
        self.path = Path(path)
        self.kind = check_target(self.path, format)
        if self.kind not in GROWING:
            raise VideoError(f"a {self.kind} cannot be written as it is made: choose {' or '.join(GROWING)}")
        self.rate = checked_rate(fps, self.kind)
        self.frames, self._size = mark or (0, 0)
        if self.frames and (short := self._missing()):
            raise VideoError(f"{self.path} is not the video that was to go on: {short}")

    @property
    def mark(self) -> tuple[int, int]:
        """Where the video ends: frames, and bytes of the file."""
        return self.frames, self._size

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
        with self.path.open("r+b") as file:
            if file.read(len(head)) != head:
                raise VideoError(
                    f"{self.path} has frames of another size, or is of another ffmpeg: what follows needs a new file"
                )
            with held():
                file.truncate(self._size)
                file.seek(self._size)
                file.write(body)
                file.flush()
                self.frames, self._size = self.frames + count, self._size + len(body)

    def _append_pictures(self, frames: Frames) -> None:
        if not self.frames:
            self.frames = write_video(self.path, frames, fps=self.rate, format="frames").frames
            return
        for old in self._behind():
            old.unlink()
        with TemporaryDirectory() as folder:
            made = write_video(Path(folder) / "piece", frames, fps=self.rate, format="frames").frames
            for number in range(made):
                with replacing(self.path / _name(self.frames + number)) as part:
                    part.write_bytes((Path(folder) / "piece" / _name(number)).read_bytes())
        self.frames += made

    def _behind(self) -> list[Path]:
        """Pictures that a process wrote that was killed before it could say so."""
        return [file for file in self.path.glob("frame_*.png") if file.name >= _name(self.frames)]

    def _missing(self) -> str:
        if self.kind == "frames":
            last = self.path / _name(self.frames - 1)
            return "" if last.is_file() else f"there is no {last.name}"
        size = self.path.stat().st_size if self.path.is_file() else 0
        return "" if size >= self._size else f"it has {size} of {self._size} bytes"


def copy_video(source: Path, target: Path, mark: tuple[int, int]) -> None:
    """Copy a growing video up to a mark, so that two can go on from there.

    Raises:
        VideoError: the source is shorter, or a file cannot be read or written.
    """
    frames, size = mark
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
