"""Method `world_depth`: train `WorldDepthNet` on renders of the world and of rooms, both with exact disparity.

The losses are on values, gradients and changes in time. For rooms they ignore one scale and shift per clip, as in
MiDaS (arXiv:1907.01341). For the world, whose camera is known, they are on 1/Z itself, so that a network trained this
way shows a drift of depth in a long video.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postgen import world
from postgen.assets import EMBEDDED, model_folder
from postgen.errors import UserError
from postgen.families import Denoiser, denoiser_for
from postgen.metrics.disparity import disparity_errors
from postgen.training import Trainer, TrainingConfig, Weights
from postgen.world.scenes import FIRST_TRAINING_SEED, specs_of

from .depth_loss import affine_difference, difference_losses, known_difference, relative_loss
from .depth_net import WorldDepthNet
from .depth_rooms import rooms
from .depth_textures import make_textures
from .depth_views import photographed, seen

_POOL_FRAMES = 17
FARTHEST = 40.0
"""Largest depth in metres at which errors are evaluated. Beyond it a pixel of floor spans several metres."""


@dataclass(kw_only=True)
class WorldDepthConfig(TrainingConfig):
    """Configuration of the method.

    Raises:
        UserError: a value outside its range, or a missing folder.
    """

    sizes: list[int] = field(default_factory=lambda: [64, 96, 128, 160])
    """Heights and widths in pixels; each step draws one of them."""

    frames: int = 5
    """Number of consecutive frames of a sample."""

    pool_size: int = 128
    """Height and width at which scenes and rooms are rendered."""

    pool_clips: int = 2048
    """Number of world scenes that are rendered and kept on the device (1.4 MB of 17 frames at 128 px)."""

    room_clips: int = 4096
    """Number of rooms that are rendered and kept on the device (0.4 MB of 5 frames at 128 px)."""

    per_device_train_batch_size: int = 8
    """Samples per step and process, world scenes and rooms together."""

    room_share: float = 0.5
    """Share of the samples that are rooms."""

    textures: int = 64
    """Number of patterns for the surfaces of rooms, and number of cuts from `photos`."""

    photos: str | None = None
    """Folder of pictures for the surfaces of rooms; None: patterns only."""

    pipeline: str | None = None
    """Folder of a diffusers pipeline of the world, or `embedded`. Its autoencoder reconstructs some of the renders, so
    that the network sees decoder artefacts. None: no reconstructions."""

    reconstructions: int = 1024
    """Number of scenes of the pool that are also reconstructed by that autoencoder."""

    outline_weight: float = 0.5
    """Weight of the loss on gradients."""

    steady_weight: float = 0.5
    """Weight of the loss on changes between consecutive frames."""

    relative_weight: float = 0.5
    """Weight of the relative loss on 1/Z, on world scenes only, for distant objects."""

    eval_clips: int = 64
    """Number of unseen scenes with held-out combinations, for the evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.sizes) and min(self.sizes) >= 32, "sizes", "a list of numbers of at least 32")
        self.require(1 <= self.frames <= _POOL_FRAMES, "frames", f"in 1..{_POOL_FRAMES}")
        self.require(self.pool_size >= 32, "pool_size", "at least 32")
        for name in ("pool_clips", "room_clips", "textures", "eval_clips"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(0 <= self.room_share <= 1, "room_share", "in 0..1")
        self.require(self.reconstructions >= 0, "reconstructions", "at least 0")
        for name in ("outline_weight", "steady_weight", "relative_weight"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        both, batch = 0 < self.room_share < 1, self.per_device_train_batch_size
        said = f"0, 1, or a share with which {batch} samples include both rooms and scenes"
        self.require(not both or 0 < self.in_rooms < batch, "room_share", said)
        self.require(self.photos is None or Path(self.photos).is_dir(), "photos", "a folder")
        if self.pipeline is not None:
            self.require(model_folder(self.pipeline).is_dir(), "pipeline", f"a folder, or {EMBEDDED}")

    @property
    def in_rooms(self) -> int:
        """Number of rooms in a micro-batch."""
        return round(self.per_device_train_batch_size * self.room_share)


@dataclass(slots=True)
class Takes:
    """Clips (B,F,3,H,W) uint8 and their disparity (B,F,H,W) float16 in 1/m, 0 where there is no surface."""

    rgb: Tensor
    disparity: Tensor


class WorldDepthTrainer(Trainer[WorldDepthConfig]):
    """Trains the network, and exports a folder that `WorldDepth` loads."""

    config_class: ClassVar[type[TrainingConfig]] = WorldDepthConfig

    def build(self) -> Mapping[str, nn.Module]:
        """Return a network with random weights. Also render the scenes and rooms.

        Raises:
            UserError: `pipeline` is not the folder of a diffusers pipeline.
        """
        args = self.args
        if args.pipeline is not None and not (model_folder(args.pipeline) / "model_index.json").is_file():
            raise UserError(
                f"pipeline {args.pipeline} is not the folder of a diffusers pipeline: model_index.json is missing"
            )
        own = self.accelerator.process_index
        specs = specs_of(FIRST_TRAINING_SEED + own * 10_000_000, args.pool_clips, _POOL_FRAMES)
        self.scenes = render_scenes(specs, args.pool_size, self.device)
        generator = torch.Generator().manual_seed(args.seed * 1000 + own)
        textures = make_textures(args.textures, args.photos, generator).to(self.device)
        self.rooms = Takes(*rooms(args.room_clips, args.frames, args.pool_size, textures, generator, self.device))
        self.softened = self._softened()
        self.unseen = render_scenes(specs_of(0, args.eval_clips, _POOL_FRAMES, "held_out"), 96, self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # return the temporary memory of rendering to other processes on the GPU
        return {"net": WorldDepthNet()}

    def _softened(self) -> Tensor | None:
        """Reconstruct the first clips of the pool with the autoencoder of the pipeline, uint8; None: not requested."""
        args = self.args
        if args.pipeline is None or not args.reconstructions:
            return None
        from diffusers import DiffusionPipeline

        denoiser = denoiser_for(DiffusionPipeline.from_pretrained(model_folder(args.pipeline)).to(self.device))
        parts = self.scenes.rgb[: args.reconstructions].split(16)
        return torch.cat([reconstructed(denoiser, part) for part in parts])

    def training_step(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss on some scenes and some rooms at one size; the metrics are the parts of the loss."""
        args, size = self.args, random.choice(self.args.sizes)
        count = args.per_device_train_batch_size - args.in_rooms
        drawn = ((self._of_world, count), (self._of_rooms, args.in_rooms))
        parts = [draw(each, size) for draw, each in drawn if each]
        rgb, true = (torch.cat(column) for column in zip(*parts, strict=True))
        with self.accelerator.autocast():
            estimate = self.models["net"](rgb)
        # Rooms have a free scale. World scenes have the known scale, which keeps the scale of the network fixed.
        known = known_difference(estimate[:count], true[:count])
        value, outline, steady = difference_losses(
            torch.cat((known, affine_difference(estimate[count:], true[count:])))
        )
        relative = relative_loss(estimate[:count], true[:count])
        loss = value + args.outline_weight * outline + args.steady_weight * steady + args.relative_weight * relative
        return loss, {"value": value, "outline": outline, "steady": steady, "relative": relative}

    def _rows(self, takes: Tensor, count: int) -> Tensor:
        return torch.randint(len(takes), (count,), generator=self.generator, device=self.device)

    def _of_world(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Draw consecutive frames of scenes. A third of the scenes with a reconstruction use the reconstruction."""
        rows = self._rows(self.scenes.rgb, count)
        start = random.randrange(_POOL_FRAMES - self.args.frames + 1)
        window = slice(start, start + self.args.frames)
        rgb = self.scenes.rgb[rows, window]
        if self.softened is not None:
            soft = torch.rand(count, generator=self.generator, device=self.device) < 1 / 3
            soft = (soft & (rows < len(self.softened))).view(-1, 1, 1, 1, 1)
            rgb = torch.where(soft, self.softened[rows.clamp_max(len(self.softened) - 1), window], rgb)
        pictures, disparity = seen(rgb, self.scenes.disparity[rows, window], size, self.generator)
        return photographed(pictures, 0.5, self.generator), disparity

    def _of_rooms(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        rows = self._rows(self.rooms.rgb, count)
        pictures, disparity = seen(self.rooms.rgb[rows], self.rooms.disparity[rows], size, self.generator)
        return photographed(pictures, 0.8, self.generator), disparity

    def evaluate(self) -> dict[str, float]:
        """Return errors on unseen scenes at 96 px, see `postgen.metrics.disparity`."""
        net: Any = self.unwrap("net")
        found = []
        for rgb, disparity in zip(self.unseen.rgb, self.unseen.disparity.float(), strict=True):
            estimate = net(rgb[None].float() / 255)[0]
            found.append(disparity_errors(estimate, disparity, disparity > 1 / FARTHEST))
        names = ("abs_rel", "within_125", "rank", "flicker")
        return {name: sum(getattr(errors, name) for errors in found) / len(found) for name in names}

    def export(self, folder: Path, weights: Weights) -> None:
        """Write a diffusers folder in half precision."""
        net: Any = copy.deepcopy(self.unwrap("net"))
        net.half().save_pretrained(folder)


def render_scenes(specs: Sequence[world.Spec], size: int, device: torch.device | str) -> Takes:
    """Render all planned frames of scenes, with disparity."""
    step = 64 if torch.device(device).type == "cpu" else 512
    rgb, disparity = [], []
    for low in range(0, len(specs), step):
        frames = world.render(specs[low : low + step], size=size, device=device)
        assert frames.depth_BFHW is not None
        rgb.append((frames.rgb_BF3HW * 255).round().to(torch.uint8))
        disparity.append((1 / frames.depth_BFHW).half())
    return Takes(torch.cat(rgb), torch.cat(disparity))


@torch.no_grad()
def reconstructed(denoiser: Denoiser, clips_BF3HW: Tensor) -> Tensor:
    """Encode and decode clips (uint8) with the autoencoder of a denoiser's pipeline; returns uint8."""
    clips = denoiser.decode(denoiser.encode_video(clips_BF3HW.float() / 255))
    return (clips * 255).round().to(clips_BF3HW)
