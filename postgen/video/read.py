"""Reading of video files and folders of pictures as clips."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import IO, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from postgen.errors import is_whole, shown
from postgen.video.containers import check_whole
from postgen.video.ffmpeg import VideoError, decoder, header, metadata
from postgen.video.stills import read_picture

# The most exact rounding and chroma of ffmpeg; the fast conversion darkens values by up to 2 of 255, each time.
_EXACT = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
# The HDR transfer functions PQ and HLG, which an ordinary screen cannot show. Tone mapping keeps diffuse white
# (203 cd/m2, ITU-R BT.2408) near white, compresses brighter values above it, and converts wide gamuts to BT.709.
_HDR = re.compile(r"/(smpte2084|arib-std-b67)\b")
_TONES = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0,"
    "zscale=t=bt709:m=bt709:r=full,format=gbrp,"
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of picture files. If a folder holds PNG files, only the PNG files are frames."""
VIDEOS = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif"),
    *(".ogv", ".flv", ".3gp", ".mts", ".m2ts"),
)
"""Suffixes of video files."""

# Pixel formats that can hold transparency.
_ALPHA = re.compile(r" (yuva|rgba|bgra|argb|abgr|ya8|ya16|gbrap|pal8|ayuv|vuya|uyva)")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """Size, rate and length of a video."""

    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""
    fps: float
    """Mean number of frames per second; 0 for a folder of pictures without a stored rate."""
    frames: int
    """Number of decoded frames, or of pictures in a folder."""

    @property
    def seconds(self) -> float:
        """Length in seconds; 0 if `fps` is unknown."""
        return self.frames / self.fps if self.fps else 0.0


def probe(path: str | Path, *, square: bool = True, most: int | None = None) -> VideoInfo:
    """Measure the size, rate and length of a video file or of a folder of PNG pictures.

    A file is decoded to count its frames, because headers may be wrong. Of a folder, only the first picture is read.

    Args:
        path: a video file or a folder.
        square: as for `iter_video`; the returned size is the size of the frames that `iter_video` yields.
        most: largest number of pixels in all frames together; decoding stops there. None sets no limit.

    Raises:
        VideoError: the file does not exist, is not a video, is damaged or truncated, or has more pixels than `most`.
    """
    source = _existing(path)
    if source.is_dir():
        return _probe_folder(source)
    check_whole(source)
    size, time_base = (0, 0), Fraction(0)
    frames = first = last = duration = 0
    with decoder(source, ["-vf", _scale(square), "-f", "framecrc", "-flush_packets", "1"]) as output:
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
                if most is not None and frames * size[0] * size[1] > most:
                    raise VideoError(f"{source} has more than {most:,} pixels in all its frames: shorten or shrink it")
    if not frames:
        raise VideoError(f"{source} has no frame")
    # The mean rate between the first and the last frame; for a single frame, the inverse of its duration.
    rate = Fraction(max(frames - 1, 1), (last - first) or duration or 1) / time_base
    return VideoInfo(width=size[0], height=size[1], fps=float(rate), frames=frames)


def read_comment(path: str | Path) -> str | None:
    """Return the comment in the metadata of a video file (see `write_video`); None for a folder or without a comment.

    Raises:
        VideoError: the file does not exist, is not a video, or is damaged or truncated.
    """
    source = _existing(path)
    if source.is_dir():
        return None
    check_whole(source)
    return metadata(source).get("comment")


def iter_video(
    path: str | Path, *, chunk: int = 16, start: int = 0, count: int | None = None, square: bool = True
) -> Iterator[Tensor]:
    """Yield a video as clips (F, 3, H, W) in [0, 1] of up to `chunk` frames; only one chunk is in memory at a time.

    The frames are those that a player shows, for any pixel format: the rotation in the metadata is applied, cover
    pictures are left out, and transparent pixels are composited onto white. High dynamic range (PQ, HLG) is mapped to
    standard dynamic range. Colours without a tag are read as BT.601, as ffmpeg and programs built on it do.

    Args:
        path: a video file, or a folder of PNG pictures, which are read in the order of their names.
        chunk: frames per clip, at least 1; the last clip may be shorter.
        start: index of the first frame.
        count: number of frames to read, fewer if the video ends earlier; None reads to the end.
        square: whether to stretch the width of a video with non-square pixels, as players do; False yields the stored
            pixels. Pictures of a folder are never stretched.

    Raises:
        VideoError: the file does not exist, is not a video, is damaged or truncated, a frame differs in size from the
            first one, the decoder produces no output for a minute, or the video has no frame `start`.
    """
    if not (is_whole(chunk, 1) and is_whole(start, 0) and (count is None or is_whole(count, 1))):
        raise VideoError(
            "chunk and count must be whole numbers >= 1 and start one >= 0, got"
            f" chunk={shown(chunk)}, count={shown(count)}, start={shown(start)}"
        )
    source = _existing(path)
    stop = None if count is None else start + count
    if source.is_dir():
        return _clips(_folder_pictures(source, start, stop), chunk, source, start)
    return _clips(_file_pictures(source, start, stop, square), chunk, source, start)


def read_video(path: str | Path, *, start: int = 0, count: int | None = None, square: bool = True) -> Tensor:
    """Read a video, or `count` frames from frame `start` on, as one clip (F, 3, H, W) in [0, 1].

    The whole clip is in memory and takes 12 bytes per pixel. Use `iter_video` for long videos. The arguments are those
    of `iter_video`.

    Raises:
        VideoError: as `iter_video`.
    """
    return torch.cat(list(iter_video(path, start=start, count=count, square=square)))


