"""Folders of tiny models with known tensors, as sources of merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "diffusion_pytorch_model.safetensors"
SHAPES = {"in.weight": (7, 5), "in.bias": (7,), "out.weight": (3, 7), "scale": ()}


def tensors(seed: int, dtype: torch.dtype = torch.float32, frozen: bool = False) -> dict[str, Tensor]:
    """Return random weights, and a whole number; with `frozen`, `out.weight` does not depend on the seed."""
    made = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=made).to(dtype) for name, shape in SHAPES.items()}
    if frozen:
        found["out.weight"] = torch.full(SHAPES["out.weight"], 1 / 3).to(dtype)
    return {**found, "number": torch.tensor([3, 4])}


def network(folder: Path, weights: dict[str, Tensor], **config: object) -> Path:
    """Write a network: its weights and config."""
    folder.mkdir(parents=True)
    save_file(weights, folder / FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": "Tiny", "width": 7, **config}))
    return folder


def networks(folder: Path, count: int, *, dtype: torch.dtype = torch.float32, frozen: bool = False) -> list[Path]:
    """Write networks with the seeds 0, 1, ..."""
    return [network(folder / f"n{seed}", tensors(seed, dtype, frozen)) for seed in range(count)]


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all files of a network."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def moved(model: Path, target: Path, seed: int) -> Path:
    """Copy a pipeline, and move the weights of its transformer a little."""
    shutil.copytree(model, target)
    file = target / "transformer" / FILE
    made = torch.Generator().manual_seed(seed)
    save_file(
        {name: value + 0.01 * torch.randn(value.shape, generator=made) for name, value in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    return target


def linked(model: Path, target: Path) -> Path:
    """Copy a folder by hard links, which take no room on the disk."""
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).hardlink_to(file)
    return target
