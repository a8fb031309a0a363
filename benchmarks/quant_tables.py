"""Write the tables of the quantisation pages that follow from the code: memory, folds and number formats.

    python -m benchmarks.quant_tables  # replaces the tables; a test checks that they are up to date

Memory: the transformers of published models are built from their configurations without weights. Counted are their
parameters: the layers that `postgen.quant` chooses in the format, with scales and zero points, and all others in
bfloat16, or in float32 where diffusers keeps them so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import quant_modulation
from benchmarks.cost import MODELS, WAN
from benchmarks.docs_tables import write
from benchmarks.gates import read_result
from benchmarks.quant_page import crossovers
from postgen.errors import UserError
from postgen.families.empty import empty_transformer
from postgen.families.folds_rows import ROWS
from postgen.families.linear import find_linears, role_of
from postgen.quant import FORMATS, LayerSpec, QuantSpec, format_of
from postgen.quant.grids import FloatGrid
from postgen.quant.layers import layers_of
from postgen.quant.sensitivity import stored_bytes

DOCS = Path(__file__).resolve().parents[1] / "docs"
PACKED = ("fp8", "int4:g64", "nvfp4", "int3:g64:asym", "int2:g64:asym", "bp2:g128")
TEXT, MODULATION = "int4:g64", "int8"
VIDEO = (
    "THUDM/CogVideoX-2b", "THUDM/CogVideoX-5b", "hunyuanvideo-community/HunyuanVideo", "Lightricks/LTX-Video",
    "genmo/mochi-1-preview", "black-forest-labs/FLUX.1-dev",
)  # fmt: skip
"""Models of `benchmarks.cost` in the table, after Wan."""
KINDS = {
    "norm": "inputs after a norm or modulation",
    "value": "values of attention",
    "query_key": "queries and keys",
    "gated": "gated feed-forward",
}
"""Kind of a tensor -> head of its column."""
SCALES = {"float32": "float32", "e8m0": "a power of two, 8 bits (E8M0)", "e4m3": "E4M3, and float32 for the tensor"}
SIDE = 4096
"""Rows and channels of the weight whose bits are counted."""


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
        `parameters`, `share` of the parameters that are quantised, `modulation`: that of the modulation in the blocks,
        `exact` bytes, `formats`: text of the format -> bytes, `text`: bytes where the layers of the text have the
        format `TEXT` too, `smaller`: bytes with the format `TEXT` and modulation in the format `MODULATION`, and
        `smallest`: bytes with both.
    """
    model = empty_transformer(config)
    exact, linears = exact_bytes(model), find_linears(model)
    every = find_linears(model, roles=("attention", "feed_forward", "modulation"))
    chosen = layers_of(model, QuantSpec(weight="fp8"))

    modulation = {name: each for name, each in every.items() if role_of(name) == "modulation"}

    def saved(names: Iterable[str], text: str) -> int:
        """Return the bytes that some layers in a format save."""
        spec = LayerSpec(weight=format_of(text))
        return sum(exact[f"{name}.weight"] - stored_bytes(name, every[name], spec) for name in names)

    whole, less = sum(exact.values()), saved(modulation, MODULATION)
    count = sum(each.numel() for each in model.parameters())
    return {
        "parameters": count,
        "share": sum(linears[name].weight.numel() for name in chosen) / count,
        "modulation": sum(each.weight.numel() for each in modulation.values()) / count,
        "exact": whole,
        "formats": {text: whole - saved(chosen, text) for text in PACKED},
        "text": whole - saved(linears, TEXT),
        "smaller": whole - saved(chosen, TEXT) - less,
        "smallest": whole - saved(linears, TEXT) - less,
    }


def memory() -> Iterator[str]:
    """Yield the lines of the table of models."""
    both = f"`{TEXT}`, modulation `{MODULATION}`"
    heads = [*(f"`{text}`" for text in PACKED), both, f"{both}, text `{TEXT}`"]
    yield f"| Transformer | parameters | quantised | modulation | bfloat16 | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 5) + "|"
    for name, config in configs().items():
        found = sizes(config)
        cells = [f"{found['parameters'] / 1e9:.2f} B", f"{found['share']:.0%}", f"{found['modulation']:.0%}"]
        bytes_of = (found["exact"], *found["formats"].values(), found["smaller"], found["smallest"])
        cells += [f"{size / 1e9:.2f}" for size in bytes_of]
        yield f"| {name} | {' | '.join(cells)} |"


def folds() -> Iterator[str]:
    """Yield the lines of the table of blocks: one row for all classes with the same tensors."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for block, rows in ROWS.items():
        cells = [", ".join(dict.fromkeys(row.name for row in rows if row.kind == kind)) for kind in KINDS]
        groups.setdefault(tuple(cells), []).append(block)
    yield f"| Blocks | {' | '.join(KINDS.values())} |"
    yield "|---" * (len(KINDS) + 1) + "|"
    for cells, blocks in groups.items():
        yield f"| {', '.join(f'`{block}`' for block in blocks)} | {' | '.join(cells)} |"


def formats() -> Iterator[str]:
    """Yield the lines of the table of formats: what shares a scale, the scale, and the bits of a large weight."""
    yield "| Name | elements | share a scale | scale | bits per weight | other sharing |"
    yield "|---" * 6 + "|"
    for name, format in FORMATS.items():
        grid = format.grid
        if isinstance(grid, FloatGrid):
            elements = f"E{grid.exponent_bits}M{grid.mantissa_bits}, -{grid.largest:g} to {grid.largest:g}"
        else:
            elements = f"{format.planes} bit planes" if format.planes else f"{grid.least:g} to {grid.largest:g}"
        shared = f"{format.share} channels" if isinstance(format.share, int) else f"a {format.share}"
        scale = f"{format.planes + 1} bfloat16 coefficients" if format.planes else SCALES[format.scale]
        bits = f"{format.bits(SIDE, SIDE):.3g}"
        yield f"| `{name}` | {elements} | {shared} | {scale} | {bits} | {', '.join(parts(name))} |"


def parts(name: str) -> Iterator[str]:
    """Yield the parts that a format accepts after a colon, as code."""
    for part in ("g64", "token", "tensor", "block", "asym", "floor"):
        try:
            format_of(f"{name}:{part}")
        except UserError:
            continue
        yield f"`:{'gN' if part == 'g64' else part}`"


def pages() -> dict[Path, dict[str, Iterator[str]]]:
    """Return page -> name of a table -> its lines."""
    return {
        DOCS / "quantization.md": {
            "memory": memory(),
            "modulation": quant_modulation.table(read_result("quant_modulation")),
        },
        DOCS / "quantization_recipes.md": {"folds": folds()},
        DOCS / "quantization_formats.md": {
            "formats": formats(),
            "advisor": crossovers({"advice": read_result("quant_advisor")}),
        },
    }


def main() -> int:
    """Replace the tables of the pages."""
    for page, tables in pages().items():
        write(page, tables)
        print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
