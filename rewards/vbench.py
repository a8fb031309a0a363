"""Four dimensions of VBench (arXiv 2311.17982), its preprocessing and formulas on tensors instead of files.

Frames are rounded to 8 bits and resized without antialiasing, as VBench's are. A clip's score is the mean over its own
frames; the benchmark's is that over the frames of all clips.

Consistency and flicker are greatest for a frozen clip: as rewards they need company, `dynamic_degree` or
`motion_floor`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from postgen.rewards.base import Clip, RewardModel, promptless, streaming, unfit
from postgen.rewards.frames import FrameReward, in_windows, mean_over
from postgen.rewards.pictures import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    centre_crop,
    eight_bit,
    normalise,
    vbench_resize,
)
from postgen.rewards.weights import fill, find_file, pretrained, read_state

SUBJECT, BACKGROUND, FLICKER = (0.1462, 1.0), (0.2615, 1.0), (0.6293, 1.0)
"""Empirical least and greatest value of a dimension, to which VBench's total scales it."""
PASS = 64
"""Frames that go through CLIP L/14 at once, so that long clips need no more memory than short ones."""
AESTHETIC_HEAD = "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth"


def consistency(features_FD: Tensor) -> Tensor:
    """Return the mean over the frames from the second on of (cos with the frame before + cos with the first) / 2.

    Negative cosines count as 0.
    """
    x = normalize(features_FD, dim=-1)
    before = (x[1:] * x[:-1]).sum(-1).clamp(min=0)
    first = (x[1:] * x[:1]).sum(-1).clamp(min=0)
    return ((before + first) / 2).mean()


def scaled(value: float, limits: tuple[float, float]) -> float:
    """Return (value - least) / (greatest - least), what VBench's total is made of."""
    return (value - limits[0]) / (limits[1] - limits[0])


def clip_view(frames_F3HW: Tensor, side: int = 224) -> Tensor:
    """Return what VBench gives to CLIP: bicubic, centre square, CLIP's mean and deviation."""
    cropped = centre_crop(vbench_resize(frames_F3HW, side, "bicubic"), side, half_even=True)
    return normalise(cropped, CLIP_MEAN, CLIP_STD)


@streaming
@promptless
class Consistency(RewardModel):
    """Base of the two consistencies: a subclass says which features of the frames are compared.

    Args:
        model: Hub id or local folder.
        scale: give the value as VBench's total takes it, the empirical range stretched to [0,1].
        device, dtype: as `RewardModel`.
    """

    model: str
    limits: tuple[float, float]

    def __init__(self, model: str | None = None, scale: bool = False, **place: Any) -> None:
        super().__init__(**place)
        self.model, self.scale = model or type(self).model, scale

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the network."""
        return ((self.model, ""),)

    @abstractmethod
    def features(self, frames_F3HW: Tensor) -> Tensor:
        """Return one vector a frame."""

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[Clip], *, log_reasons: Any = None
    ) -> list[float | None]:
        """Score clips of any sizes; one of a single frame cannot be scored."""
        self.load()
        if log_reasons is not None:
            log_reasons([unfit(clip, 2) for clip in completions])
        scores: list[float | None] = []
        for clip in completions:
            if len(clip) < 2:
                scores.append(None)
                continue
            parts = [self.features(part.to(self.device, torch.float32)).float() for part in in_windows(clip)]
            value = float(consistency(torch.cat(parts)))
            scores.append(scaled(value, self.limits) if self.scale else value)
        return scores


class SubjectConsistency(Consistency):
    """How alike the subject stays, by DINO's ViT-B/16 on whole frames."""

    name = "vbench_subject"
    model = "facebook/dino-vitb16"
    limits = SUBJECT

    def build(self) -> nn.Module:
        """Read DINO.

        Raises:
            UserError: it cannot be found.
        """
        from transformers import ViTModel

        net = pretrained(ViTModel, self.model, add_pooling_layer=False)
        net.embeddings.interpolate_pos_encoding = dino_stretch(net.embeddings)
        whole: nn.Module = net
        return whole

    def features(self, frames_F3HW: Tensor) -> Tensor:
        """Return the class tokens; frames keep their shape, so the grid of positions is stretched."""
        pixels = normalise(vbench_resize(frames_F3HW, 224, "bilinear"), IMAGENET_MEAN, IMAGENET_STD).to(self.dtype)
        states: Tensor = self.net(pixels, interpolate_pos_encoding=True).last_hidden_state
        return states[:, 0]


