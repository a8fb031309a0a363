"""Short digests that identify the inputs of earlier work: settings, prompts, weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

_VALUES = 64
"""Values per tensor in the digest of a model. Reading all values of a large model would take minutes."""


def digest(value: Any) -> str:
    """Return a short digest of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(module: nn.Module) -> str:
    """Return a short digest of a model's weights: names, shapes, dtypes, and evenly spaced values of each tensor."""
    said = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            said.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            said.update(_sampled(tensor))
    return said.hexdigest()[:16]


@torch.no_grad()
def _sampled(tensor: Tensor) -> bytes:
    if tensor.device.type == "meta" or not tensor.numel():  # values of offloaded tensors are not available
        return b""
    places = torch.linspace(0, tensor.numel() - 1, min(_VALUES, tensor.numel()), dtype=torch.float64).long()
    values = tensor.reshape(-1)[places.to(tensor.device)].cpu().contiguous()
    return bytes(values.view(torch.uint8).tolist())
