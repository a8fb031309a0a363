"""Statistics of clips that reveal reward hacking: brightness, sharpness, motion, diversity of latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_statistics(clip: Tensor) -> dict[str, float]:
    """Return brightness, sharpness and motion of a clip (F, 3, H, W) in [0, 1].

    `brightness` is the mean value. `sharpness` is the rms of the discrete Laplacian: grid artefacts and noise raise
    it, blur lowers it. `motion` is the mean absolute difference of neighbouring frames, 0 for a picture or a frozen
    clip.
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
    """Return the diversity of samples: the mean rms distance between the latents of two samples of one prompt.

    Args:
        latents: (N, ...) latents of the samples.
        prompts: prompt number of each of the N samples. Prompts with a single sample are left out.

    Returns:
        The diversity; 0 if no prompt has two samples.
    """
    flat, owner = latents.flatten(1).float(), torch.tensor(prompts)
    means = []
    for prompt in dict.fromkeys(prompts):
        group = flat[(owner == prompt).to(flat.device)]
        if len(group) > 1:
            total = torch.cdist(group, group).sum() / flat.shape[1] ** 0.5
            means.append(total / (len(group) * (len(group) - 1)))
    return float(torch.stack(means).mean()) if means else 0.0
