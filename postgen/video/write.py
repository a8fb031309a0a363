"""Writing of clips as video files and folders of pictures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from postgen.errors import UserError, is_number, shown
from postgen.files import check_place, replacing
from postgen.video.ffmpeg import VideoError, encoder, executable
from postgen.video.pictures import Frames, pictures
from postgen.video.read import VideoInfo

FORMATS = MappingProxyType({"mp4": ".mp4", "webm": ".webm", "gif": ".gif", "frames": ""})
"""Formats of `write_video`, and the suffix of each (`frames` is a folder of PNG pictures)."""

Put = Callable[[Tensor], object]

_DEFAULT_QUALITY = 7.0
_LONGEST_COMMENT = 2**16
"""In bytes. The comment is an argument of ffmpeg, and operating systems limit the length of arguments."""
_SLOWEST = 0.01
"""In frames per second. A file cannot represent slower rates as a fraction."""


def write_video(
    path: str | Path,
    frames: Frames,
    *,
    fps: float | Fraction,
    format: str | None = None,
    quality: float | None = None,
    comment: str | None = None,
) -> VideoInfo:
    """Write a video with exactly the given size and rate; frames are never resized.

    - mp4: H.264 with 4:2:0 chroma, which every player supports. For an odd width or height it has 4:4:4 chroma,
      because H.264 cannot store odd sizes with 4:2:0. ffmpeg, VLC and Chromium play 4:4:4; some hardware players do
      not.
    - webm: VP9.
    - gif: one palette per frame and a clock of 1/100 s. A gif shows at most 50 frames per second and meets other rates
      than divisors of 100 only on average.
    - frames: a folder of lossless pictures `frame_00000.png`, `frame_00001.png`, ... that store the rate.

    Args:
        path: the file, or the folder for `frames`. It appears, or replaces an existing one, only when it is complete.
        frames: a clip (F, 3, H, W), or an iterable of clips and of frames (3, H, W), which is read one item at a time.
            Values are floating point in [0, 1], or uint8.
        fps: frames per second, from 0.01 to 1000; for gif at most 50.
        format: mp4, webm, gif or frames; None takes the format from the suffix of `path`.
        quality: from 0 (smallest file) to 10 (best picture), for mp4 and webm; None is 7.
        comment: a text to store in the metadata of mp4 and webm, at most 64 KiB; `read_comment` returns it.

    Returns:
        Size, rate and number of frames of the written video.

    Raises:
        VideoError: the format, rate, quality, comment or a frame is not valid, or `path` cannot be written.
    """
    target = Path(path)
    kind = check_target(target, format)
    rate = checked_rate(fps, kind)
    arguments = [*_coding(kind, quality), *_noting(kind, comment)]
    first, stream = _begun(frames, target)
    height, width, _ = first.shape
    try:
        with replacing(target) as part:
            written = _put_all(part, kind, stream, (width, height), rate, arguments)
    except OSError as error:
        raise VideoError(f"cannot write {target}: {error.strerror or error}") from error
    return VideoInfo(width=width, height=height, fps=float(rate), frames=written)


def write_piece(path: Path, frames: Frames, rate: Fraction, options: Sequence[str]) -> int:
    """Write an mp4 directly to `path`, with further arguments of ffmpeg; return the number of frames.

    Unlike `write_video`, an incomplete file stays at `path` after an error.

    Raises:
        VideoError: the frames cannot be written.
        OSError: `path` cannot be written.
    """
    first, stream = _begun(frames, path)
    height, width, _ = first.shape
    return _put_all(path, "mp4", stream, (width, height), rate, [*_coding("mp4", None), *options])


def _begun(frames: Frames, target: Path) -> tuple[Tensor, Iterator[Tensor]]:
    """Return the first picture, and an iterator over all pictures, the first included."""
    stream = pictures(frames)
    first = next(stream, None)
    if first is None:
        raise VideoError(f"cannot write {target}: there is no frame")
    return first, chain([first], stream)


def _put_all(
    part: Path, kind: str, stream: Iterator[Tensor], size: tuple[int, int], rate: Fraction, arguments: list[str]
) -> int:
    """Write all pictures and return their number."""
    written = 0
    with _sink(part, kind, size, rate, arguments) as put:
        for picture in stream:
            put(picture)
            written += 1
    return written


def check_target(path: str | Path, format: str | None = None) -> str:
    """Return the format that `write_video` would use, or refuse the target before any frame is computed.

    Raises:
        VideoError: the format or suffix is unknown, the suffix belongs to another format, `path` cannot be written, or
            the folder for `frames` holds other files.
        NoFFmpegError: the format needs ffmpeg and no ffmpeg is found.
    """
    target = Path(path)
    by_suffix = {suffix: name for name, suffix in FORMATS.items() if suffix}.get(target.suffix.lower())
    kind = by_suffix if format is None else format
    if not isinstance(kind, str) or kind not in FORMATS:
        got = target.suffix if format is None else format
        known = ", ".join(FORMATS)
        raise VideoError(f"unknown video format {got!r} for {target}: choose one of {known}, by suffix or as format")
    if by_suffix not in (None, kind):
        raise VideoError(f"{target} has the suffix of {by_suffix}, but the format is {kind}: change one of them")
    try:
        check_place(target, folder=kind == "frames")
    except UserError as error:
        raise VideoError(str(error)) from error
    if kind == "frames":
        _check_frames_folder(target)
    else:
        executable()
    return kind


def _check_frames_folder(target: Path) -> None:
    others = [item.name for item in target.iterdir() if not item.match("frame_*.png")] if target.is_dir() else []
    if others:
        raise VideoError(
            f"cannot replace the folder {target}: it holds {min(others)}, which is not a frame_*.png. Choose another"
            " folder"
        )


def checked_rate(fps: float | Fraction, kind: str) -> Fraction:
    """Return the rate, as a fraction, with which `write_video` would write a video.

    Args:
        fps: frames per second, from 0.01 to 1000; for gif at most 50.
        kind: a key of `FORMATS`.

    Raises:
        VideoError: `fps` is not a number in this range.
    """
    number = is_number(fps) or isinstance(fps, Fraction)
    if not number or not _SLOWEST <= fps <= 1000:
        raise VideoError(f"fps must be a number from {_SLOWEST:g} to 1000, got fps={shown(fps)}")
    if kind == "gif" and fps > 50:
        raise VideoError(f"a gif shows at most 50 frames per second, got {fps}: choose mp4 or webm")
    # 29.97 stays 2997/100, and the float nearest to 30000/1001 becomes 30000/1001.
    return Fraction(fps).limit_denominator(1001)


def _coding(kind: str, quality: float | None) -> list[str]:
    """Return the arguments of ffmpeg for codec and quality."""
    if kind in ("gif", "frames"):
        if quality is not None:
            raise VideoError(f"quality is for mp4 and webm only, got {shown(quality)} for {kind}: leave it out")
        # One palette per frame can be streamed; for one palette of the whole video, ffmpeg would hold every frame.
        palette = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
        return ["-vf", palette, "-f", "gif"]
    level = _DEFAULT_QUALITY if quality is None else quality
    if not (is_number(level) and 0 <= level <= 10):
        raise VideoError(f"quality must be between 0 and 10, got {shown(quality)}")
    if kind == "mp4":
        return ["-c:v", "libx264", "-crf", f"{38 - 3 * level:.1f}", "-movflags", "+faststart", "-f", "mp4"]
    return ["-c:v", "libvpx-vp9", "-crf", f"{53 - 4 * level:.0f}", "-b:v", "0", "-cpu-used", "4", "-f", "webm"]


def holds_comment(kind: str, comment: str) -> bool:
    """Return whether a video of this format can store this text as its comment."""
    return kind in ("mp4", "webm") and len(comment.encode()) <= _LONGEST_COMMENT and "\0" not in comment


def _noting(kind: str, comment: str | None) -> list[str]:
    """Return the arguments of ffmpeg for a comment."""
    if comment is None:
        return []
    if not holds_comment(kind, comment):
        raise VideoError(
            f"a comment is for mp4 and webm only, with at most {_LONGEST_COMMENT:,} bytes and no null character,"
            f" got {len(comment.encode()):,} bytes for {kind}: leave it out or shorten it"
        )
    return ["-metadata", f"comment={comment}"]


@contextmanager
def _sink(part: Path, kind: str, size: tuple[int, int], rate: Fraction, arguments: list[str]) -> Iterator[Put]:
    """Yield a function that writes one picture; the output is complete when the block ends."""
    if kind == "frames":
        yield _png_writer(part, rate)
        return
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", str(rate), "-i", "pipe:0"]
    with encoder(part, [*raw, *_colours(kind, size), *arguments, "-fflags", "+bitexact"]) as pipe:
        yield lambda picture: pipe.write(picture.numpy().tobytes())


def _colours(kind: str, size: tuple[int, int]) -> list[str]:
    """Return the arguments of ffmpeg for the conversion from RGB to tagged BT.709, with accurate rounding."""
    if kind == "gif":
        return []
    odd = kind == "mp4" and (size[0] % 2 or size[1] % 2)
    tags = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    scale = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
    return ["-vf", scale, "-pix_fmt", "yuv444p" if odd else "yuv420p", *tags]


def _png_writer(folder: Path, rate: Fraction) -> Put:
    """Create a folder and return a function that writes the next picture there, with the rate in its metadata."""
    folder.mkdir()
    note = PngInfo()
    note.add_text("fps", str(rate))
    count = 0

    def put(picture: Tensor) -> None:
        nonlocal count
        Image.fromarray(picture.numpy()).save(folder / f"frame_{count:05d}.png", pnginfo=note)
        count += 1

    return put
