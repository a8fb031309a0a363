"""A tiny Wan transformer, its inputs, and saved copies of it, for tests of quantised models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny_wan import LATENT_CHANNELS, TEXT_DIM, wan_components


def wan(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Any:
    """Return a tiny Wan transformer, loaded in a dtype from a folder to which it is saved if one is given."""
    model: Any = wan_components(head_dim=16)["transformer"]
    if folder is None:
        return model
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, torch_dtype=dtype)


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the arguments of a forward pass."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, LATENT_CHANNELS, 2, 4, 4, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, TEXT_DIM, generator=generator).to(dtype),
    }


@torch.no_grad()
def predicted(model: Any) -> Tensor:
    """Return the prediction of a Wan transformer for `arguments`, in its dtype."""
    out: Tensor = model(**arguments(model.dtype), return_dict=False)[0]
    return out


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two models have the same tensors, bit by bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
