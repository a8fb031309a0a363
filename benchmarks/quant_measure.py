"""Calls of the exact model, the error of quantised models on them, and the numbers of a job for `benchmarks.quant`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from postgen.files import replacing
from postgen.quant.layers import quantized_layers
from postgen.quant.report import tensor_bytes
from postgen.tensor_files import opened

_SHARED = "encoder_hidden_states"
"""The argument that all steps of a prompt share; it is stored once."""


class Calls:
    """Records the arguments and outputs of a transformer inside a `with` block, on the CPU.

    Args:
        transformer: a transformer that a pipeline calls with keywords.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.tensors = transformer, dict[str, Tensor]()
        self.count = 0
        self._texts: list[Tensor] = []

    def __enter__(self) -> Self:
        self._hook = self.transformer.register_forward_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _keep(self, _: nn.Module, __: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        text = given[_SHARED]
        place = next((place for place, each in enumerate(self._texts) if each is text), len(self._texts))
        if place == len(self._texts):
            self._texts.append(text)
            self.tensors[f"text.{place}"] = text.detach().cpu()
        name = f"{self.count:05}"
        self.tensors[f"{name}.text"] = torch.tensor(place)
        for key in ("hidden_states", "timestep"):
            self.tensors[f"{name}.{key}"] = given[key].detach().cpu().clone()
        self.tensors[f"{name}.output"] = output[0].detach().cpu()
        self.count += 1

    def save(self, path: Path) -> None:
        """Write the calls to a safetensors file."""
        with replacing(path) as part:
            save_file({name: value.contiguous() for name, value in self.tensors.items()}, part)


def recorded(path: Path, device: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the arguments and the output of each call in a file of `Calls`."""
    with opened(path) as file:
        names = sorted({name.partition(".")[0] for name in file.keys()} - {"text"})  # noqa: SIM118
        for name in names:
            text = file.get_tensor(f"text.{int(file.get_tensor(f'{name}.text'))}")
            given = {key: file.get_tensor(f"{name}.{key}") for key in ("hidden_states", "timestep")}
            given = {key: value.to(device) for key, value in {**given, _SHARED: text}.items()}
            yield given, file.get_tensor(f"{name}.output").to(device)


@torch.no_grad()
def velocity_error(transformer: nn.Module, path: Path, device: str) -> dict[str, Any]:
    """Return the error of a transformer on the calls of the exact one: |v - v_exact| / |v_exact|, over all clips.

    Args:
        transformer: the quantised transformer.
        path: file of `Calls`.
        device: its device.

    Returns:
        The root mean square over calls as `velocity`, and for each timestep as `velocity_by_step`.
    """
    found: dict[float, list[float]] = {}
    for given, exact in recorded(path, device):
        (ours,) = transformer(**given, return_dict=False)
        share = (ours - exact).double().square().flatten(1).sum(1) / exact.double().square().flatten(1).sum(1)
        found.setdefault(round(float(given["timestep"].flatten()[0]), 2), []).extend(share.tolist())
    every = [value for values in found.values() for value in values]
    return {
        "velocity": _root_mean(every),
        "velocity_by_step": {str(step): round(_root_mean(values), 6) for step, values in sorted(found.items())},
    }


def _root_mean(squares: Sequence[float]) -> float:
    return float(torch.tensor(squares, dtype=torch.float64).mean().sqrt())


def sizes_of(transformer: nn.Module) -> dict[str, Any]:
    """Return stored bits per weight of the quantised layers, with scales, and the bytes of all tensors of a model."""
    layers = quantized_layers(transformer).values()
    bits = sum(8 * (tensor_bytes(layer) - (0 if layer.bias is None else layer.bias.nbytes)) for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    modes = sorted({layer.mode for layer in layers})
    return {"bits": bits / weights if weights else None, "bytes": tensor_bytes(transformer), "modes": modes}


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Write the numbers of a job; the file is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(row, allow_nan=False) + "\n", encoding="utf-8")


def small_picture(png: Path, target: Path) -> None:
    """Replace a PNG by a small WebP picture."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part, Image.open(png) as picture:
        picture.save(part, "WEBP", quality=80, method=6)
    png.unlink()
