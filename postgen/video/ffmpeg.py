"""Run the ffmpeg binary that imageio-ffmpeg brings along.

The process is driven directly, not through `imageio_ffmpeg.read_frames` and `write_frames`: those take a damaged file
that ends early for a shorter one, and a failed encoding for a good one.
"""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from postgen.errors import UserError

# Real containers only: without this list ffmpeg would draw the text of a text file, or follow a playlist.
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,apng,ogg,mpeg,mpegts,flv,asf,ivf,nut"


class VideoError(UserError):
    """A video that cannot be read or written, in one line."""


@contextmanager
def decoder(path: Path, arguments: Sequence[str]) -> Iterator[IO[bytes]]:
    """Decode the first video stream of `path` and give ffmpeg's output, to be read to its end.

    Leaving the block early (an exception, a generator that is closed) kills ffmpeg.

    Raises:
        VideoError: when the output has been read and ffmpeg found the file damaged.
    """
    # `file:` keeps a name such as "-i" or "http://x" from meaning anything else.
    source = ["-nostdin", "-xerror", "-format_whitelist", CONTAINERS, "-i", f"file:{path}", "-map", "0:v:0"]
    with _process([*source, "-fps_mode", "passthrough", *arguments, "-"], stdout=subprocess.PIPE) as (process, log):
        assert process.stdout is not None
        yield process.stdout
        if process.wait() != 0:
            raise VideoError(f"cannot read {path} as a video: {_reason(log)}")


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


@contextmanager
def _process(
    arguments: Sequence[str], *, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    # Imported here: the contact sheets and the training loop need no ffmpeg.
    import imageio_ffmpeg

    # The log goes to a file, as nobody reads a pipe of it while frames flow. A session of its own keeps the terminal's
    # Ctrl-C from reaching ffmpeg, which would otherwise finish its file as if all were well.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-v", "error", *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process, log
        finally:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with suppress(OSError):
                    pipe.close()


def _reason(log: IO[bytes]) -> str:
    """Return the first line of ffmpeg's log that says something, without its `[mov @ 0x55..]` prefix."""
    log.seek(0)
    lines = [line.rsplit("] ", 1)[-1].strip() for line in log.read(10_000).decode(errors="replace").splitlines()]
    return next(filter(None, lines), "ffmpeg gave no reason")
