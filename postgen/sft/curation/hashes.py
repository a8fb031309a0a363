"""Fingerprints of a clip for the search for duplicates: a perceptual hash, and embeddings of its frames."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from postgen.metrics.colour import luma

HASHED_FRAMES = 4
"""Number of frames of a clip, spread evenly over it, that the hash and the embeddings describe."""
_SIDE, _LOW = 32, 8
_THUMB = 8

Embed = Callable[[Tensor], Tensor]
"""Frames (F, 3, H, W) in [0, 1] -> embedding (D,) of length 1."""


def spread(frames: Tensor) -> Tensor:
    """Return `HASHED_FRAMES` frames spread evenly over a clip; frames of a shorter clip are repeated."""
    return frames[torch.linspace(0, len(frames) - 1, HASHED_FRAMES).round().long()]


def perceptual_hash(frames: Tensor) -> Tensor:
    """Return the perceptual hash of a clip, bool (256,): pHash of four frames, 64 bits each.

    A bit tells whether a low frequency of the cosine transform of the 32 x 32 luma is above the median of a frame. It
    survives other sizes, codecs, brightness and contrast. It changes with crops, mirroring, borders and another start.
    """
    small = adaptive_avg_pool2d(luma(spread(frames))[:, None], _SIDE)[:, 0].double()
    basis = _cosines().to(small.device)
    low = (basis @ small @ basis.T).flatten(1)[:, 1 : 1 + _LOW * _LOW]
    return (low > low.median(dim=1, keepdim=True).values).flatten()


@functools.lru_cache(maxsize=1)
def _cosines() -> Tensor:
    # One row and column more than needed: without the constant term 64 frequencies are left.
    k = torch.arange(_LOW + 1, dtype=torch.float64)[:, None]
    x = torch.arange(_SIDE, dtype=torch.float64)[None]
    return torch.cos(math.pi * k * (2 * x + 1) / (2 * _SIDE))


def thumbnail_embedding(frames: Tensor) -> Tensor:
    """Return an embedding without weights, (768,) of length 1: four 8 x 8 thumbnails in colour, without their mean."""
    thumbs = adaptive_avg_pool2d(spread(frames).float(), _THUMB)
    centred = thumbs - thumbs.mean()
    return normalize(centred.flatten(), dim=0)


def clip_embedder(model: str | None, device: str) -> Embed:
    """Return an embedder with a CLIP model: the mean of the embeddings of four frames.

    Args:
        model: Hub id or folder; None: the model of the reward `clip_score`.
        device: device of the model.

    Raises:
        UserError: the model cannot be found.
    """
    from postgen.rewards.clip_score import ClipScore

    clip = ClipScore(model, device=device)
    clip.load()

    @torch.no_grad()
    def embed(frames: Tensor) -> Tensor:
        return normalize(clip.image_features(spread(frames).to(device)).mean(0), dim=0).cpu()

    return embed


def embedder(kind: str, model: str | None = None, device: str = "cpu") -> Embed | None:
    """Return the embedder of a name of `EMBEDDINGS`; None for "none"."""
    if kind == "clip":
        return clip_embedder(model, device)
    return thumbnail_embedding if kind == "thumbnail" else None


def packed(bits: Tensor) -> str:
    """Return bits as hexadecimal text, for a JSON file."""
    return bytes(np.packbits(bits.cpu().numpy())).hex()


def signs(text: str) -> Tensor:
    """Return the bits of `packed` as a vector of length 1 with entries of equal size.

    The share of different bits of two hashes is (1 - their product) / 2, so one search serves hashes and embeddings.
    """
    bits = torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(np.float32))
    return (bits * 2 - 1) / math.sqrt(len(bits))


def written(embedding: Tensor) -> str:
    """Return an embedding as text for a JSON file: float16, base64."""
    return base64.b64encode(embedding.half().cpu().numpy().tobytes()).decode()


def read_back(text: str) -> Tensor:
    """Return the embedding of `written`, float32 of length 1."""
    return normalize(torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float16).astype(np.float32)), dim=0)
