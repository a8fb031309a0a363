"""Four dimensions of VBench (arXiv 2311.17982), with its preprocessing and formulas on tensors instead of files.

As in VBench, frames are rounded to 8 bits and resized without antialiasing. The score of a clip is the mean over its
frames; the benchmark averages over the frames of all clips.

Consistency and flicker scores are highest for a frozen clip: combine these rewards with `dynamic_degree` or
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
"""Empirical minimum and maximum of each dimension, with which VBench normalises it for the total score."""
PASS = 64
"""Number of frames per forward pass of CLIP L/14, so that long clips need no more memory than short ones."""
AESTHETIC_HEAD = "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth"


def consistency(features_FD: Tensor) -> Tensor:
    """Return the mean over frames 2, 3, ... of (cosine with the previous frame + cosine with the first frame) / 2.

    Negative cosines count as 0.
    """
    x = normalize(features_FD, dim=-1)
    before = (x[1:] * x[:-1]).sum(-1).clamp(min=0)
    first = (x[1:] * x[:1]).sum(-1).clamp(min=0)
    return ((before + first) / 2).mean()


def scaled(value: float, limits: tuple[float, float]) -> float:
    """Return (value - minimum) / (maximum - minimum), the form that VBench's total score uses."""
    return (value - limits[0]) / (limits[1] - limits[0])


def clip_view(frames_F3HW: Tensor, side: int = 224) -> Tensor:
    """Preprocess frames as VBench does for CLIP: bicubic resize, centre crop, CLIP's mean and std."""
    cropped = centre_crop(vbench_resize(frames_F3HW, side, "bicubic"), side, half_even=True)
    return normalise(cropped, CLIP_MEAN, CLIP_STD)


@streaming
@promptless
class Consistency(RewardModel):
    """Base class of the two consistency rewards: a subclass defines the features that are compared.

    Args:
        model: Hub id or local folder.
        scale: normalise the score with the empirical range to [0,1], as VBench's total does.
        device, dtype: see `RewardModel`.
    """

    model: str
    limits: tuple[float, float]

    def __init__(self, model: str | None = None, scale: bool = False, **place: Any) -> None:
        super().__init__(**place)
        self.model, self.scale = model or type(self).model, scale

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the place of the network."""
        return ((self.model, ""),)

    @abstractmethod
    def features(self, frames_F3HW: Tensor) -> Tensor:
        """Return one feature vector per frame, (F,D)."""

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[Clip], *, log_reasons: Any = None
    ) -> list[float | None]:
        """Score clips of any size; a clip of a single frame gets None."""
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
    """Similarity of the subject across frames, by DINO's ViT-B/16 on whole frames."""

    name = "vbench_subject"
    model = "facebook/dino-vitb16"
    limits = SUBJECT

    def build(self) -> nn.Module:
        """Load DINO.

        Raises:
            UserError: the model cannot be found.
        """
        from transformers import ViTModel

        net = pretrained(ViTModel, self.model, add_pooling_layer=False)
        net.embeddings.interpolate_pos_encoding = dino_stretch(net.embeddings)
        whole: nn.Module = net
        return whole

    def features(self, frames_F3HW: Tensor) -> Tensor:
        """Return the class tokens; frames keep their aspect ratio, so the position embeddings are interpolated."""
        pixels = normalise(vbench_resize(frames_F3HW, 224, "bilinear"), IMAGENET_MEAN, IMAGENET_STD).to(self.dtype)
        states: Tensor = self.net(pixels, interpolate_pos_encoding=True).last_hidden_state
        return states[:, 0]


def dino_stretch(embeddings: Any) -> Callable[[Tensor, int, int], Tensor]:
    """Return a replacement of the ViT's `interpolate_pos_encoding` in transformers with DINO's sampling points."""

    def stretch(patches: Tensor, height: int, width: int) -> Tensor:
        size = embeddings.patch_size
        return dino_positions(embeddings.position_embeddings, height // size, width // size)

    return stretch


def dino_positions(positions_1PD: Tensor, rows: int, columns: int) -> Tensor:
    """Interpolate the square grid of position embeddings (all but the first, the class token) as DINO does.

    DINO passes the scale factor (rows + 0.1) / side, which determines the sampling points. The result differs slightly
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
    """Similarity of the scene across frames, by the image embeddings of CLIP B/32 on the centre crop."""

    name = "vbench_background"
    model = "openai/clip-vit-base-patch32"
    limits = BACKGROUND

    def build(self) -> nn.Module:
        """Load CLIP's image encoder.

        Raises:
            UserError: the model cannot be found.
        """
        from transformers import CLIPVisionModelWithProjection

        net: nn.Module = pretrained(CLIPVisionModelWithProjection, self.model)
        return net

    def features(self, frames_F3HW: Tensor) -> Tensor:
        """Return the image embeddings (F,D)."""
        features: Tensor = self.net(clip_view(frames_F3HW, self.net.config.image_size).to(self.dtype)).image_embeds
        return features


@streaming
@promptless
def temporal_flickering(
    prompts: Sequence[str], completions: Sequence[Clip], *, scale: bool = False, log_reasons: Any = None
) -> list[float | None]:
    """Score how little consecutive frames differ: 1 - mean absolute difference of the 8-bit frames.

    The score measures flicker and is meant for static scenes. A clip of one frame gets None.

    Args:
        prompts: unused.
        completions: clips of any size.
        scale: normalise the score with the empirical range to [0,1], as VBench's total does.
        log_reasons: receives the reasons of missing scores.
    """
    if log_reasons is not None:
        log_reasons([unfit(clip, 2) for clip in completions])
    scores: list[float | None] = []
    for clip in completions:
        value = 1 - mean_over(_changes(clip)) if len(clip) > 1 else None
        scores.append(scaled(value, FLICKER) if scale and value is not None else value)
    return scores


def _changes(clip: Clip) -> list[tuple[float, int]]:
    """Return the mean absolute difference of consecutive frames in each window, and the number of frame pairs."""
    levels = (eight_bit(part.float()) for part in in_windows(clip, overlap=1))
    return [(float((part[1:] - part[:-1]).abs().mean()), len(part) - 1) for part in levels]


@promptless
class AestheticQuality(FrameReward):
    """Predict how beautiful people find the frames: LAION's single linear layer on CLIP L/14, divided by 10.

    Args:
        model: Hub id or local folder of CLIP L/14.
        head: https address or local path of the published layer (MIT).
        frames: number of frames that are scored; VBench scores all.
        reduce, device, dtype: see `FrameReward`.
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
        """Return the places of CLIP and the layer."""
        return ((self.model, ""), (self.head, ""))

    def build(self) -> nn.Module:
        """Load CLIP's image encoder and the layer.

        Raises:
            UserError: a file cannot be found, or its weights do not fit.
        """
        from transformers import CLIPVisionModelWithProjection

        net = pretrained(CLIPVisionModelWithProjection, self.model)
        path = find_file(self.head)
        net.add_module("head", fill(nn.Linear(net.config.projection_dim, 1), read_state(path), path))
        whole: nn.Module = net
        return whole

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the layer's output for the normalised image embeddings, divided by 10, (B,K)."""
        parts = frames_BK3HW.flatten(0, 1).split(PASS)
        return torch.cat([self._some(part) for part in parts]).view(frames_BK3HW.shape[:2])

    def _some(self, frames_F3HW: Tensor) -> Tensor:
        pixels = clip_view(frames_F3HW, self.net.config.image_size).to(self.dtype)
        scores: Tensor = self.net.head(normalize(self.net(pixels).image_embeds, dim=-1))
        return scores.float()[:, 0] / 10
