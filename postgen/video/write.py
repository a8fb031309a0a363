"""Clips -> video files and folders of pictures."""

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
"""Formats that `write_video` knows, and the suffix of each (`frames` is a folder of PNG pictures)."""

Put = Callable[[Tensor], object]

_DEFAULT_QUALITY = 7.0
_LONGEST_COMMENT = 2**16
"""Bytes: it goes through an argument of a program, which systems bound."""
_SLOWEST = 0.01
"""Frames per second: slower ones are no fraction that a file can say."""


def write_video(
    path: str | Path,
    frames: Frames,
    *,
    fps: float | Fraction,
    format: str | None = None,
    quality: float | None = None,
    comment: str | None = None,
) -> VideoInfo:
    """Write a video whose size and rate are exactly those given; nothing is resized, whatever the size.

    mp4 is H.264 with 4:2:0 chroma, which every player knows; an odd width or height gets 4:4:4 chroma instead, as
    H.264 has no other way to keep it (ffmpeg, VLC and Chromium play that, some hardware players do not). webm is VP9.
    gif has a palette of its own per frame and a clock of 1/100 s: it shows at most 50 frames per second and meets odd
    rates on average only. frames is a folder of lossless `frame_00000.png` that remember the rate.

    Args:
        path: the file, or the folder for `frames`. It appears, or replaces an old one, only when it is complete.
        frames: a clip (F, 3, H, W), or any iterable of clips and of frames (3, H, W), read one item at a time; values
            are floating point in [0, 1] or uint8.
        fps: frames per second, above 0.
        format: mp4, webm, gif or frames; None takes it from the suffix of `path`.
        quality: 0 (small) to 10 (best) for mp4 and webm; None is 7.
        comment: a text that mp4 and webm carry with them, for `read_comment`; at most 64 KiB.

    Returns:
        What was written.

    Raises:
        VideoError: a format, rate, quality, comment or frame that cannot be written, or a place that cannot.
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
    """Write an mp4 as `write_video` does, with further arguments of ffmpeg, and in place; return its frames.

    Raises:
        VideoError: frames that cannot be written.
        OSError: the place cannot be written.
    """
    first, stream = _begun(frames, path)
    height, width, _ = first.shape
    return _put_all(path, "mp4", stream, (width, height), rate, [*_coding("mp4", None), *options])


def _begun(frames: Frames, target: Path) -> tuple[Tensor, Iterator[Tensor]]:
    """Return the first picture, and all of them."""
    stream = pictures(frames)
    first = next(stream, None)
    if first is None:
        raise VideoError(f"there is no frame to write to {target}")
    return first, chain([first], stream)


def _put_all(
    part: Path, kind: str, stream: Iterator[Tensor], size: tuple[int, int], rate: Fraction, arguments: list[str]
) -> int:
    """Write all pictures; return how many."""
    written = 0
    with _sink(part, kind, size, rate, arguments) as put:
        for picture in stream:
            put(picture)
            written += 1
    return written


def check_target(path: str | Path, format: str | None = None) -> str:
    """Return the format that `write_video` would use, or say now, before any frame is made, why it could not write.

    Raises:
        VideoError: unknown format or suffix, a suffix that belongs to another format, a place that cannot be written,
            a folder that holds other things; `NoFFmpegError` when the format needs an ffmpeg and there is none.
    """
    target = Path(path)
    by_suffix = {suffix: name for name, suffix in FORMATS.items() if suffix}.get(target.suffix.lower())
    kind = by_suffix if format is None else format
    if not isinstance(kind, str) or kind not in FORMATS:
        got = target.suffix if format is None else format
        known = f"known are {', '.join(FORMATS)}"
        raise VideoError(f"unknown video format {got!r} for {target}: {known} (by suffix or format)")
    if by_suffix not in (None, kind):
        raise VideoError(f"{target} is named like {by_suffix} but the format is {kind}: change one of the two")
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
        raise VideoError(f"cannot replace the folder {target}: it holds {min(others)}, which is no frame of ours")


def checked_rate(fps: float | Fraction, kind: str) -> Fraction:
    """Return the rate at which a video of a format is written, before anything is.

    Args:
        fps: frames per second.
        kind: a key of `FORMATS`.

    Raises:
        VideoError: a rate that is none, or that the format does not have.
    """
    number = is_number(fps) or isinstance(fps, Fraction)
    if not number or not _SLOWEST <= fps <= 1000:
        raise VideoError(f"fps must be above 0 and at most 1000, got fps={shown(fps)}")
    if kind == "gif" and fps > 50:
        raise VideoError(f"a gif shows at most 50 frames per second, got {fps}: choose mp4 or webm")
    # 29.97 stays 2997/100 and the float nearest to 30000/1001 becomes that fraction again.
    return Fraction(fps).limit_denominator(1001)


def _coding(kind: str, quality: float | None) -> list[str]:
    """Return ffmpeg's arguments for codec and quality."""
    if kind in ("gif", "frames"):
        if quality is not None:
            raise VideoError(f"quality is for mp4 and webm, {kind} has no such setting: leave it out")
        # One palette per frame streams; a palette of the whole video would hold every frame until the end.
        palette = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
        return ["-vf", palette, "-f", "gif"]
    level = _DEFAULT_QUALITY if quality is None else quality
    if not (is_number(level) and 0 <= level <= 10):
        raise VideoError(f"quality must be between 0 and 10, got {shown(quality)}")
    if kind == "mp4":
        return ["-c:v", "libx264", "-crf", f"{38 - 3 * level:.1f}", "-movflags", "+faststart", "-f", "mp4"]
    return ["-c:v", "libvpx-vp9", "-crf", f"{53 - 4 * level:.0f}", "-b:v", "0", "-cpu-used", "4", "-f", "webm"]


