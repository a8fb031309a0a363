"""Video files and folders of pictures -> clips."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from postgen.video.ffmpeg import VideoError, decoder


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What `probe` finds in a video."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    fps: float
    """Mean frames per second; 0 for a folder of pictures that does not tell."""
    frames: int
    """Number of frames, counted by decoding them."""

    @property
    def seconds(self) -> float:
        """Length in seconds, 0 when `fps` is not known."""
        return self.frames / self.fps if self.fps else 0.0


def probe(path: str | Path) -> VideoInfo:
    """Measure a video file, or a folder of PNG pictures, by decoding it: the frame count is true, not the header's.

    Raises:
        VideoError: no such file, not a video, damaged or cut short.
    """
    source = _existing(path)
    if source.is_dir():
        return _probe_folder(source)
    size, time_base = (0, 0), Fraction(0)
    frames = first = last = duration = 0
    with decoder(source, ["-f", "framecrc"]) as output:
        for line in output:
            if line.startswith(b"#dimensions 0:"):
                width, height = line.split()[-1].split(b"x")
                size = int(width), int(height)
            elif line.startswith(b"#tb 0:"):
                time_base = Fraction(line.split()[-1].decode())
            elif not line.startswith(b"#"):
                last, duration = (int(field) for field in line.split(b",")[2:4])
                first = last if not frames else first
                frames += 1
    if not frames:
        raise VideoError(f"{source} holds no frame")
    # Mean rate between the first and the last frame; a single frame has its duration only.
    rate = Fraction(max(frames - 1, 1), (last - first) or duration or 1) / time_base
    return VideoInfo(width=size[0], height=size[1], fps=float(rate), frames=frames)


def iter_video(path: str | Path, *, chunk: int = 16, start: int = 0, count: int | None = None) -> Iterator[Tensor]:
    """Yield a video as clips of up to `chunk` frames, (F, 3, H, W) in [0, 1]; only one chunk is in memory at a time.

    Args:
        path: a video file, or a folder of PNG pictures in the order of their names.
        chunk: frames per clip, at least 1; the last clip may be shorter.
        start: index of the first frame.
        count: number of frames to read; None reads to the end, and a video that ends earlier gives fewer.

    Raises:
        VideoError: no such file, not a video, damaged or cut short, or no frame at `start`.
    """
    if chunk < 1 or start < 0 or (count is not None and count < 1):
        raise VideoError(f"chunk and count must be >= 1 and start >= 0, got {chunk=}, {count=}, {start=}")
    source = _existing(path)
    stop = None if count is None else start + count
    pictures = _folder_pictures(source, start, stop) if source.is_dir() else _file_pictures(source, start, stop)
    return _clips(pictures, chunk, source, start)


def read_video(path: str | Path, *, start: int = 0, count: int | None = None) -> Tensor:
    """Read a video, or `count` frames of it from `start` on, as one clip (F, 3, H, W) in [0, 1].

    The whole clip is held in memory, 12 bytes per pixel; `iter_video` reads long ones.

    Raises:
        VideoError: as `iter_video`.
    """
    return torch.cat(list(iter_video(path, start=start, count=count)))


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture file of any format that Pillow knows, as an RGB picture of 8 bits a channel.

    Raises:
        VideoError: no such file, or no picture.
    """
    with _open_picture(Path(path).expanduser()) as picture:
        return picture.convert("RGB")


def _existing(path: str | Path) -> Path:
    source = Path(path)
    if not source.exists():
        raise VideoError(f"there is no video {source}: no such file or folder")
    return source


def _clips(pictures: Iterator[Tensor], chunk: int, source: Path, start: int) -> Iterator[Tensor]:
    empty = True
    while batch := list(islice(pictures, chunk)):
        empty = False
        yield torch.stack(batch).permute(0, 3, 1, 2).contiguous().float().div_(255)
    if empty:
        raise VideoError(f"{source} holds no frame {start}: it ends earlier")


def _file_pictures(source: Path, start: int, stop: int | None) -> Iterator[Tensor]:
    window = f"trim=start_frame={start}" + ("" if stop is None else f":end_frame={stop}")
    # PPM pictures one behind the other: every frame tells its own size, which no header has to be trusted for.
    with decoder(source, ["-vf", window, "-f", "image2pipe", "-c:v", "ppm"]) as output:
        while (picture := _next_ppm(output)) is not None:
            yield picture


def _next_ppm(output: IO[bytes]) -> Tensor | None:
    if output.readline() != b"P6\n":
        return None
    width, height = map(int, output.readline().split())
    output.readline()  # the largest value, always 255
    data = bytearray(output.read(width * height * 3))
    # A short picture is the end of a damaged file; the decoder reports why.
    return (
        torch.frombuffer(data, dtype=torch.uint8).view(height, width, 3) if len(data) == width * height * 3 else None
    )


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise VideoError(f"the folder {folder} holds no PNG picture: give a video file or a folder of frames")
    return files


def _folder_pictures(folder: Path, start: int, stop: int | None) -> Iterator[Tensor]:
    for file in _folder_files(folder)[start:stop]:
        with _open_picture(file) as picture:
            yield torch.from_numpy(np.array(picture.convert("RGB")))


def _open_picture(file: Path) -> Image.Image:
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        reason = getattr(error, "strerror", None) or error  # str() of an OSError names the file once more
        raise VideoError(f"cannot read the picture {file}: {reason}") from error
    return picture


def _probe_folder(folder: Path) -> VideoInfo:
    files = _folder_files(folder)
    with _open_picture(files[0]) as picture:
        rate = Fraction(picture.info.get("fps", 0))
        return VideoInfo(width=picture.width, height=picture.height, fps=float(rate), frames=len(files))
