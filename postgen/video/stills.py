"""Picture files -> pictures of 8 bits a channel, as a viewer shows them."""

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

# Pillow's modes of 16 bits, in either byte order.
_SIXTEEN = {"I;16", "I;16L", "I;16B", "I;16N"}
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, UnidentifiedImageError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture file of any format that Pillow knows, as `rgb_picture`; of an animation, the first picture.

    Raises:
        VideoError: no such file, no picture, more than 89 million pixels, or what `rgb_picture` refuses.
    """
    file = Path(path).expanduser()
    with _told(file), Image.open(file) as picture:
        picture.load()
        return rgb_picture(picture)


def check_picture(path: str | Path) -> tuple[int, int]:
    """Look whether a file begins as a picture, and return its width and height; what its middle holds is not read.

    Raises:
        VideoError: no such file, no picture, or more than 89 million pixels.
    """
    file = Path(path).expanduser()
    with _told(file), Image.open(file) as picture:
        return picture.size


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Refuse what is no file, and say what Pillow says of a picture.

    Raises:
        VideoError: it cannot be read.
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
        # str() of an OSError names the file once more, as does Pillow's own.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is none that Pillow knows" if unknown else getattr(error, "strerror", None) or error
        raise VideoError(f"{said}: {reason}") from error


def rgb_picture(picture: Image.Image) -> Image.Image:
    """Return a picture as RGB of 8 bits a channel, as a viewer shows it.

    It is turned as its EXIF orientation says; 16 bits are rounded to 8; what is transparent lies on white; colours of
    an embedded ICC profile (CMYK, Display P3, ...) become sRGB. CMYK without a profile is converted by plain
    arithmetic.

    Raises:
        VideoError: 32-bit integers or floating point, whose white nobody knows, or another form that has no RGB.
    """
    upright = ImageOps.exif_transpose(picture)
    shown = _in_srgb(upright)
    if shown.mode in _SIXTEEN or (shown.mode == "I" and picture.format == "PNG"):  # older Pillows call it I
        wide = np.asarray(shown).astype(np.int64)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if shown.mode in ("I", "F"):
        raise VideoError(f"its values (mode {shown.mode}) have no known range: save it with 8 or 16 bits a channel")
    try:
        transparent = shown.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in shown.info
        return _on_white(shown) if transparent else shown.convert("RGB")
    except ValueError as error:
        raise VideoError(f"its form {shown.mode} is not known here ({error}): save it as RGB") from error


def _on_white(picture: Image.Image) -> Image.Image:
    # La knows no other way than through LA, RGBa none but RGBA.
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
        return picture  # a broken profile: viewers show the picture without it
    assert converted is not None
    return converted
