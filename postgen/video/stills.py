"""Reading of picture files as 8-bit pictures, as an image viewer shows them."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from postgen.errors import UserError
from postgen.reading import check_readable
from postgen.video.ffmpeg import VideoError

# Pillow's 16-bit modes, in either byte order.
_SIXTEEN = {"I;16", "I;16L", "I;16B", "I;16N"}
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, UnidentifiedImageError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture file of any format that Pillow knows, converted by `rgb_picture`.

    Of an animation, the first picture is returned.

    Raises:
        VideoError: the file does not exist, is not a picture, has more than 89 million pixels, or is refused by
            `rgb_picture`.
    """
    file = Path(path).expanduser()
    with _told(file), Image.open(file) as picture:
        picture.load()
        return rgb_picture(picture)


def check_picture(path: str | Path) -> tuple[int, int]:
    """Check that a file begins like a picture, and return its width and height; pixels are not decoded.

    Raises:
        VideoError: the file does not exist, is not a picture, or has more than 89 million pixels.
    """
    file = Path(path).expanduser()
    with _told(file), Image.open(file) as picture:
        return picture.size


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Check that a file is readable, and turn errors of Pillow in the block into `VideoError`.

    Raises:
        VideoError: the file cannot be read as a picture.
    """
    said = f"cannot read the picture {file}"
    try:
        check_readable(file, said)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except VideoError as error:
        raise VideoError(f"{said}: {error}") from error
    except UserError as error:
        raise VideoError(str(error)) from error
    except _BROKEN as error:
        # str() of an OSError, and of Pillow's own error, repeats the name of the file.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "Pillow does not recognise its format" if unknown else getattr(error, "strerror", None) or error
        raise VideoError(f"{said}: {reason}") from error


def rgb_picture(picture: Image.Image) -> Image.Image:
    """Return a picture as RGB with 8 bits per channel, as an image viewer shows it.

    The EXIF orientation is applied. Values of 16 bits are rounded to 8 bits. Transparent pixels are composited onto
    white. Colours of an embedded ICC profile (CMYK, Display P3, ...) are converted to sRGB; CMYK without a profile is
    converted arithmetically.

    Raises:
        VideoError: the values are 32-bit integers or floating point, whose range is unknown, or Pillow cannot convert
            the mode to RGB.
    """
    upright = ImageOps.exif_transpose(picture)
    shown = _in_srgb(upright)
    if shown.mode in _SIXTEEN or (shown.mode == "I" and picture.format == "PNG"):  # mode I in older Pillow
        wide = np.asarray(shown).astype(np.int64)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if shown.mode in ("I", "F"):
        raise VideoError(f"its values (mode {shown.mode}) have no known range: save it with 8 or 16 bits per channel")
    try:
        transparent = shown.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in shown.info
        return _on_white(shown) if transparent else shown.convert("RGB")
    except ValueError as error:
        raise VideoError(f"its mode {shown.mode} cannot be converted to RGB ({error}): save it as RGB") from error


def _on_white(picture: Image.Image) -> Image.Image:
    # Pillow converts La only to LA, and RGBa only to RGBA.
    straight = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    white = Image.new("RGBA", straight.size, "white")
    return Image.alpha_composite(white, straight).convert("RGB")


def _in_srgb(picture: Image.Image) -> Image.Image:
    embedded = picture.info.get("icc_profile")
    if not embedded or picture.mode not in ("RGB", "RGBA", "CMYK", "LAB"):
        return picture
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(embedded))
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture  # viewers ignore a broken profile
    assert converted is not None
    return converted