def dino_stretch(embeddings: Any) -> Callable[[Tensor, int, int], Tensor]:
    """Return `interpolate_pos_encoding` of transformers' ViT with DINO's own sampling points."""

    def stretch(patches: Tensor, height: int, width: int) -> Tensor:
        size = embeddings.patch_size
        return dino_positions(embeddings.position_embeddings, height // size, width // size)

    return stretch


def dino_positions(positions_1PD: Tensor, rows: int, columns: int) -> Tensor:
    """Stretch the square grid of position vectors behind the first one, by DINO's scale factors.

    They are (rows + 0.1) / side, and the sampling points follow from them, not from the sizes: a small difference
    from `interpolate(size=...)`.
    """
    side = round((positions_1PD.shape[1] - 1) ** 0.5)
    if rows == columns == side:
        return positions_1PD
    grid = positions_1PD[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = interpolate(grid, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([positions_1PD[:, :1], grid.flatten(2).mT], 1)


class BackgroundConsistency(Consistency):
    """How alike the scene stays, by the image features of CLIP B/32 on the centre square."""

    name = "vbench_background"
    model = "openai/clip-vit-base-patch32"
    limits = BACKGROUND

    def build(self) -> nn.Module:
        """Read CLIP's image tower.

        Raises:
            UserError: it cannot be found.
        """
        from transformers import CLIPVisionModelWithProjection

        net: nn.Module = pretrained(CLIPVisionModelWithProjection, self.model)
        return net

    def features(self, frames_F3HW: Tensor) -> Tensor:
        """Return the image features."""
        features: Tensor = self.net(clip_view(frames_F3HW, self.net.config.image_size).to(self.dtype)).image_embeds
        return features


@streaming
@promptless
def temporal_flickering(
    prompts: Sequence[str], completions: Sequence[Clip], *, scale: bool = False, log_reasons: Any = None
) -> list[float | None]:
    """Score how little neighbouring frames differ: 1 - mean absolute difference of the 8-bit frames.

    Meant for scenes that stand still, for which it measures flicker. A clip of one frame cannot be scored.

    Args:
        prompts: unused.
        completions: clips of any sizes.
        scale: give the value as VBench's total takes it, the empirical range stretched to [0,1].
        log_reasons: gets why a clip has no score.
    """
    if log_reasons is not None:
        log_reasons([unfit(clip, 2) for clip in completions])
    scores: list[float | None] = []
    for clip in completions:
        value = 1 - mean_over(_changes(clip)) if len(clip) > 1 else None
        scores.append(scaled(value, FLICKER) if scale and value is not None else value)
    return scores


def _changes(clip: Clip) -> list[tuple[float, int]]:
    """Mean absolute difference of neighbouring frames in each window, and the number of their pairs."""
    levels = (eight_bit(part.float()) for part in in_windows(clip, overlap=1))
    return [(float((part[1:] - part[:-1]).abs().mean()), len(part) - 1) for part in levels]


@promptless
class AestheticQuality(FrameReward):
    """How beautiful frames are thought to be: LAION's single linear layer on CLIP L/14, divided by 10.

    Args:
        model: Hub id or local folder of CLIP L/14.
        head: https address, or local path, of the published layer (MIT).
        frames: how many frames are scored; VBench scores all.
        reduce, device, dtype: as `FrameReward`.
    """

    name = "vbench_aesthetic"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = AESTHETIC_HEAD,
        frames: int = 10**6,
        **options: Any,
    ) -> None:
        super().__init__(frames=frames, **options)
        self.model, self.head = model, head

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return CLIP and the layer."""
        return ((self.model, ""), (self.head, ""))

    def build(self) -> nn.Module:
        """Read CLIP's image tower and the layer.

        Raises:
            UserError: one of them cannot be found or does not fit.
        """
        from transformers import CLIPVisionModelWithProjection

        net = pretrained(CLIPVisionModelWithProjection, self.model)
        path = find_file(self.head)
        net.add_module("head", fill(nn.Linear(net.config.projection_dim, 1), read_state(path), path))
        whole: nn.Module = net
        return whole

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the layer's value of the unit image feature, divided by 10."""
        parts = frames_BK3HW.flatten(0, 1).split(PASS)
        return torch.cat([self._some(part) for part in parts]).view(frames_BK3HW.shape[:2])

    def _some(self, frames_F3HW: Tensor) -> Tensor:
        pixels = clip_view(frames_F3HW, self.net.config.image_size).to(self.dtype)
        scores: Tensor = self.net.head(normalize(self.net(pixels).image_embeds, dim=-1))
        return scores.float()[:, 0] / 10
