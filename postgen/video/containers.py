"""Detection of truncated and damaged video files from the structure of the container, without decoding.

ffmpeg decodes what it finds and treats the end of the file as the end of the video, so a truncated file decodes to a
shorter video without an error. Each container format records its length in its own way: as sizes of its elements, as
page numbers or as end marks. Each function of this module checks one format. Only headers are read, so the time grows
with the number of packets, not with the number of bytes.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from postgen.video.ffmpeg import VideoError

_ENDS_EARLY = "it ends early"


class _BrokenError(Exception):
    """A file is cut or damaged. The message says what is wrong and completes the sentence of `check_whole`."""


def check_whole(path: Path) -> None:
    """Refuse a video file that is truncated or whose structure is damaged.

    A transport stream, a program stream, a fragmented mp4 or a live WebM that is cut exactly between two packets is a
    valid shorter file, so such a cut is not detected. Files of unknown formats pass; ffmpeg checks them.

    Raises:
        VideoError: the file is cut or damaged, is not a regular file, or cannot be opened.
    """
    if not path.is_file():
        raise VideoError(f"cannot read {path}: it is not a regular file")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            check = _checker(file.read(1024))
            if check is not None:
                check(_Bytes(file, size))
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror or error}") from error
    except _BrokenError as broken:
        raise VideoError(f"cannot read {path} as a video: the file is cut or damaged, {broken}") from None


class _Bytes:
    """A binary file with its size and position; reading or seeking past the end raises `_BrokenError`."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0
        file.seek(0)

    def __bool__(self) -> bool:
        return self.at < self.size

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        self.at += len(data)
        if len(data) != count:
            raise _BrokenError(_ENDS_EARLY)
        return data

    def go(self, place: int) -> None:
        if place > self.size:
            raise _BrokenError(_ENDS_EARLY)
        self.file.seek(place - self.at, 1)
        self.at = place

    def skip(self, count: int) -> None:
        self.go(self.at + count)

    def only_zeros(self) -> bool:
        """Return whether only zero bytes follow (some programs pad files with zeros), and move to the end."""
        while self:
            if self.take(min(1 << 16, self.size - self.at)).strip(b"\0"):
                return False
        return True


def _checker(start: bytes) -> Callable[[_Bytes], None] | None:
    """Return the check for the container that starts with these bytes; None for an unknown format."""
    known = {
        b"GIF8": _gif,
        b"\x89PNG": _png,
        b"\x1a\x45\xdf\xa3": _matroska,
        b"OggS": _ogg,
        b"FLV\x01": _flv,
        b"RIFF": _avi,
        b"\x00\x00\x01\xba": _program_stream,
        b"\x30\x26\xb2\x75": _asf,
        b"DKIF": _ivf,
        b"nut/": _nut,
    }
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp"):
        return _boxes
    if _packet_length(start) is not None:
        return _transport_stream
    return known.get(start[:4])


def _gif(data: _Bytes) -> None:
    """Check that all blocks are complete up to the trailer 0x3b."""

    def colours(flags: int) -> None:
        # A colour table has 3 bytes per entry; the low bits of the flags give its size, the high bit its presence.
        data.skip(3 << (flags & 7) + 1 if flags & 0x80 else 0)

    colours(data.take(13)[10])
    while (kind := data.take(1)) != b"\x3b":
        if kind == b"\x2c":
            colours(data.take(9)[8])
        elif kind not in (b"\x21", b"\0"):
            raise _BrokenError(f"no gif block starts at byte {data.at - 1}")
        if kind != b"\0":
            data.skip(1)
            while length := data.take(1)[0]:
                data.skip(length)


def _png(data: _Bytes) -> None:
    """Check the checksums of all chunks up to IEND; an animated PNG has the same structure."""
    data.skip(8)
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", data.take(8))
        if length + 4 > data.size - data.at:
            raise _BrokenError(_ENDS_EARLY)
        if crc32(kind + data.take(length)) != int.from_bytes(data.take(4)):
            raise _BrokenError(f"the checksum before byte {data.at} is wrong")


