"""Runs the ffmpeg program that imageio-ffmpeg ships or finds.

This module starts the process itself and does not use `imageio_ffmpeg.read_frames` and `write_frames`: these functions
accept a damaged file as a shorter video, and a failed encoding as a success.
"""

import io
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

from postgen.errors import UserError
from postgen.interrupts import held

# Containers that ffmpeg may open. Without this list, ffmpeg renders text files as video and follows playlists.
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,apng,ogg,mpeg,mpegts,flv,asf,ivf,nut"

# Seconds without output after which a decoder counts as stalled. One frame of the slowest codec takes a few seconds.
PATIENCE = 60.0

# Texts in ffmpeg's log for damage after which ffmpeg continues. Other log messages do not count as damage: many
# programs write streams with small errors, and most damage ends the decoder anyway (-xerror).
_DAMAGE = (
    *("CRC mismatch", "invalid as first byte", "exceeds containing master element", "partial file"),
    *("packet_obj_size", "ff asf skip", "no checksum", "LZW decode failed", "reference picture missing"),
)

_READ = ["-nostdin", "-format_whitelist", CONTAINERS]


class VideoError(UserError):
    """A video cannot be read or written. The message is one line."""


class NoFFmpegError(VideoError):
    """No ffmpeg program is found, or it cannot be started."""


@contextmanager
def decoder(path: Path, arguments: Sequence[str], *, codec: str | None = None, skip: int = 0) -> Iterator[IO[bytes]]:
    """Decode the first video stream of `path` that is not a cover picture, and yield the output of ffmpeg.

    ffmpeg is killed if the block ends before the whole output is read (a break, an exception, a closed generator).

    Args:
        path: a video file.
        arguments: arguments of ffmpeg for its output.
        codec: name of the decoder; None lets ffmpeg choose.
        skip: number of frames that ffmpeg decodes before its first output. The time limit grows with it.

    Raises:
        VideoError: ffmpeg found the file damaged (raised at the end of the output), or produced no output for
            `PATIENCE` seconds plus a quarter of a second for each frame of `skip`.
    """
    # With `file:`, ffmpeg takes names such as "-i" or "http://x" as plain file names.
    source = [*_READ, "-xerror", *(["-c:v", codec] if codec else []), "-i", f"file:{path}", "-map", "0:V:0"]
    with _process([*source, "-fps_mode", "passthrough", *arguments, "-"], stdout=subprocess.PIPE) as (process, log):
        assert process.stdout is not None
        with _Patient(process, PATIENCE + skip / 4) as patient:
            output = io.BufferedReader(patient, 1 << 16)
            yield output
            at_end = not output.read(1)
        stalled = VideoError(f"cannot read {path}: ffmpeg produced no output for {patient.seconds:g} seconds")
        if patient.stalled:
            raise stalled
        try:
            failed = at_end and (process.wait(patient.seconds) != 0 or _tells_damage(log))
        except subprocess.TimeoutExpired:
            raise stalled from None
        if failed:
            raise VideoError(f"cannot read {path} as a video: {_reason(log)}")


def header(path: Path) -> str:
    """Return the text that ffmpeg prints about a file: streams, codecs, pixel formats and metadata.

    Raises:
        VideoError: ffmpeg does not finish within `PATIENCE` seconds, or cannot be started.
    """
    with tempfile.TemporaryFile() as log:
        arguments = [executable(), "-hide_banner", *_READ, "-i", f"file:{path}"]
        try:  # ffmpeg always exits with an error here, because no output is named
            subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=log, timeout=PATIENCE, start_new_session=True)
        except subprocess.TimeoutExpired:
            raise VideoError(f"cannot read {path}: ffmpeg did not finish within {PATIENCE:g} seconds") from None
        except OSError as error:
            raise NoFFmpegError(f"cannot start {arguments[0]}: {error.strerror or error}") from error
        log.seek(0)
        return log.read(1 << 20).decode(errors="replace")


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of the whole file, such as title or comment: texts by key, keys in lower case.

    Raises:
        VideoError: ffmpeg cannot read the file, does not finish within `PATIENCE` seconds, or cannot be started.
    """
    with tempfile.TemporaryFile() as log:
        arguments = [
            executable(),
            "-hide_banner",
            "-v",
            "error",
            *_READ,
            "-i",
            f"file:{path}",
            "-f",
            "ffmetadata",
            "-",
        ]
        try:
            done = subprocess.run(
                arguments, stdout=subprocess.PIPE, stderr=log, timeout=PATIENCE, start_new_session=True
            )
        except subprocess.TimeoutExpired:
            raise VideoError(f"cannot read {path}: ffmpeg did not finish within {PATIENCE:g} seconds") from None
        except OSError as error:
            raise NoFFmpegError(f"cannot start {arguments[0]}: {error.strerror or error}") from error
        if done.returncode:
            raise VideoError(f"cannot read {path} as a video: {_reason(log)}")
    text = done.stdout.decode(errors="replace")
    found: dict[str, str] = {}
    # The format (ffmetadata) escapes special characters, line ends included, with a backslash.
    for line in re.findall(r"((?:\\.|[^\\\n])+)", text, re.DOTALL):
        if line.startswith("["):
            break  # the sections that follow describe single streams
        if match := re.fullmatch(r"((?:\\.|[^\\=])+)=(.*)", line, re.DOTALL):
            found[_bare(match[1]).lower()] = _bare(match[2])
    return found


def _bare(text: str) -> str:
    """Return a text of ffmetadata without the backslashes that escape characters."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