def holds_comment(kind: str, comment: str) -> bool:
    """Whether a format can carry a text."""
    return kind in ("mp4", "webm") and len(comment.encode()) <= _LONGEST_COMMENT and "\0" not in comment


def _noting(kind: str, comment: str | None) -> list[str]:
    """Return ffmpeg's arguments for a comment."""
    if comment is None:
        return []
    if not holds_comment(kind, comment):
        raise VideoError(
            f"a comment is for mp4 and webm, at most {_LONGEST_COMMENT:,} bytes and without a null character, got"
            f" {len(comment.encode()):,} bytes for {kind}: leave it out"
        )
    return ["-metadata", f"comment={comment}"]


@contextmanager
def _sink(part: Path, kind: str, size: tuple[int, int], rate: Fraction, arguments: list[str]) -> Iterator[Put]:
    """Give the function that takes one picture after the other; the output is complete when the block ends."""
    if kind == "frames":
        yield _png_writer(part, rate)
        return
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", str(rate), "-i", "pipe:0"]
    with encoder(part, [*raw, *_colours(kind, size), *arguments, "-fflags", "+bitexact"]) as pipe:
        yield lambda picture: pipe.write(picture.numpy().tobytes())


def _colours(kind: str, size: tuple[int, int]) -> list[str]:
    """Return the arguments that say how RGB becomes YUV: BT.709, tagged as such, rounded with care."""
    if kind == "gif":
        return []
    odd = kind == "mp4" and (size[0] % 2 or size[1] % 2)
    tags = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    scale = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
    return ["-vf", scale, "-pix_fmt", "yuv444p" if odd else "yuv420p", *tags]


def _png_writer(folder: Path, rate: Fraction) -> Put:
    folder.mkdir()
    note = PngInfo()
    note.add_text("fps", str(rate))
    count = 0

    def put(picture: Tensor) -> None:
        nonlocal count
        Image.fromarray(picture.numpy()).save(folder / f"frame_{count:05d}.png", pnginfo=note)
        count += 1

    return put
