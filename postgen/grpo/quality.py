"""Numbers of clips that move when a reward is hacked: brightness, sharpness, motion, diversity of latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_statistics(clip: Tensor) -> dict[str, float]:
    """Return statistics of a clip (F,3,H,W) in [0,1].

    `brightness` is the mean; `sharpness` the rms of the discrete Laplacian, which grids and noise raise and blur
    lowers; `motion` the mean absolute difference of neighbouring frames, 0 for a picture and for a frozen clip.
    """
    centre, edges = clip[..., 1:-1, 1:-1], [clip[..., :-2, 1:-1], clip[..., 2:, 1:-1]]
    edges += [clip[..., 1:-1, :-2], clip[..., 1:-1, 2:]]
    laplacian = sum(edges) - 4 * centre
    return {
        "brightness": clip.mean().item(),
        "sharpness": laplacian.square().mean().sqrt().item() if laplacian.numel() else 0.0,
        "motion": (clip[1:] - clip[:-1]).abs().mean().item() if len(clip) > 1 else 0.0,
    }


def diversity(latents: Tensor, prompts: Sequence[int]) -> float:
    """Return how diverse samples are: the mean rms distance of two latents (N, ...) of one prompt.

    Args:
        latents: the samples.
        prompts: number of each sample's prompt; those that occur once are left out.
    """
    flat, owner = latents.flatten(1).float(), torch.tensor(prompts)
    means = []
    for prompt in dict.fromkeys(prompts):
        group = flat[(owner == prompt).to(flat.device)]
        if len(group) > 1:
            total = torch.cdist(group, group).sum() / flat.shape[1] ** 0.5
            means.append(total / (len(group) * (len(group) - 1)))
    return float(torch.stack(means).mean()) if means else 0.0
