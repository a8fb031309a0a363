"""Statistics of clips that reveal reward hacking: brightness, sharpness, motion, diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from postgen.metrics.video_measures import frame_change


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
        "motion": frame_change(clip),
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


def appearance(clip: Tensor) -> dict[str, Tensor]:
    """Return what a clip (F, 3, H, W) looks like as a whole, on the CPU, to compare clips of different prompts.

    `background` is the median of each colour over all pixels and frames, (3,): in most clips the colour of the ground,
    whatever moves on it. `picture` is the mean picture, reduced to 8 x 8 pixels, (192,).
    """
    pixels = clip.float().transpose(0, 1).flatten(1).contiguous()  # torch's median is wrong for expanded tensors
    picture = functional.adaptive_avg_pool2d(clip.float().mean(0), 8)
    return {"background": pixels.median(1).values.cpu(), "picture": picture.flatten().cpu()}


def diversity_of_prompts(appearances: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return how much the clips of different prompts differ: the mean rms distance of two, from 0 to 1.

    There is one value for each part of `appearance`. A policy that gives every clip the same ground lowers the
    diversity of backgrounds. It depends on the prompts, so compare it with the value before training.

    Args:
        appearances: of one clip for each of at least 2 prompts.
    """
    found = {}
    for name in appearances[0]:
        rows = torch.stack([each[name] for each in appearances]).double()
        total = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum() / rows.shape[1] ** 0.5
        found[name] = float(total / (len(rows) * (len(rows) - 1)))
    return found
