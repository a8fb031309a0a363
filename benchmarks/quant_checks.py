"""Exact properties of quantisation for `benchmarks.quant`: reference numbers, folds, round trip through files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quant_arms import FORMATS
from benchmarks.quant_vectors import EXPECTED, wrong
from postgen.errors import UserError
from postgen.quant import QuantSpec
from postgen.quant.model import quantize_weights

ROUND_TRIPS = ("w8a8", "f8a8", "w4a8", "w4a4", "w2", "bp2", "mxfp4", "nvint4_rotated")
"""Formats of the round trip: every kind of stored numbers and scales."""
DTYPES = (torch.float32, torch.bfloat16)


def checks(transformer: nn.Module, folder: Path) -> dict[str, Any]:
    """Return the results of all checks.

    Args:
        transformer: the exact transformer.
        folder: folder for files of the round trip, which is removed at the end.
    """
    folds = dict(fold_errors())
    trips = {
        f"{name}, {str(dtype).removeprefix('torch.')}": round_trip(transformer, name, dtype, folder)
        for name, dtype in _trips()
    }
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "vectors": len(EXPECTED),
        "wrong_vectors": wrong(),
        "folds": folds,
        "let_identity": max(folds.values()),
        "round_trips": trips,
        "roundtrip_bitwise": int(all(trips.values())),
    }


def fold_errors() -> Iterator[tuple[str, float]]:
    """Yield each tiny model whose blocks have folds, and the relative error of its output after random folds."""
    from tests.families.tiny_models import BLOCK_BUILDERS, BUILDERS, tiny_model
    from tests.quant.test_let import error, folded, points_of

    for name in {**BUILDERS, **BLOCK_BUILDERS}:
        tiny = tiny_model(name)
        try:
            points = points_of(tiny.transformer)
        except UserError:  # a class without rows
            continue
        expected = tiny()
        tiny.transformer = folded(tiny.transformer, points)
        yield name, error(tiny(), expected)


def _trips() -> Iterator[tuple[str, torch.dtype]]:
    for dtype in DTYPES:
        for name in ROUND_TRIPS:
            yield name, dtype


@torch.no_grad()
def round_trip(transformer: nn.Module, name: str, dtype: torch.dtype, folder: Path) -> bool:
    """Return whether a quantised model has the same bits, and the same output, after it was saved and loaded."""
    stock: Any = transformer
    device = next(transformer.parameters()).device
    # A model in bfloat16 has layers that stay in float32, which only diffusers' loader knows.
    stock.save_pretrained(folder / "exact")
    model = type(stock).from_pretrained(folder / "exact", torch_dtype=dtype).to(device)
    quantize_weights(model, QuantSpec(**FORMATS[name]))
    model.save_pretrained(folder / name)
    again = type(stock).from_pretrained(folder / name, torch_dtype=dtype).to(device)
    before, after = model.state_dict(), again.state_dict()
    same = before.keys() == after.keys() and all(_equal(before[key], after[key]) for key in before)
    return bool(same and _equal(_output(model, dtype), _output(again, dtype)))


def _equal(one: Tensor, other: Tensor) -> bool:
    kinds = one.dtype == other.dtype and one.shape == other.shape
    return kinds and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _output(model: Any, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    config, device = model.config, next(model.parameters()).device
    latents = torch.randn(1, config.in_channels, 3, 8, 8, generator=draw).to(device, dtype)
    text = torch.randn(1, 16, config.text_dim, generator=draw).to(device, dtype)
    (found,) = model(latents, torch.tensor([500.0], device=device), text, return_dict=False)
    return found if isinstance(found, Tensor) else found[0]
