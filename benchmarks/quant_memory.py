"""Write the memory table of docs/quantization.md: bytes of the transformers of published models in some formats.

python -m benchmarks.quant_memory  # replaces the table; a test checks that it is up to date

The transformers are built from their published configurations without weights. Counted are their parameters: the
layers that `postgen.quant` chooses in the format, with scales and zero points, and all others in bfloat16, or in float32
where diffusers keeps them so. Activations, the text encoder and the autoencoder need memory too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.cost import MODELS, WAN
from benchmarks.docs_tables import write
from postgen.errors import UserError
from postgen.families.empty import empty_transformer
from postgen.families.linear import find_linears
from postgen.quant import LayerSpec, QuantSpec, format_of
from postgen.quant.layers import layers_of
from postgen.quant.sensitivity import stored_bytes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantization.md"
NAME = "memory"
FORMATS = ("fp8", "int4:g64", "nvfp4", "int3:g64:asym", "int2:g64:asym", "bp2:g128")
VIDEO = (
    "THUDM/CogVideoX-2b", "THUDM/CogVideoX-5b", "hunyuanvideo-community/HunyuanVideo", "Lightricks/LTX-Video",
    "genmo/mochi-1-preview", "black-forest-labs/FLUX.1-dev",
)  # fmt: skip
"""Models of `benchmarks.cost` in the table, after Wan."""


def configs() -> dict[str, dict[str, Any]]:
    """Return the Hub id of each model -> the config of its transformer."""
    wan = {name: {"_class_name": "WanTransformer3DModel", **config} for name, config in WAN.items()}
    return wan | {name: MODELS[name][0] for name in VIDEO}


def exact_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of each parameter of a model that was loaded in bfloat16."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    return {name: each.numel() * (4 if kept & {*name.split(".")} else 2) for name, each in model.named_parameters()}


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the parameters of a transformer need.

    Args:
        config: the config of the transformer.

    Returns:
        `parameters`, `share` of the parameters that are quantised, `exact` bytes, and `formats`: text of the format ->
        bytes, None if its groups do not divide the channels of a layer.
    """
    model = empty_transformer(config)
    exact, linears = exact_bytes(model), find_linears(model)
    chosen = layers_of(model, QuantSpec(weight="fp8"))
    rest = sum(exact.values()) - sum(exact[f"{name}.weight"] for name in chosen)
    found: dict[str, int | None] = {}
    for text in FORMATS:
        spec = LayerSpec(weight=format_of(text))
        try:
            found[text] = rest + sum(stored_bytes(name, linears[name], spec) for name in chosen)
        except UserError:
            found[text] = None
    count = sum(each.numel() for each in model.parameters())
    share = sum(linears[name].weight.numel() for name in chosen) / count
    return {"parameters": count, "share": share, "exact": sum(exact.values()), "formats": found}


def table() -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"| Transformer | parameters | quantised | bfloat16 | {' | '.join(f'`{text}`' for text in FORMATS)} |"
    yield "|---" * (len(FORMATS) + 4) + "|"
    for name, config in configs().items():
        found = sizes(config)
        cells = [f"{found['parameters'] / 1e9:.2f} B", f"{found['share']:.0%}", f"{found['exact'] / 1e9:.2f}"]
        cells += ["" if size is None else f"{size / 1e9:.2f}" for size in found["formats"].values()]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    """Replace the table of the page."""
    write(PAGE, {NAME: table()})
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
