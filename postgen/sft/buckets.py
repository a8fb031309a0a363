"""Buckets: the sizes and numbers of frames of training clips, the choice of a bucket for a file, resizing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError, shown
from postgen.families.loaded import sizes_of_pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from postgen.families import Denoiser

_SAME = 1e-6
"""Largest difference of two equal aspect ratios, as logarithms."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Size and length of clips that may be in one batch.

    >>> str(Bucket(480, 832, 33)), Bucket(480, 832, 33).pixels
    ('480x832x33', 13178880)
    """

    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    num_frames: int
    """Number of frames; 1 for images."""

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames}"

    @property
    def pixels(self) -> int:
        """Number of pixels in all frames."""
        return self.height * self.width * self.num_frames


def parsed_bucket(text: str) -> Bucket:
    """Return the bucket that a text such as `480x832x33` names.

    Raises:
        UserError: the text has another form.

    >>> parsed_bucket("64x96x9")
    Bucket(height=64, width=96, num_frames=9)
    """
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})x([1-9]\d{0,4})", str(text))
    if found is None:
        raise UserError(f"buckets has {shown(text)}, it must be HEIGHTxWIDTHxFRAMES, such as 480x832x33.")
    height, width, num_frames = (int(number) for number in found.groups())
    return Bucket(height, width, num_frames)


def parsed_aspect(text: str) -> float:
    """Return the aspect ratio, width / height, that a text such as `16:9` names.

    Raises:
        UserError: the text has another form, or the ratio is not from 1:8 to 8:1.
    """
    found = re.fullmatch(r"(\d{1,4}(?:\.\d{1,4})?):(\d{1,4}(?:\.\d{1,4})?)", str(text))
    width, height = (float(number) for number in found.groups()) if found else (0.0, 0.0)
    if not (width and height and 1 / 8 <= width / height <= 8):
        raise UserError(f"aspects has {shown(text)}, it must be WIDTH:HEIGHT, such as 16:9, from 1:8 to 8:1.")
    return width / height


def multiples_of(pipe: Any, denoiser: Denoiser) -> tuple[int, int, int]:
    """Return the numbers of which height, width and frames - 1 must be multiples; the last is 0 for image models.

    Raises:
        UserError: neither the denoiser nor the table of pipelines knows them.
    """
    found: tuple[int, int, int] | None = getattr(denoiser, "multiples", None) or sizes_of_pipeline(pipe)
    if found is None:
        raise UserError(f"the sizes of clips for {type(pipe).__name__} are not known: use a model that postgen lists")
    return found


def automatic_buckets(
    height: int,
    width: int,
    frame_counts: Iterable[int],
    aspects: Iterable[float],
    multiples: tuple[int, int, int],
) -> list[Bucket]:
    """Return buckets of about the area of height x width: one of exactly this size and one for each aspect ratio.

    Args:
        height: height in pixels; a multiple of the model's number.
        width: width in pixels.
        frame_counts: numbers of frames; each size is combined with each number, and with 1 for images.
        aspects: aspect ratios, width / height.
        multiples: numbers of which height, width and frames - 1 must be multiples.
    """
    sizes = dict.fromkeys([(height, width), *(_sized(height * width, aspect, multiples[:2]) for aspect in aspects)])
    counts = sorted({1, *frame_counts}, reverse=True)
    return [Bucket(*size, count) for size in sizes for count in counts]


def _sized(area: int, aspect: float, steps: Sequence[int]) -> tuple[int, int]:
    """Return the legal size nearest to an aspect ratio and an area, and not larger than the area if possible."""
    ideal = math.sqrt(area / aspect), math.sqrt(area * aspect)
    choices = []
    for sides in product(*({max(1, math.floor(i / s)), math.ceil(i / s)} for i, s in zip(ideal, steps, strict=True))):
        rows, columns = (side * step for side, step in zip(sides, steps, strict=True))
        wrong = abs(math.log(columns / rows / aspect)) + abs(math.log(rows * columns / area))
        choices.append((rows * columns > area, wrong, (rows, columns)))
    return min(choices)[2]


def check_buckets(buckets: Iterable[Bucket], pipe: Any, denoiser: Denoiser) -> None:
    """Check that a model can make all buckets.

    Raises:
        UserError: the model does not support the size or the number of frames of a bucket.
    """
    for bucket in buckets:
        if reason := why_unsuited(bucket, denoiser):
            raise UserError(f"bucket {bucket} does not suit {type(pipe).__name__}: {reason}")


def why_unsuited(bucket: Bucket, denoiser: Denoiser) -> str | None:
    """Return why a model cannot make a bucket; None if it can."""
    try:
        denoiser.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    except UserError as error:
        return str(error)
    return None


class Buckets:
    """The buckets of a run.

    Args:
        buckets: the buckets; those with one frame are for images.
    """

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        self._counts: dict[tuple[int, int], list[int]] = {}
        for bucket in sorted(set(buckets), reverse=True):
            self._counts.setdefault((bucket.height, bucket.width), []).append(bucket.num_frames)

    def __iter__(self) -> Any:
        return (Bucket(*size, count) for size, counts in self._counts.items() for count in counts)

    def shortest(self) -> int:
        """Return the smallest number of frames of a video bucket; 0 if there are only buckets for images."""
        return min((count for counts in self._counts.values() for count in counts if count > 1), default=0)

    def nearest(self, height: int, width: int, frames: int, *, image: bool = False) -> list[Bucket]:
        """Return the buckets of the nearest aspect ratio that a file can fill, from many frames to few.

        Of equally near sizes the largest is chosen. The list is empty if the file has too few frames for all.

        Args:
            height: height of the file in pixels.
            width: width of the file in pixels.
            frames: number of frames that the file has.
            image: whether the file is an image.
        """
        fitting: dict[tuple[int, int], list[int]] = {}
        for size, counts in self._counts.items():
            usable = [1] if image else [count for count in counts if 1 < count <= frames]
            if usable and (not image or 1 in counts):
                fitting[size] = usable
        if not fitting:
            return []
        aspect = math.log(width / height)
        away = {size: abs(math.log(size[1] / size[0]) - aspect) for size in fitting}
        least = min(away.values())
        best = max((s for s in fitting if away[s] <= least + _SAME), key=lambda s: (s[0] * s[1], fitting[s], s))
        return [Bucket(*best, count) for count in fitting[best]]


def fitted(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize frames (F, 3, H, W) so that they cover a size, and crop the centre; returns (F, 3, height, width)."""
    from torch.nn.functional import interpolate

    rows, columns = frames.shape[-2:]
    if (rows, columns) != (height, width):
        scale = max(height / rows, width / columns)
        size = max(height, round(rows * scale)), max(width, round(columns * scale))
        frames = interpolate(frames, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (frames.shape[-2] - height) // 2, (frames.shape[-1] - width) // 2
    return frames[..., top : top + height, left : left + width]