# Element ids of Matroska and WebM (RFC 9559): elements of the segment, padding, and elements of a cluster.
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_TOP = {_CLUSTER, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
_FILLING = {0xEC, 0xBF}
_IN_CLUSTER = {0xE7, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF, 0x5854, *_FILLING}


def _matroska(data: _Bytes) -> None:
    """Check that the segment and its clusters have the lengths that they declare."""
    _, length = _element(data)
    data.skip(length or 0)
    name, length = _element(data)
    while name in _FILLING:
        data.skip(length or 0)
        name, length = _element(data)
    if name != _SEGMENT:
        raise _BrokenError("no segment follows the first element")
    end = data.size if length is None else data.at + length
    if end > data.size:
        raise _BrokenError(_ENDS_EARLY)
    limit = end
    while data.at < end:
        limit = end if data.at >= limit else limit  # a cluster of known length has ended
        name, length = _element(data)
        if name == _CLUSTER:
            limit = end if length is None else data.at + length
        elif name in _TOP or name in _IN_CLUSTER:
            data.skip(length or 0)
        else:
            raise _BrokenError(f"the element before byte {data.at} is not one of a segment")
        if data.at > limit or limit > end:
            raise _BrokenError(f"elements overlap at byte {data.at}")


def _element(data: _Bytes) -> tuple[int, int | None]:
    """Return the id of an element and the length of its content in bytes; None for an unknown length."""
    first = data.take(1)[0]
    width = 9 - first.bit_length()
    if width > 4:
        raise _BrokenError(f"no element starts at byte {data.at - 1}")
    name = int.from_bytes(bytes([first]) + data.take(width - 1))
    first = data.take(1)[0]
    width = 9 - first.bit_length()
    if width > 8:
        raise _BrokenError(f"the length of an element is not valid at byte {data.at - 1}")
    length = int.from_bytes(bytes([first]) + data.take(width - 1)) - (1 << 7 * width)
    return name, None if length == (1 << 7 * width) - 1 else length


_OGG_VIDEO = (b"\x80theora", b"\x01video", b"OVP80", b"BBCD")


def _ogg(data: _Bytes) -> None:
    """Check that each video stream has consecutive page numbers and ends with a page that is flagged as its last."""
    unfinished: set[int] = set()
    numbers: dict[int, int] = {}
    while data:
        mark, _, flags, _, stream, number, _, parts = struct.unpack("<4sBBqIIIB", data.take(27))
        if mark != b"OggS":
            raise _BrokenError(f"no page starts at byte {data.at - 27}")
        body = data.take(sum(data.take(parts)))
        if flags & 2 and body.startswith(_OGG_VIDEO):
            unfinished.add(stream)
        if stream in unfinished and number != numbers.get(stream, number - 1) + 1:
            raise _BrokenError(f"pages are missing before byte {data.at}")
        numbers[stream] = number
        if flags & 4:
            unfinished.discard(stream)
    if unfinished:
        raise _BrokenError("the last page is missing")


def _flv(data: _Bytes) -> None:
    """Check that all tags are complete, and compare the file size or the duration with the metadata."""
    data.go(int.from_bytes(data.take(9)[5:]))
    said: dict[str, float] = {}
    last = 0
    while data:
        data.skip(4)
        if data.at == data.size:
            break
        kind, head = data.take(1)[0], data.take(10)
        length = int.from_bytes(head[:3])
        if kind & 0x1F == 18 and not said:
            said = _flv_numbers(data.take(length))
        else:
            data.skip(length)
        last = max(last, int.from_bytes(head[6:7] + head[3:6]))
    if said.get("filesize", 0) > data.size:
        raise _BrokenError(_ENDS_EARLY)
    # Programs disagree on whether the duration includes the last frame, so one second of difference is accepted.
    if "filesize" not in said and said.get("duration", 0) > last / 1000 + 1:
        raise _BrokenError(f"it ends at {last / 1000:g} of {said['duration']:g} seconds")


def _flv_numbers(script: bytes) -> dict[str, float]:
    """Return the file size in bytes and the duration in seconds from the metadata tag, each where it is present."""
    found = {}
    for name in ("filesize", "duration"):
        _, mark, rest = script.partition(struct.pack(">H", len(name)) + name.encode() + b"\0")
        if mark and len(rest) >= 8 and (number := struct.unpack(">d", rest[:8])[0]) > 0:
            found[name] = number
    return found


def _avi(data: _Bytes) -> None:
    """Check that the RIFF chunks, and the chunks inside them, have the lengths that they declare."""
    while data.size - data.at >= 8 or not data.at:
        name, length = _riff_chunk(data)
        if name != b"RIFF":
            return  # data that a program appended after the video
        end = data.at + length
        data.skip(4)
        if length in (0, 0xFFFFFFFF):  # the writer was interrupted, or wrote into a pipe
            end = data.size
        elif end > data.size:
            raise _BrokenError(_ENDS_EARLY)
        _avi_chunks(data, end)


def _avi_chunks(data: _Bytes, end: int) -> None:
    """Walk over the chunks up to byte `end`, and over the chunks inside the lists of frames (movi, rec)."""
    while data.at + 8 <= end:
        start = data.at
        name, length = _riff_chunk(data)
        if not name.isascii() or not name.decode().isprintable():
            raise _BrokenError(f"no chunk starts at byte {start}")
        if name == b"LIST" and data.take(4) in (b"movi", b"rec "):
            continue
        place = start + 8 + length
        data.go(min(place + length % 2, max(place, data.size)))
    data.go(end)
    data.skip(min(end % 2, data.size - end))


def _riff_chunk(data: _Bytes) -> tuple[bytes, int]:
    name, length = struct.unpack("<4sI", data.take(8))
    return name, length


_BOXES = frozenset(b"ftyp styp moov mdat moof mfra sidx free skip wide uuid meta udta pdin pnot".split())


def _boxes(data: _Bytes) -> None:
    """Check that all top-level boxes of an mp4 or mov are complete and that the last fragment has its frames."""
    seen: set[bytes] = set()
    name = b""
    while data:
        if data.size - data.at < 8:
            if data.only_zeros():
                break
            raise _BrokenError(_ENDS_EARLY)
        start = data.at
        length, name = struct.unpack(">I4s", data.take(8))
        if name not in _BOXES and seen >= {b"moov", b"mdat"}:
            return  # data that a program appended after the video
        seen.add(name)
        if length == 1:
            length = int.from_bytes(data.take(8))
        if length == 0:  # the box reaches to the end of the file; only zeros are padding
            if name == b"\0\0\0\0" and not data.only_zeros():
                raise _BrokenError(f"no box starts at byte {start}")
            break
        if length < data.at - start:
            raise _BrokenError(f"no box starts at byte {start}")
        data.go(start + length)
    if name == b"moof" or b"mdat" not in seen:
        raise _BrokenError("the frames are missing")


def _packet_length(start: bytes) -> int | None:
    """Return the distance between transport packets in bytes; None if this is not a transport stream."""
    for length, first in ((188, 0), (192, 4), (204, 0)):
        marks = start[first::length]
        if len(marks) > 2 and set(marks) == {0x47}:
            return length
    return None


def _transport_stream(data: _Bytes) -> None:
    """Check that each packet has its sync byte 0x47, that the last one is complete, and that it is not a first table.

    The first table (packet id 0) needs the second one after it to describe the streams.
    """
    start = data.take(min(1024, data.size))
    length = _packet_length(start)
    assert length is not None
    data.go(0)
    first = 4 if length == 192 else 0
    packets, rest = divmod(data.size, length)
    block = b""
    for done in range(0, packets, 4096):
        block = data.take(min(4096, packets - done) * length)
        if block[first::length].strip(b"\x47"):
            raise _BrokenError(f"a packet at or after byte {done * length} has no sync byte")
    if rest:
        raise _BrokenError("the last packet is not complete")
    if int.from_bytes(block[first - length :][1:3]) & 0x1FFF == 0:
        raise _BrokenError("it ends between the two tables that describe its streams")


def _program_stream(data: _Bytes) -> None:
    """Check that all packets of an MPEG program stream are complete."""
    while data:
        if data.size - data.at < 4:
            if data.only_zeros():
                return
            raise _BrokenError(_ENDS_EARLY)
        mark, kind = data.take(3), data.take(1)[0]
        if mark != b"\0\0\1":
            if not any(mark) and kind < 2 and _to_next_start(data, kind):
                continue
            raise _BrokenError(f"no packet starts at byte {data.at - 4}")
        if kind == 0xBA:
            second = data.take(1)[0] >> 6 == 1  # MPEG-2; the packs of MPEG-1 have a fixed length
            data.skip(8 if second else 7)
            data.skip(data.take(1)[0] & 7 if second else 0)
        elif kind != 0xB9:
            data.skip(int.from_bytes(data.take(2)))


def _to_next_start(data: _Bytes, last: int) -> bool:
    """Skip zeros between packets; return False if anything but a start code follows the zeros."""
    while data and last == 0:
        last = data.take(1)[0]
    if not data:
        return last == 0
    data.go(data.at - 3)
    return last == 1


def _asf(data: _Bytes) -> None:
    """Check that all top-level objects are complete."""
    while data:
        length = int.from_bytes(data.take(24)[16:], "little")
        if length < 24:
            return  # a live recording does not know its size: the object reaches to the end of the file
        data.go(data.at - 24 + length)


def _ivf(data: _Bytes) -> None:
    """Check that all frames are complete."""
    data.skip(int.from_bytes(data.take(8)[6:], "little") - 8)
    while data:
        data.skip(int.from_bytes(data.take(12)[:4], "little"))


_NUT_INDEX = b"NX\xdd\x67\x2f\x23\xe6\x4e"


def _nut(data: _Bytes) -> None:
    """Check that the file ends with its index."""
    # A nut file ends with the length of its index and a checksum; the index begins with a start code.
    data.go(max(data.size - 12, 0))
    length = int.from_bytes(data.take(8))
    data.go(max(data.size - length, 0) if length <= data.size else 0)
    if data.take(8) != _NUT_INDEX:
        raise _BrokenError("the index at its end is missing")
