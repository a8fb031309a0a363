"""Captions of a data set: how densely they lie, weights against crowding, and overlap with prompts of other uses."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from postgen.errors import UserError

if TYPE_CHECKING:
    from postgen.families import Condition

CaptionEmbed = Callable[[Sequence[str]], Tensor]
"""Texts -> embeddings (N, D) of length 1, float32 on the CPU."""

_SIZE = 512
_BLOCK = 1024
_BATCH = 16


def plain(text: str) -> str:
    """Return a text without case, punctuation and repeated white space.

    >>> plain("A  red ball, rolling.")
    'a red ball rolling'
    """
    return " ".join(re.findall(r"\w+", text.casefold()))


def ngram_embeddings(texts: Sequence[str]) -> Tensor:
    """Return embeddings (N, 512) of length 1 from hashed words and pairs of words; no weights are needed.

    Texts with the same words in the same order are equal. Other words for the same thing are far apart; an embedder of
    a text encoder (`pipeline_embedder`) knows them. An empty text has the embedding 0.
    """
    found = np.zeros((len(texts), _SIZE), np.float32)
    for row, text in enumerate(texts):
        words = plain(text).split()
        codes = [zlib.crc32(feature.encode()) for feature in (*words, *map(" ".join, pairwise(words)))]
        for code in codes:
            found[row, code % _SIZE] += 1 if code & 2**31 else -1
    counts = torch.from_numpy(found)
    return normalize(counts.sign() * counts.abs().log1p(), dim=1)


def pipeline_embedder(model: str, device: str = "auto") -> CaptionEmbed:
    """Return an embedder with the text encoder of a pipeline: the mean of the embeddings of the tokens.

    The mean of all given texts is subtracted, because the embeddings of a text encoder share a large common part.

    Args:
        model: name, Hub id or folder of the model, as for `postgen generate`. The whole pipeline is loaded.
        device: device of the pipeline.

    Raises:
        UserError: the model cannot be loaded, or there is no denoiser for it.
    """
    from postgen.families import denoiser_for
    from postgen.families.loading import inspect_model, load_pipeline

    denoiser = denoiser_for(load_pipeline(inspect_model(model), device=device))

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        parts = [
            _pooled(denoiser.encode_prompt(list(texts[start : start + _BATCH]), guidance=False))
            for start in range(0, len(texts), _BATCH)
        ]
        found = torch.cat(parts)
        return normalize(found - found.mean(0) if len(found) > 1 else found, dim=1)

    return embed


def _pooled(condition: Condition) -> Tensor:
    """Return the mean over the tokens of the largest part of an encoded prompt (B, D); tokens of zeros are padding."""
    parts = [part for name, part in condition.items() if part.is_floating_point() and name != "negative"]
    states: Tensor = max(parts, key=lambda part: part[0].numel()).float().cpu()
    if states.dim() == 2:
        return states
    states = states.flatten(2)
    used = (states != 0).any(-1, keepdim=True).float()
    return (states * used).sum(1) / used.sum(1).clamp_min(1)


def densities(embeddings: Tensor, width: float = 0.3, device: str = "cpu") -> Tensor:
    """Return how densely the embeddings lie around each one, (N,): the sum of exp(-d^2 / (2 width^2)).

    A caption that occurs n times, far from all others, has the density n. The sum is exact; its time grows with N^2.

    Args:
        embeddings: (N, D) of length 1.
        width: width of the Gaussian, as a distance of unit vectors.
        device: device of the computation; the result is on the CPU.
    """
    vectors = embeddings.to(device)
    parts = [
        torch.exp((block @ vectors.T - 1).clamp(max=0) / width**2).sum(1).cpu() for block in vectors.split(_BLOCK)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def density_weights(
    embeddings: Tensor, *, power: float = 1.0, width: float = 0.3, cap: float = 10.0, device: str = "cpu"
) -> Tensor:
    """Return weights for sampling that counteract crowded captions, (N,), with the mean 1.

    Args:
        embeddings: (N, D) of length 1.
        power: weight = density ** -power; 0 gives equal weights, 1 gives each group of equal captions the same share.
        width: see `densities`.
        cap: largest ratio of two weights; smaller weights are raised.
        device: see `densities`.
    """
    if not len(embeddings):
        return torch.zeros(0)
    weights = densities(embeddings, width, device) ** -power
    weights = weights.clamp_min(float(weights.max()) / cap)
    return weights / weights.mean()


@dataclass(frozen=True, slots=True)
class Overlap:
    """A caption that is too near to a prompt."""

    caption: int
    """Number of the caption."""
    prompt: int
    """Number of the nearest prompt."""
    distance: float
    """Cosine distance; 0 for the same text apart from case, punctuation and white space."""


def overlaps(
    captions: Sequence[str], prompts: Sequence[str], *, distance: float = 0.1, embed: CaptionEmbed = ngram_embeddings
) -> list[Overlap]:
    """Return the captions that equal a prompt, or lie within a cosine distance of one; the nearest prompt of each.

    Training on the prompts that RL or a test uses makes their scores say little about other prompts.

    Args:
        captions: captions of the fine-tuning.
        prompts: prompts that must stay apart from them.
        distance: largest cosine distance of an overlap.
        embed: embedder of both.

    Raises:
        UserError: the embedder returned a wrong number of vectors.
    """
    if not captions or not prompts:
        return []
    known = {plain(prompt): place for place, prompt in reversed(list(enumerate(prompts)))}
    vectors = embed([*captions, *prompts])  # together, so that an embedder may centre them
    if len(vectors) != len(captions) + len(prompts):
        raise UserError(f"the embedder returned {len(vectors)} vectors for {len(captions) + len(prompts)} texts")
    own, others = vectors[: len(captions)], vectors[len(captions) :]
    found = []
    for start in range(0, len(captions), _BLOCK):
        best, near = (own[start : start + _BLOCK] @ others.T).max(1)
        for row, (value, place) in enumerate(zip(best.tolist(), near.tolist(), strict=True), start):
            same = known.get(plain(captions[row]))
            if same is not None:
                found.append(Overlap(row, same, 0.0))
            elif 1 - value <= distance:
                found.append(Overlap(row, place, max(0.0, 1 - value)))
    return found
