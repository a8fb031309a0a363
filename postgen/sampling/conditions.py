"""Encoded prompts. Each prompt row is encoded alone, so that its encoding does not depend on other rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from postgen.families import Condition, Denoiser
from postgen.video import read_picture, rgb_picture

Row = dict[str, Any]
"""One prompt row: `prompt`, optionally `negative_prompt` and `image`, and any further columns."""

Conditions = Callable[[Sequence[int]], Condition]
"""B prompt numbers -> their conditions, stacked to batch size B."""

_KEPT = 1024
"""Number of most recently used encodings that stay cached if `keep_all` is false."""


class Embeddings:
    """Cache of the encoded prompt rows (conditions).

    Args:
        denoiser: encodes prompts and images.
        size: `num_frames`, `height` and `width`, for first frames.
        guidance: whether to encode the negative prompt as well.
        negative_prompt: negative prompt of rows without their own.
        keep_all: whether to keep all encodings; otherwise the most recently used 1024.
        device: device of the encodings.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        size: dict[str, int],
        guidance: bool,
        negative_prompt: str,
        keep_all: bool,
        device: torch.device,
    ) -> None:
        self.denoiser, self.size, self.guidance = denoiser, size, guidance
        self.negative_prompt, self.keep_all, self.device = negative_prompt, keep_all, device
        self._known: OrderedDict[tuple[str, str, str], dict[str, Tensor]] = OrderedDict()

    def encode(self, rows: Iterable[Row]) -> None:
        """Encode rows in advance."""
        for row in rows:
            self.of(row)

    def table(self, row_of: Callable[[int], Row]) -> Conditions:
        """Return a function from numbers to their stacked conditions; `row_of` maps a number to its prompt row."""

        def stacked(numbers: Sequence[int]) -> Condition:
            found = [self.of(row_of(number)) for number in numbers]
            return {name: torch.cat([part[name] for part in found]) for name in found[0]}

        return stacked

    @torch.no_grad()
    def of(self, row: Row) -> dict[str, Tensor]:
        """Return the condition of a prompt row, with batch size 1."""
        negative = row.get("negative_prompt")
        negative = self.negative_prompt if negative is None else str(negative)
        image = row.get("image")
        # The key of an image object is its id, because rows live as long as the run. `str(tensor)` is abbreviated, so
        # two different images could have the same text.
        picture_key = str(image) if image is None or isinstance(image, str | Path) else f"object {id(image)}"
        key = row["prompt"], negative if self.guidance else "", picture_key
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        made = self.denoiser.encode_prompt([row["prompt"]], [negative], guidance=self.guidance)
        if image is not None:
            picture = load_image(image, self.size["height"], self.size["width"])
            made = {**made, **self.denoiser.encode_image(picture[None], self.size["num_frames"])}
        self._known[key] = {name: value.detach().to(self.device) for name, value in made.items()}
        if not self.keep_all and len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return self._known[key]


def load_image(image: Any, height: int, width: int) -> Tensor:
    """Load and resize an image.

    Args:
        image: a file name, a PIL image, or a tensor (3, H', W') in [0, 1].
        height: height H of the result in pixels.
        width: width W of the result in pixels.

    Returns:
        (3, H, W) float32 in [0, 1].

    Raises:
        UserError: the file cannot be read as an image.
    """
    if isinstance(image, Tensor):
        if tuple(image.shape[-2:]) == (height, width):
            return image.float()
        resized = interpolate(image[None].float(), (height, width), mode="bicubic", antialias=True)[0]
        return resized.clamp(0, 1)
    import numpy as np
    from PIL import Image

    picture = read_picture(image) if isinstance(image, str | Path) else rgb_picture(image)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
