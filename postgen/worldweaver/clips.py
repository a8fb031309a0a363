"""Encoded clips of all modalities that windows are cut from, and how they are encoded."""

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
"""Name of RGB with wrong colours among the latents of clips."""
PLACED = "placed"
"""Name of their sights, which placed memory is read by."""


@dataclass(kw_only=True)
class ClipsConfig(Part):
    """Which clips windows are cut from.

    Raises:
        UserError: a value outside its range.
    """

    part: ClassVar[str] = "clips"
    files: ClassVar[tuple[str, ...]] = ("train_dataset", "eval_dataset")

    train_dataset: str | None = None
    """Rows (JSONL and what else prompts may be) with `prompt`, `video`, a file or a folder of frames, and perhaps
    `depth`; none renders scenes of the world."""

    eval_dataset: str | None = None
    """The same for clips on which the loss is measured; none takes other scenes of the world than training has."""

    depth_model: str | None = None
    """A depth estimator of transformers, for rows without `depth`."""

    num_frames: int = 161
    """Frames of a clip, as many as memory reaches back and a window needs. Longer videos are cut, shorter refused."""

    height: int = 128
    """Of the clips in pixels; videos are resized."""

    width: int | None = None
    """The same; none is as much as the height, as scenes of the world have it."""

    pool_clips: int = 2048
    """Scenes that each process renders and encodes before the first step."""

    eval_clips: int = 0
    """Scenes on which the loss is measured."""

    pool_dir: str | None = None
    """Folder where encoded scenes or videos are kept, for other runs with the same ones; none keeps them in memory
    only. Of a user's videos each process encodes a share, which the others read there."""

    start_caption: float = 0.5
    """Share of windows that are told what the scene's first frame shows, as a rollout with one prompt is; the others
    are told what bodies and camera do from the window on. A user's video has one prompt."""

    caption_dropout: float = 0.1
    """Share of windows with an empty text."""

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
        self.require(not world or self.depth_model is None, "depth_model", "left out: the world has exact depth")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width or self.height


@dataclass(slots=True)
class ClipPool:
    """N encoded clips of T latent frames."""

    latents: dict[Modality, Tensor]
    """(N, C, T, h, w) float16 of each modality, not scaled."""
    corrupted: Tensor | None
    """(N, C, T, h, w) the RGB of clips with wrong colours."""
    poses: Tensor | None
    """(N, T, 3, 4) cameras on the CPU, each that of the last frame of its latent."""
    texts: Tensor
    """(N, T) int64 on the CPU: number of the text that is true from a latent frame on."""
    sights: Tensor | None = None
    """(N, T, P, 3, h, w) float32 of the P frames from each frame on, see `placed_clips`."""

    def __len__(self) -> int:
        return len(self.texts)

    def joint(self, rows: Tensor, device: torch.device) -> Tensor:
        """Return (B, M * C, T, h, w) of the clips with these numbers, which are on the CPU; not scaled."""
        return torch.cat([_picked(each, rows, device) for each in self.latents.values()], 1)

    def wrong(self, rows: Tensor, device: torch.device) -> Tensor | None:
        """Return (B, C, T, h, w), the corrupted RGB of them."""
        return None if self.corrupted is None else _picked(self.corrupted, rows, device)

    def seen(self, rows: Tensor, device: torch.device) -> Tensor | None:
        """Return (B, T, P, 3, h, w), the sights of them."""
        return None if self.sights is None else _picked(self.sights, rows, device)


@dataclass(slots=True)
class ClipBatch:
    """Some of the clips."""

    latents: Tensor
    """(B, M * C, T, h, w) of all modalities."""
    wrong: Tensor | None
    """(B, C, T, h, w) their corrupted RGB."""
    poses: Tensor | None
    """(B, T, 3, 4) cameras."""
    texts: list[int]
    """Numbers of what is said of them."""
    sights: Tensor | None = None
    """(B, T, P, 3, h, w), as of `ClipPool`."""

    def put(self, frames: Tensor, start: int) -> None:
        """Write frames (B, M * C, F, h, w) over those from a latent frame on, in memory of their own."""
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
    """Return the float16 latents of some clips by name, not scaled.

    Args:
        model: encodes them.
        names: modalities, and `corrupted` for RGB with wrong colours.
        rgb: (B, F, 3, H, W) in [0, 1].
        disparity: (B, F, H, W), where depth is wanted.
        flow: (B, F - 1, 2, H, W), where flow is.
        noise: on the CPU, says how the corrupted ones are.
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
            # As the autoencoder gives them, all as RGB, so that kept ones serve any scale.
            found[name] = model.encode(clip).to(torch.float16)
    return found


def in_parts(count: int, size: int) -> Iterator[slice]:
    """Yield slices of so many things, a few at a time."""
    for low in range(0, count, size):
        yield slice(low, min(low + size, count))
