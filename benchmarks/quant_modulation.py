"""What it costs to round the layers of modulation, which `QuantSpec.modulation` quantises.

    python -m benchmarks.quant_modulation   # a minute on a CPU; then python -m benchmarks.quant_tables

Two kinds of models, because no model with layers of modulation in its blocks is small and trained:

- tiny models with random weights of families that have such layers: error of the prediction;
- the embedded model, whose blocks share the modulation that one layer computes from the timestep: this layer is
  rounded in the same way. Error of the prediction on the exact model's own calls, and PSNR to the exact clips.

Each is measured for the layers of the default policy, for modulation, and for both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gates import write_result
from postgen.families.linear import find_linears
from postgen.quant import QuantSpec, format_of, quantize_tensor, quantize_weights

FAMILIES = ("HunyuanVideo", "Mochi", "Flux", "Stable Diffusion 3")
"""Tiny models of the tests."""
CASES = ((None, "int8"), (None, "fp8"), (None, "int4"), ("int4", None), ("int4", "int8"), ("int4", "fp8"))
"""Formats of the layers of the default policy and of modulation; None: exact."""
GROUP = ":g32"
"""What shares a scale in 4-bit weights of the embedded model."""
PROMPTS = ("a red ball rolls to the left", "a blue cube falls", "a green cone turns", "a yellow ball bounces")
CLIP = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 8}
SHARED = "condition_embedder.time_proj"
"""The layer of the embedded model that computes the modulation of all blocks."""


def relative(found: Tensor, exact: Tensor) -> float:
    """Return |found - exact| / |exact|."""
    return float((found - exact).norm() / exact.norm())


@torch.no_grad()
def changed(model: nn.Module, weight: str | None, modulation: str | None, names: list[str]) -> nn.Module:
    """Return a copy of a model with rounded weights.

    Args:
        model: the exact model.
        weight: format of the layers of the default policy.
        modulation: format of the layers of modulation.
        names: names of these layers.
    """
    found = copy.deepcopy(model)
    for name in names if modulation else ():
        tensor = found.get_submodule(name).weight
        assert isinstance(tensor, Tensor)
        tensor.copy_(quantize_tensor(tensor, format_of(str(modulation))).numbers())
    if weight is not None:
        quantize_weights(found, QuantSpec(weight=weight))
    return found


@torch.no_grad()
def tiny(name: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each case of a tiny model."""
    from tests.families.tiny_models import tiny_model

    model = tiny_model(name)
    names = [*find_linears(model.transformer, roles=["modulation"])]

    def predicted(network: nn.Module) -> Tensor:
        out: Tensor = network(**model.arguments, return_dict=False)[0]
        return out

    exact = predicted(model.transformer)
    for weight, modulation in CASES:
        found = predicted(changed(model.transformer, weight, modulation, names))
        yield {"model": name, "weight": weight, "modulation": modulation, "error": relative(found, exact)}


@torch.no_grad()
def embedded() -> Iterator[dict[str, Any]]:
    """Yield a row for each case of the embedded model."""
    from diffusers import WanPipeline

    from postgen.assets import embedded_model

    pipe = WanPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    exact, calls = pipe.transformer, []

    def note(_: nn.Module, __: tuple[Any, ...], words: Mapping[str, Any], out: Any) -> None:
        calls.append((dict(words), out[0].clone()))

    def clips(network: nn.Module) -> list[Tensor]:
        pipe.transformer = network
        return [
            torch.as_tensor(pipe(text, **CLIP, output_type="np", generator=torch.manual_seed(seed)).frames[0])
            for seed, text in enumerate(PROMPTS)
        ]

    hook = exact.register_forward_hook(note, with_kwargs=True)
    wanted = clips(exact)
    hook.remove()
    for weight, modulation in CASES:
        network = changed(exact, weight and f"{weight}{GROUP}", modulation, [SHARED])
        errors = [relative(network(**words)[0], out) for words, out in calls]
        noise = [float((clip - other).square().mean()) for clip, other in zip(clips(network), wanted, strict=True)]
        yield {
            **{"model": "embedded", "weight": weight, "modulation": modulation, "error": sum(errors) / len(errors)},
            "psnr": sum(-10 * float(torch.tensor(each).log10()) for each in noise) / len(noise),
        }


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of a result."""
    models = [*dict.fromkeys(row["model"] for row in result["rows"])]
    heads = ["embedded model" if name == "embedded" else name for name in models]
    yield f"| Layers | modulation | {' | '.join(heads)} | embedded model, PSNR |"
    yield "|---" * (len(models) + 3) + "|"
    for weight, modulation in CASES:
        alike = (row for row in result["rows"] if (row["weight"], row["modulation"]) == (weight, modulation))
        rows = {row["model"]: row for row in alike}
        cells = [*(f"{rows[name]['error']:.2%}" for name in models), f"{rows['embedded']['psnr']:.1f} dB"]
        said = (f"`{each}`" if each else "exact" for each in (weight, modulation))
        yield f"| {' | '.join((*said, *cells))} |"


def main() -> int:
    """Measure, and write the result."""
    rows = [*(row for name in FAMILIES for row in tiny(name)), *embedded()]
    settings = {"prompts": PROMPTS, "clip": CLIP, "group": GROUP}
    result = {"settings": settings, "rows": rows, "gates": []}
    print(write_result("quant_modulation", result))
    print("\n".join(table(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