def _existing(path: str | Path) -> Path:
    source = Path(path)
    if not source.exists():
        raise VideoError(f"there is no video {source}: no such file or folder")
    return source


def _clips(pictures: Iterator[Tensor], chunk: int, source: Path, start: int) -> Iterator[Tensor]:
    size, done = None, 0
    while batch := list(islice(pictures, chunk)):
        for picture in batch:
            size = size or picture.shape
            if picture.shape != size:
                was, now = (f"{width}x{height}" for height, width, _ in (size, picture.shape))
                raise VideoError(f"{source}: frame {start + done} is {now}, the frames before it are {was}")
            done += 1
        yield torch.stack(batch).permute(0, 3, 1, 2).contiguous().float().div_(255)
    if not done:
        raise VideoError(f"{source} has no frame {start}: it ends earlier")


def _scale(square: bool) -> str:
    # Stretches the width and keeps the height, so that no row of pixels is interpolated.
    return f"scale=w='{'max(1,round(iw*sar))' if square else 'iw'}':h=ih:{_EXACT},setsar=1"


def _file_pictures(source: Path, start: int, stop: int | None, square: bool) -> Iterator[Tensor]:
    check_whole(source)
    stream = _Stream.of(source)
    window = f"trim=start_frame={start}" + ("" if stop is None else f":end_frame={stop}")
    filters = f"{window},{_TONES if stream.hdr else ''}{_scale(square)},format={'rgba' if stream.alpha else 'rgb24'}"
    # ffmpeg writes a sequence of PAM pictures. Each one has its size in its own header, so the size in the header of
    # the video file is not needed.
    arguments = ["-vf", filters, "-f", "image2pipe", "-c:v", "pam"]
    with decoder(source, arguments, codec=stream.codec, skip=start) as output:
        left = None if stop is None else stop - start
        while left != 0 and (picture := _next_pam(output)) is not None:
            yield _on_white(picture) if stream.alpha else picture
            left = None if left is None else left - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stream:
    """Properties of a video stream that decide how it is decoded."""

    alpha: bool
    """Whether frames have transparency."""
    hdr: bool
    """Whether values need tone mapping."""
    codec: str | None
    """Name of the decoder to use; None lets ffmpeg choose."""

    @classmethod
    def of(cls, source: Path) -> Self:
        """Parse the text that ffmpeg prints; a file that ffmpeg cannot open raises its error later, in the decoder."""
        streams = re.split(r"^ *Stream #", header(source), flags=re.MULTILINE)[1:]
        found = next((text for text in streams if ": Video: " in text and "(attached pic)" not in text), "")
        line = found.partition("\n")[0]
        # ffmpeg's own VP8 and VP9 decoders ignore transparency, which is a second stream inside the first.
        second = re.search(r"^ *alpha_mode *: *1", found, re.MULTILINE | re.IGNORECASE)
        codec = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(line.partition("Video: ")[2].split(" ")[0].strip(","))
        alpha = bool(second or _ALPHA.search(line))
        return cls(alpha=alpha, hdr=bool(_HDR.search(line)), codec=codec if second else None)


def _on_white(picture: Tensor) -> Tensor:
    """Composite a picture (H, W, 4) with straight alpha onto white; return (H, W, 3)."""
    colour, alpha = picture[..., :3].int(), picture[..., 3:].int()
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def _next_pam(output: IO[bytes]) -> Tensor | None:
    """Return the next picture (H, W, 3 or 4) of the output; None at its end."""
    fields: dict[bytes, bytes] = {}
    while (line := output.readline()) != b"ENDHDR\n":
        if not line:
            return None
        name, _, value = line.partition(b" ")
        fields[name] = value
    width, height, depth = (int(fields[name]) for name in (b"WIDTH", b"HEIGHT", b"DEPTH"))
    assert int(fields[b"MAXVAL"]) == 255
    data = bytearray(output.read(width * height * depth))
    # An incomplete picture is the end of a damaged file; `decoder` raises the error.
    whole = len(data) == width * height * depth
    return torch.frombuffer(data, dtype=torch.uint8).view(height, width, depth) if whole else None


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.png"), key=_place) or sorted(
        f for f in folder.iterdir() if f.suffix.lower() in PICTURES
    )
    if not files:
        raise VideoError(f"the folder {folder} holds no picture: give a video file or a folder of PNG frames")
    return files


def _place(file: Path) -> tuple[str, int, str]:
    """Return the sort key of a frame: `frame_<number>` by its number, also above 99999, other files by name."""
    ours = re.fullmatch(r"(frame_)([0-9]{5,})", file.stem)
    return (ours[1], int(ours[2]), "") if ours else (file.name, 0, file.name)


def _folder_pictures(folder: Path, start: int, stop: int | None) -> Iterator[Tensor]:
    for file in _folder_files(folder)[start:stop]:
        yield torch.from_numpy(np.array(read_picture(file)))


def _probe_folder(folder: Path) -> VideoInfo:
    files = _folder_files(folder)
    first = read_picture(files[0])
    return VideoInfo(width=first.width, height=first.height, fps=float(_noted_rate(files[0])), frames=len(files))


def _noted_rate(file: Path) -> Fraction:
    with Image.open(file) as picture:
        try:
            return Fraction(picture.info.get("fps", 0))
        except (ValueError, TypeError, ZeroDivisionError):
            return Fraction(0)  # the field was not written by postgen
