"""Encode clips in all modalities, and store them as the pool from which training windows are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from postgen.settings import Part
from postgen.training.transfer import to_device

from .corruption import corrupted
from .depth import DisparityRange, flow_picture
from .levels import Modality
from .model import WorldWeaverModel

CORRUPTED = "corrupted"
"""Name of the RGB latents with wrong colours."""
PLACED = "placed"
"""Name of the sights for placed memory."""


@dataclass(kw_only=True)
class ClipsConfig(Part):
    """Settings of the clips from which training windows are cut.

    Raises:
        UserError: a value outside its range.
    """

    part: ClassVar[str] = "clips"
    files: ClassVar[tuple[str, ...]] = ("train_dataset", "eval_dataset")

    train_dataset: str | None = None
    """Dataset of rows (JSONL or another format of prompts) with `prompt`, `video` (a file or a folder of frames), and
    optionally `depth`. None: render scenes of the world."""

    eval_dataset: str | None = None
    """Dataset of clips for the evaluation loss, in the same format. None: evaluate on other scenes of the world."""

    depth_model: str | None = None
    """Depth estimator of transformers for rows without `depth`."""

    num_frames: int = 161
    """Number of frames of a clip, enough for memory and a window. Longer videos are cut; shorter ones are an error."""

    height: int = 128
    """Height of the clips in pixels; videos are resized."""

    width: int | None = None
    """Width of the clips in pixels; None: equal to the height, as scenes of the world are square."""

    pool_clips: int = 2048
    """Number of scenes that each process renders and encodes before the first step."""

    eval_clips: int = 0
    """Number of scenes for the evaluation loss."""

    pool_dir: str | None = None
    """Folder in which encoded scenes or videos are kept for later runs. None: they are kept in memory only. Each
    process encodes a share of a user's videos, and the other processes read them from this folder."""

    start_caption: float = 0.5
    """Share of windows with the caption of the scene's first frame, as in a rollout with one prompt. The others have a
    caption of what bodies and camera do from the window on. A user's video has a single prompt."""

    caption_dropout: float = 0.1
    """Share of windows with an empty prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_frames", "height", "pool_clips"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(self.width is None or self.width >= 1, "width", "at least 1")
        self.require(self.eval_clips >= 0, "eval_clips", "at least 0")
        self.require(self.pool_dir != "", "pool_dir", "the name of a folder, or left out")
        for name in ("start_caption", "caption_dropout"):
            self.require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        world = self.train_dataset is None
        self.require(not world or self.depth_model is None, "depth_model", "omitted: the world has exact depth")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width or self.height


@dataclass(slots=True)
class ClipPool:
    """A pool of N encoded clips with T latent frames."""

    latents: dict[Modality, Tensor]
    """(N, C, T, h, w) float16 of each modality, without the latent scale."""
    corrupted: Tensor | None
    """(N, C, T, h, w) RGB latents of clips with wrong colours."""
    poses: Tensor | None
    """(N, T, 3, 4) cameras on the CPU. The camera of a latent frame is that of its last video frame."""
    texts: Tensor
    """(N, T) int64 on the CPU: for each latent frame the number of the text that describes the clip from there on."""
    sights: Tensor | None = None
    """(N, T, P, 3, h, w) float32 sights of the P frames from each frame on, see `placed_clips`."""

    def __len__(self) -> int:
        return len(self.texts)

    def joint(self, rows: Tensor, device: torch.device) -> Tensor:
        """Return (B, M * C, T, h, w) latents of the clips `rows` (on the CPU), without the latent scale."""
        return torch.cat([_picked(each, rows, device) for each in self.latents.values()], 1)

    def wrong(self, rows: Tensor, device: torch.device) -> Tensor | None:
        """Return the corrupted RGB latents of the clips `rows`, (B, C, T, h, w)."""
        return None if self.corrupted is None else _picked(self.corrupted, rows, device)

    def seen(self, rows: Tensor, device: torch.device) -> Tensor | None:
        """Return the sights of the clips `rows`, (B, T, P, 3, h, w)."""
        return None if self.sights is None else _picked(self.sights, rows, device)


@dataclass(slots=True)
class ClipBatch:
    """A batch of clips."""

    latents: Tensor
    """(B, M * C, T, h, w) latents of all modalities."""
    wrong: Tensor | None
    """(B, C, T, h, w) corrupted RGB latents."""
    poses: Tensor | None
    """(B, T, 3, 4) cameras."""
    texts: list[int]
    """Numbers of the texts of the clips."""
    sights: Tensor | None = None
    """(B, T, P, 3, h, w), as in `ClipPool`."""

    def put(self, frames: Tensor, start: int) -> None:
        """Replace the frames from latent frame `start` on by frames (B, M * C, F, h, w), in place."""
        stop = start + frames.shape[2]
        self.latents[:, :, start:stop] = frames
        if self.wrong is not None:
            self.wrong[:, :, start:stop] = frames[:, : self.wrong.shape[1]]


def _picked(latents: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    return to_device(latents[to_device(rows, latents.device)], device)


@torch.no_grad()
def encoded(
    model: WorldWeaverModel,
    names: Sequence[str],
    rgb: Tensor,
    disparity: Tensor | None,
    flow: Tensor | None,
    noise: torch.Generator,
    *,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Encode clips to float16 latents by name, without the latent scale.

    Args:
        model: encodes the clips.
        names: modalities, and `corrupted` for RGB with wrong colours.
        rgb: (B, F, 3, H, W) in [0, 1].
        disparity: (B, F, H, W), required for depth.
        flow: (B, F - 1, 2, H, W), required for flow.
        noise: CPU generator for the corruption.
        bf16: encode in bfloat16; pictures are made in float32 in any case.
    """

    def picture(name: str) -> Tensor:
        if name == "depth":
            assert disparity is not None
            return DisparityRange.of(disparity).picture(disparity)
        if name == "flow":
            assert flow is not None
            return flow_picture(flow)
        return corrupted(rgb, noise) if name == CORRUPTED else rgb

    found = {}
    for name in names:
        clip = picture(name)
        with torch.autocast(rgb.device.type, torch.bfloat16, enabled=bf16):
            # Encode every modality as "rgb", whose scale is 1, so that stored latents do not depend on the scale.
            found[name] = model.encode(clip).to(torch.float16)
    return found


def in_parts(count: int, size: int) -> Iterator[slice]:
    """Yield slices that cover `count` items, `size` at a time."""
    for low in range(0, count, size):
        yield slice(low, min(low + size, count))
