"""Lengths and angles of the changes that LoRAs make, from their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from postgen.families.lora_export import layers_of
from postgen.families.lora_file import open_lora
from postgen.families.lora_layers import Layer
from postgen.families.lora_sums import matrices

_ROUNDING = 1e-14
"""Squared distances below this share of the squared lengths are rounding errors."""


def gram_of(files: Sequence[Path]) -> Tensor | None:
    """Return the inner products of the changes of the weights by several LoRAs, (files, files), in float64.

    With s B A the change of a layer, the inner product of two changes is s s' sum(B^T B' * A A'^T), so that no dense
    change is built. Differences of biases are left out.

    Args:
        files: LoRA files that change the same layers.

    Returns:
        The inner products; None if a file has DoRA magnitudes, whose changes depend on the base.
    """
    every = [_layers(file) for file in files]
    if any(layer.magnitude is not None for layers in every for layer in layers.values()):
        return None
    gram = torch.zeros(len(files), len(files), dtype=torch.float64)
    for key in every[0]:
        pairs = [tuple(side.double() for side in matrices(layers[key], key[1])) for layers in every]
        for i, (up, down) in enumerate(pairs):
            for j, (other_up, other_down) in enumerate(pairs[: i + 1]):
                found = ((up.T @ other_up) * (down @ other_down.T)).sum()
                gram[i, j] += found
                if i != j:
                    gram[j, i] += found
    return gram


def distance(gram: Tensor, one: int, two: int) -> float:
    """Return the distance of two changes."""
    square = float(gram[one, one] + gram[two, two] - 2 * gram[one, two])
    return math.sqrt(square) if square > _ROUNDING * float(gram[one, one] + gram[two, two]) else 0.0


def turn(gram: Tensor, first: int) -> float | None:
    """Return the cosine of the step from change `first` to the next, and the step that follows; None without one."""
    a, b, c = first, first + 1, first + 2
    lengths = distance(gram, a, b) * distance(gram, b, c)
    if not lengths:
        return None
    dot = float(gram[b, c] - gram[b, b] - gram[a, c] + gram[a, b])
    return max(-1.0, min(1.0, dot / lengths))


def _layers(path: Path) -> dict[tuple[str, str], Layer]:
    parts = open_lora(path).parts("transformer")
    return {
        (component, name): layer
        for component, part in parts.items()
        if part.tensors
        for name, layer in layers_of(part).items()
    }