@contextmanager
def encoder(path: Path, arguments: Sequence[str]) -> Iterator[IO[bytes]]:
    """Yield a pipe into an ffmpeg that writes `path`; a normal end of the block waits until the file is complete.

    An exception in the block kills ffmpeg; the caller then removes the incomplete file.

    Raises:
        VideoError: ffmpeg refuses the settings or fails to write.
    """
    with _process(["-y", *arguments, f"file:{path}"], stdin=subprocess.PIPE) as (process, log):
        assert process.stdin is not None
        complete = False
        with suppress(BrokenPipeError):  # ffmpeg has exited; the reason is in its log
            yield process.stdin
            process.stdin.close()
            complete = True
        if process.wait() != 0 or not complete:
            raise VideoError(f"ffmpeg could not write the video: {_reason(log)}")


class _Patient(io.RawIOBase):
    """The output of a process, with a time limit per read.

    A read that exceeds the limit kills the process, which ends the output, and sets `stalled`.
    """

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        super().__init__()
        self.seconds, self.stalled = seconds, False
        self._process = process
        self._since: float | None = None
        self._done = threading.Event()
        # A thread, because not every system can wait for a pipe with a time limit.
        self._watch = threading.Thread(target=self._watched, daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._watch.join()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        assert self._process.stdout is not None
        self._since = time.monotonic()
        data = os.read(self._process.stdout.fileno(), len(buffer))
        self._since = None
        buffer[: len(data)] = data
        return len(data)

    def _watched(self) -> None:
        while not self._done.wait(self.seconds / 20):
            since = self._since
            if since is not None and time.monotonic() - since > self.seconds:
                self.stalled = True
                self._process.kill()
                return


def executable() -> str:
    """Return the path of the ffmpeg program that imageio-ffmpeg ships or finds.

    Raises:
        NoFFmpegError: imageio-ffmpeg finds no ffmpeg program.
    """
    try:
        # Imported here, because contact sheets and the training loop work without ffmpeg.
        import imageio_ffmpeg

        found: str = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise NoFFmpegError(
            "no ffmpeg program was found to read and write videos: install imageio-ffmpeg (its wheels contain ffmpeg) "
            "or ffmpeg, or set IMAGEIO_FFMPEG_EXE to the path of an ffmpeg program"
        ) from error
    return found


@contextmanager
def _process(
    arguments: Sequence[str], *, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start ffmpeg and yield the process and its log; kill the process at the end of the block."""
    program = executable()
    # The log goes to a file, because nothing reads a pipe with the log while frames are transferred. The process gets
    # its own session, so that the terminal's Ctrl-C does not reach ffmpeg, which would end its file as if complete.
    with tempfile.TemporaryFile() as log:
        process: subprocess.Popen[bytes] | None = None
        try:
            # An interrupt between the start of ffmpeg and this assignment would leave the process running.
            with held():
                process = _started([program, "-hide_banner", "-v", "error", *arguments], stdin, stdout, log)
            yield process, log
        finally:
            with held():
                if process is not None:
                    _ended(process)


def _started(command: list[str], stdin: int, stdout: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=log, start_new_session=True)
    except OSError as error:
        raise NoFFmpegError(f"cannot start {command[0]}: {error.strerror or error}") from error


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with suppress(OSError):
            pipe.close()


def _tells_damage(log: IO[bytes]) -> bool:
    """Return whether the log reports damage after which ffmpeg continues."""
    log.seek(0)
    text = log.read(1 << 20).decode(errors="replace")
    return any(words in text for words in _DAMAGE)


_NO_VIDEO = ("moov atom not found", "Invalid data found when processing input")
"""Messages of ffmpeg about a file in which it finds no video."""


def _reason(log: IO[bytes]) -> str:
    """Return the first non-empty line of ffmpeg's log, without its `[mov @ 0x55..]` prefix."""
    log.seek(0)
    lines = [line.rsplit("] ", 1)[-1].strip() for line in log.read(10_000).decode(errors="replace").splitlines()]
    found = [line for line in lines if line]
    if any(text in line for line in found for text in _NO_VIDEO):
        return f"it is not a video, or it is damaged (ffmpeg: {found[0]})"
    return found[0] if found else "ffmpeg gave no reason"
