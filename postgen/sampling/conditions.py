"""Encoded prompts. Each row is encoded by itself, so that its encoding does not depend on its neighbours."""

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
"""One row of prompts: `prompt`, perhaps `negative_prompt` and `image`, and any further columns."""

Conditions = Callable[[Sequence[int]], Condition]
"""Prompt numbers -> their conditions, stacked."""

_KEPT = 1024
"""Encodings that are kept for later when not all of them are."""


class Embeddings:
    """Conditions of rows, computed once.

    Args:
        denoiser: encodes them.
        size: `num_frames`, `height` and `width`, for first frames.
        guidance: whether the negative prompt is wanted.
        negative_prompt: of rows without one.
        keep_all: whether none is ever forgotten.
        device: where they are used.
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
        """Encode rows now instead of when they are first asked for."""
        for row in rows:
            self.of(row)

    def table(self, row_of: Callable[[int], Row]) -> Conditions:
        """Return a function from row numbers to their stacked conditions."""

        def stacked(numbers: Sequence[int]) -> Condition:
            found = [self.of(row_of(number)) for number in numbers]
            return {name: torch.cat([part[name] for part in found]) for name in found[0]}

        return stacked

    @torch.no_grad()
    def of(self, row: Row) -> dict[str, Tensor]:
        """Return the condition of a row, batch size 1."""
        negative = row.get("negative_prompt")
        negative = self.negative_prompt if negative is None else str(negative)
        image = row.get("image")
        # By identity, as rows live as long as the run: the text form of a tensor is shortened, two may print alike.
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
    """Return a picture (3, H, W) in [0, 1] from a file name, a PIL picture or a tensor of that form, resized.

    Raises:
        UserError: it cannot be read.
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
