"""Run the ffmpeg binary that imageio-ffmpeg brings along.

The process is driven directly, not through `imageio_ffmpeg.read_frames` and `write_frames`: those take a damaged file
that ends early for a shorter one, and a failed encoding for a good one.
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

# Real containers only: without this list ffmpeg would draw the text of a text file, or follow a playlist.
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,apng,ogg,mpeg,mpegts,flv,asf,ivf,nut"

# Seconds without a byte after which a decoder is taken for dead. One frame of the slowest codec needs a few.
PATIENCE = 60.0

# What ffmpeg writes into its log where it has found damage and goes on all the same. Other complaints are not enough:
# programs write streams that are a little wrong, and most damage ends a decoder (-xerror).
_DAMAGE = (
    *("CRC mismatch", "invalid as first byte", "exceeds containing master element", "partial file"),
    *("packet_obj_size", "ff asf skip", "no checksum", "LZW decode failed", "reference picture missing"),
)

_READ = ["-nostdin", "-format_whitelist", CONTAINERS]


class VideoError(UserError):
    """A video that cannot be read or written, in one line."""


class NoFFmpegError(VideoError):
    """There is no ffmpeg program to read or write videos with."""


@contextmanager
def decoder(path: Path, arguments: Sequence[str], *, codec: str | None = None, skip: int = 0) -> Iterator[IO[bytes]]:
    """Decode the first video stream of `path` that is no cover picture, and give ffmpeg's output.

    Leaving the block before that output has been read to its end (a break, an exception, a generator that is closed)
    ends ffmpeg.

    Args:
        path: a file.
        arguments: ffmpeg's, for its output.
        codec: the decoder; None lets ffmpeg choose.
        skip: frames that are decoded before the first output, which may take their time.

    Raises:
        VideoError: at the end of the output, when ffmpeg found the file damaged; when nothing arrives for `PATIENCE`
            seconds and a quarter of a second for each frame of `skip`.
    """
    # `file:` keeps a name such as "-i" or "http://x" from meaning anything else.
    source = [*_READ, "-xerror", *(["-c:v", codec] if codec else []), "-i", f"file:{path}", "-map", "0:V:0"]
    with _process([*source, "-fps_mode", "passthrough", *arguments, "-"], stdout=subprocess.PIPE) as (process, log):
        assert process.stdout is not None
        with _Patient(process, PATIENCE + skip / 4) as patient:
            output = io.BufferedReader(patient, 1 << 16)
            yield output
            at_end = not output.read(1)
        stalled = VideoError(f"cannot read {path}: ffmpeg gave nothing for {patient.seconds:g} seconds")
        if patient.stalled:
            raise stalled
        try:
            failed = at_end and (process.wait(patient.seconds) != 0 or _tells_damage(log))
        except subprocess.TimeoutExpired:
            raise stalled from None
        if failed:
            raise VideoError(f"cannot read {path} as a video: {_reason(log)}")


def header(path: Path) -> str:
    """Return what ffmpeg prints about a file: its streams, their codecs, pixel formats and metadata.

    Raises:
        VideoError: ffmpeg did not answer in time.
    """
    with tempfile.TemporaryFile() as log:
        arguments = [executable(), "-hide_banner", *_READ, "-i", f"file:{path}"]
        try:  # it always ends with an error, as no output is named
            subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=log, timeout=PATIENCE, start_new_session=True)
        except subprocess.TimeoutExpired:
            raise VideoError(f"cannot read {path}: ffmpeg gave nothing for {PATIENCE:g} seconds") from None
        except OSError as error:
            raise NoFFmpegError(f"cannot start {arguments[0]}: {error.strerror or error}") from error
        log.seek(0)
        return log.read(1 << 20).decode(errors="replace")


def metadata(path: Path) -> dict[str, str]:
    """Return what a file says of itself as a whole: texts by key in lower case, as title or comment.

    Raises:
        VideoError: ffmpeg cannot read it, or did not answer in time.
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
            raise VideoError(f"cannot read {path}: ffmpeg gave nothing for {PATIENCE:g} seconds") from None
        except OSError as error:
            raise NoFFmpegError(f"cannot start {arguments[0]}: {error.strerror or error}") from error
        if done.returncode:
            raise VideoError(f"cannot read {path} as a video: {_reason(log)}")
    text = done.stdout.decode(errors="replace")
    found: dict[str, str] = {}
    # A backslash stands before what would mean something, line ends among them.
    for line in re.findall(r"((?:\\.|[^\\\n])+)", text, re.DOTALL):
        if line.startswith("["):
            break  # what follows is about one stream
        if match := re.fullmatch(r"((?:\\.|[^\\=])+)=(.*)", line, re.DOTALL):
            found[_bare(match[1]).lower()] = _bare(match[2])
    return found


def _bare(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


@contextmanager
def encoder(path: Path, arguments: Sequence[str]) -> Iterator[IO[bytes]]:
    """Give a pipe into an ffmpeg that writes `path`; leaving the block well waits for the file to be complete.

    Leaving it with an exception kills ffmpeg; the half-written file is the caller's to remove.

    Raises:
        VideoError: ffmpeg refused the settings or failed to write.
    """
    with _process(["-y", *arguments, f"file:{path}"], stdin=subprocess.PIPE) as (process, log):
        assert process.stdin is not None
        complete = False
        with suppress(BrokenPipeError):  # ffmpeg has stopped: its log says why
            yield process.stdin
            process.stdin.close()
            complete = True
        if process.wait() != 0 or not complete:
            raise VideoError(f"ffmpeg could not write the video: {_reason(log)}")


class _Patient(io.RawIOBase):
    """The output of a process that is killed when a read has waited for too long, which then ends like a file."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        super().__init__()
        self.seconds, self.stalled = seconds, False
        self._process = process
        self._since: float | None = None
        self._done = threading.Event()
        # A thread, as not every system can wait for a pipe with a time limit.
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
    """Return the ffmpeg program, which imageio-ffmpeg brings along or finds.

    Raises:
        NoFFmpegError: there is none.
    """
    try:
        # Imported here: the contact sheets and the training loop need no ffmpeg.
        import imageio_ffmpeg

        found: str = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise NoFFmpegError(
            "there is no ffmpeg to read and write videos with: install imageio-ffmpeg with its program, or ffmpeg "
            "itself, or name one in IMAGEIO_FFMPEG_EXE"
        ) from error
    return found


@contextmanager
def _process(
    arguments: Sequence[str], *, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    program = executable()
    # The log goes to a file, as nobody reads a pipe of it while frames flow. A session of its own keeps the terminal's
    # Ctrl-C from reaching ffmpeg, which would otherwise finish its file as if all were well.
    with tempfile.TemporaryFile() as log:
        process: subprocess.Popen[bytes] | None = None
        try:
            # Between its start and its name here, an interrupt would leave it running.
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
    log.seek(0)
    text = log.read(1 << 20).decode(errors="replace")
    return any(words in text for words in _DAMAGE)


def _reason(log: IO[bytes]) -> str:
    """Return the first line of ffmpeg's log that says something, without its `[mov @ 0x55..]` prefix."""
    log.seek(0)
    lines = [line.rsplit("] ", 1)[-1].strip() for line in log.read(10_000).decode(errors="replace").splitlines()]
    return next(filter(None, lines), "ffmpeg gave no reason")
