"""Encoded clips of all modalities that windows are cut from: of the world, or a user's with depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from postgen.errors import UserError, shown
from postgen.sampling.conditions import Row
from postgen.settings import Part
from postgen.tensor_files import read_tensors
from postgen.training.prompts import Prompts
from postgen.training.transfer import to_device
from postgen.video import read_video

from .corruption import corrupted
from .depth import DisparityRange, flow_picture
from .depth_sources import DepthSource, TransformersDepth
from .levels import Modality
from .model import WorldWeaverModel
from .texts import Texts

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
    """Folder where encoded scenes are kept, for other runs with the same ones; none keeps them in memory only."""

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
        for name in ("start_caption", "caption_dropout"):
            self.require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        world = self.train_dataset is None
        self.require(not world or self.depth_model is None, "depth_model", "left out: the world has exact depth")
        self.require(world or self.pool_dir is None, "pool_dir", "left out with train_dataset")

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


def video_pool(
    config: ClipsConfig,
    source: str | Sequence[Mapping[str, Any]],
    name: str,
    model: WorldWeaverModel,
    texts: Texts,
    *,
    wrong: bool,
    bf16: bool = False,
    depth_source: DepthSource | None = None,
) -> ClipPool:
    """Read and encode a user's videos; they are kept on the CPU.

    Args:
        config: their length and size, and the depth estimator.
        source: rows, or where they are.
        name: what messages call them.
        model: encodes them, and says which modalities there are.
        texts: get the prompts.
        wrong: whether corrupted ones are wanted.
        bf16: encode in bfloat16.
        depth_source: instead of `config.depth_model`.

    Raises:
        UserError: a row without video, one that is too short, or depth that is nowhere; a model of flow.
    """
    if "flow" in model.modalities:
        raise UserError(f"{name}: videos have no optical flow here, only the world has: leave flow out of aux")
    rows = Prompts(source, name, seed=0, shuffle=False).rows
    wants = "depth" in model.modalities
    bare = any(row.get("depth") is None for row in rows)
    if wants and bare and depth_source is None and config.depth_model is not None:
        depth_source = TransformersDepth(config.depth_model, device=model.transformer.device)
    names, noise = [*model.modalities, *([CORRUPTED] if wrong else [])], torch.Generator().manual_seed(0)
    made: list[dict[str, Tensor]] = []
    for number, row in enumerate(rows):
        where = f"row {number} of {name}"
        rgb = _clip(row, config, where)
        disparity = _disparity(row, rgb, depth_source, where)[None] if wants else None
        found = encoded(model, names, rgb[None], disparity, None, noise, bf16=bf16)
        made.append({key: value.cpu() for key, value in found.items()})
    texts.add(row["prompt"] for row in rows)
    latents = {name: torch.cat([one[name] for one in made]) for name in names}
    frames = latents["rgb"].shape[2]
    told = torch.tensor([texts.numbers[row["prompt"]] for row in rows])[:, None].expand(-1, frames)
    return ClipPool({name: latents[name] for name in model.modalities}, latents.get(CORRUPTED), None, told)


def _clip(row: Row, config: ClipsConfig, where: str) -> Tensor:
    """Return (F, 3, H, W) of a row."""
    path = row.get("video")
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: video is {shown(path)}, it must name a file or a folder of frames")
    return _sized(_cut(read_video(path, count=config.num_frames), config.num_frames, f"{where}: {path}"), config)


def _disparity(row: Row, rgb: Tensor, source: DepthSource | None, where: str) -> Tensor:
    """Return (F, H, W) of a row: what it names, else what the estimator says."""
    path = row.get("depth")
    if path is None:
        if source is None:
            raise UserError(f"{where} has no depth: give a column depth, or depth_model")
        return _finite(source(rgb.movedim(1, -1)), f"{where}: the depth that was estimated")
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: depth is {shown(path)}, it must name a file or a folder of pictures")
    if Path(path).suffix == ".safetensors":
        tensors = read_tensors(Path(path), f"{where}: depth {path} cannot be read")
        if "disparity" not in tensors or tensors["disparity"].dim() != 3 or not tensors["disparity"].numel():
            raise UserError(f"{where}: {path} has no tensor disparity (frames, height, width)")
        stored = tensors["disparity"].float()
    else:
        stored = read_video(path, count=len(rgb)).mean(1)
    stored = _finite(_cut(stored, len(rgb), f"{where}: {path}"), f"{where}: {path}")[:, None]
    return interpolate(stored, rgb.shape[-2:], mode="bilinear", antialias=True)[:, 0]


def _finite(disparity: Tensor, where: str) -> Tensor:
    if not bool(disparity.isfinite().all()):
        raise UserError(f"{where} has values that are not finite: disparity is 1 / depth, 0 where there is no depth")
    return disparity


def _cut(frames: Tensor, count: int, where: str) -> Tensor:
    if len(frames) < count:
        raise UserError(f"{where} has {len(frames)} frames, num_frames is {count}: take longer videos or less frames")
    return frames[:count]


def _sized(frames: Tensor, config: ClipsConfig) -> Tensor:
    if tuple(frames.shape[-2:]) == config.size:
        return frames
    return interpolate(frames, config.size, mode="bicubic", antialias=True).clamp(0, 1)


def in_parts(count: int, size: int) -> Iterator[slice]:
    """Yield slices of so many things, a few at a time."""
    for low in range(0, count, size):
        yield slice(low, min(low + size, count))
