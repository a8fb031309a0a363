"""Linear layers in FP8: layers of real models with the quantisation included, and whole denoising steps.

`python -m benchmarks.lowp_linears` needs a GPU with FP8 and writes `results/lowp_linears.json`; `--quick` takes Wan
1.3B only, `--tiny` runs everything once on a processor with tiny models and writes nothing (its times mean nothing).
Shapes are the published ones, weights are random: time does not depend on them. What is compared runs in one process
on the same inputs; times are medians. Errors of layers are those of Gaussian numbers against float64.

`step_rows` takes further plug-ins (attention in FP8, say) and times them beside and together with the linear layers.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import postgen
from benchmarks.fused_step import Case, built, cogvideox, flash_attention_4, milliseconds, wan
from benchmarks.gates import gate, write_result
from postgen.families import layout_of
from postgen.kernels.fp8_rows import naive
from postgen.kernels.fp8_rows.ops import quantize_rows, rows_matmul, why_not_fp8

Apply = Callable[[Any], Any]
"""Puts a plug-in on a transformer and returns its handle."""

QUIET = postgen.FP8LinearConfig(emulate=True)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Linear layers that read the same tokens."""

    model: str
    layers: str
    tokens: int
    inputs: int
    outputs: int
    count: int = 1
    """So many layers one after the other, which share one quantisation."""


def shapes_of(model: str, tokens: int, width: int, wide: int) -> tuple[Shape, ...]:
    """Layers of a block: projections of a `width`, a feed-forward layer of another."""
    return (
        Shape(model=model, layers="q, k, v", tokens=tokens, inputs=width, outputs=width, count=3),
        Shape(model=model, layers="attention out", tokens=tokens, inputs=width, outputs=width),
        Shape(model=model, layers="feed-forward in", tokens=tokens, inputs=width, outputs=wide),
        Shape(model=model, layers="feed-forward out", tokens=tokens, inputs=wide, outputs=width),
    )


SHAPES = (
    *shapes_of("Wan 1.3B 480p 81f", 32760, 1536, 8960),
    *shapes_of("Wan 14B 480p 81f", 32760, 5120, 13824),
    *shapes_of("Wan 14B 720p 81f", 75600, 5120, 13824),
    *shapes_of("HunyuanVideo 720p 129f", 119056, 3072, 12288),
    *shapes_of("CogVideoX-5B 49f", 17776, 3072, 12288),
)


def hunyuan_video() -> Case:
    """HunyuanVideo, 129 frames of 720 x 1280: 33 latent frames of 90 x 160, 256 tokens of text."""

    def arguments() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, 33, 90, 160, dtype=torch.bfloat16),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 256, 4096, dtype=torch.bfloat16),
            "encoder_attention_mask": torch.ones(1, 256),
            "pooled_projections": torch.randn(1, 768, dtype=torch.bfloat16),
            "guidance": torch.tensor([6000.0]),
        }

    kind = "HunyuanVideoTransformer3DModel"
    return Case(name="HunyuanVideo 720p 129f", kind=kind, config={}, arguments=arguments)


CASES = (
    wan("Wan 1.3B 480p 81f", 12, 8960, 30),
    wan("Wan 14B 480p 81f", 40, 13824, 40),
    wan("Wan 14B 720p 81f", 40, 13824, 40, (21, 90, 160)),
    hunyuan_video(),
    cogvideox(),
)


@torch.no_grad()
def layer_row(shape: Shape, device: str, repeats: int = 5) -> dict[str, Any]:
    """Time layers in bfloat16 and in FP8: the product alone, and with the quantisation done in three ways."""
    torch.manual_seed(0)
    torch.compiler.reset()  # each shape is compiled for itself
    x = torch.randn(1, shape.tokens, shape.inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(shape.outputs, shape.inputs, device=device, dtype=torch.bfloat16) / shape.inputs**0.5
    bias = torch.randn(shape.outputs, device=device, dtype=torch.bfloat16)
    rounded, given = quantize_rows(weight), quantize_rows(x)

    def products(quantized: tuple[Tensor, Tensor]) -> Tensor:
        for _ in range(shape.count):
            out: Tensor = rows_matmul(*quantized, *rounded, bias, torch.bfloat16)
        return out

    def plain() -> Tensor:
        for _ in range(shape.count):
            out = functional.linear(x, weight, bias)
        return out

    compiled = torch.compile(naive.quantize_rows)
    calls: Mapping[str, Callable[[], Any]] = {
        "bf16": plain,
        "product": lambda: products(given),
        "eager": lambda: products(naive.quantize_rows(x)),
        "compiled": lambda: products(compiled(x)),
        "kernel": lambda: products(quantize_rows(x)),
        "quantise": lambda: quantize_rows(x),
    }
    row: dict[str, Any] = {**vars(shape)}
    for name, call in calls.items():
        call()
        row[f"{name}_ms"] = milliseconds(call, device, repeats)
    row["fp8_vs_bf16"] = row["bf16_ms"] / row["kernel_ms"]
    rows = x[0, :256]
    found: Tensor = rows_matmul(*quantize_rows(rows), *rounded, None, torch.bfloat16)
    row["error"] = _error(found, functional.linear(rows.double(), weight.double()))
    _say(row)
    return row


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def forms_of(attention: Mapping[str, Apply]) -> dict[str, tuple[Apply, ...]]:
    """Return what is put on the model in each form: nothing, exact kernels, and what is in eight bits."""
    fused = postgen.apply_fused_ops
    linears: Apply = lambda model: postgen.apply_fp8_linears(model, QUIET)  # noqa: E731
    forms: dict[str, tuple[Apply, ...]] = {"stock": (), "exact": (fused,), "fp8_linears": (fused, linears)}
    for name, put in attention.items():
        forms[name] = (fused, put)
        forms[f"{name}_and_linears"] = (fused, put, linears)
    return forms


@torch.no_grad()
def step_row(
    case: Case, device: str, repeats: int = 5, attention: Mapping[str, Apply] | None = None
) -> dict[str, Any]:
    """Time a whole step of a model with random weights, in every form as it is and compiled.

    Args:
        case: the model and its call.
        device: where it runs.
        repeats: timed calls of each form.
        attention: further plug-ins by name, each of which is timed alone and with the linear layers.

    Returns:
        Milliseconds by form, `<form>_ms` and `<form>_compiled_ms`, and `<form>_difference`, relative to stock.
    """
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        transformer = built(getattr(diffusers, case.kind), case.config)
        arguments = case.arguments()

    def step() -> Tensor:
        out: Tensor = transformer(**arguments, return_dict=False)[0]
        return out

    row: dict[str, Any] = {"model": case.name}
    stock = step().double()
    for compiled in (False, True):
        if compiled:
            for block in layout_of(transformer).block_modules(transformer).values():
                block.compile(fullgraph=True)
        for form, puts in forms_of(attention or {}).items():
            handles = [put(transformer) for put in puts]
            name = f"{form}_compiled" if compiled else form
            row[f"{name}_difference"] = _error(step(), stock)
            row[f"{name}_ms"] = milliseconds(step, device, repeats)
            for handle in reversed(handles):
                handle.remove()
    row["best_exact_ms"] = best(row, "exact")
    row["fp8_linears_vs_exact"] = row["best_exact_ms"] / best(row, "fp8_linears")
    row["fp8_linears_vs_stock"] = row["stock_ms"] / best(row, "fp8_linears")
    _say(row)
    return row


def best(row: Mapping[str, Any], form: str) -> float:
    """Return the milliseconds of a form, as it is or compiled, whichever is faster; compiled stock counts as exact."""
    names = (form, f"{form}_compiled", *(("stock_compiled",) if form == "exact" else ()))
    return min(float(row[f"{name}_ms"]) for name in names)


def step_gates(rows: Sequence[Mapping[str, Any]], form: str = "fp8_linears") -> list[dict[str, Any]]:
    """Return the gates about steps, of one form of `step_row`; what was not measured misses its gate."""
    by_model = {row["model"]: row for row in rows}
    small, large = by_model.get("Wan 14B 480p 81f"), by_model.get("Wan 14B 720p 81f")
    faster = None if small is None else small["stock_ms"] / best(small, form)
    than_exact = None if large is None else best(large, "exact") / best(large, form)
    return [
        gate("step_14b_480p_vs_stock", faster, ">=", 1.6),
        gate("step_14b_720p_vs_exact", than_exact, ">=", 1.25),
    ]


@torch.no_grad()
def lora_on_fp8(device: str, model: Any | None = None) -> int:
    """Return 1 where LoRA on layers in FP8 adds what it adds, and taking them off gives the bits of before; else 0.

    Args:
        device: where the embedded model runs.
        model: another transformer of Wan's, instead of that of the embedded model.
    """
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    if model is None:
        model = WanTransformer3DModel.from_pretrained(postgen.embedded_model(), subfolder="transformer").to(device)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    inputs = {
        name: torch.randn(2, 33, layer.in_features, device=device, dtype=layer.base_layer.weight.dtype)
        for name, layer in layers.items()
    }
    before = {name: layer(inputs[name]) for name, layer in layers.items()}
    handle = postgen.apply_fp8_linears(model, QUIET)
    right = True
    for name, layer in layers.items():
        x = inputs[name]
        branch = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        right &= torch.equal(layer(x), layer.base_layer(x) + branch)
    handle.remove()
    right &= all(torch.equal(layer(inputs[name]), before[name]) for name, layer in layers.items())
    return int(right and bool(layers))


def gates(layers: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], lora: int) -> list[dict[str, Any]]:
    """Return the gates of this file: LoRA, errors, and that no step is slower than its exact form."""
    slowest = min((row["fp8_linears_vs_exact"] for row in steps), default=None)
    return [
        gate("lora_on_fp8", lora, "==", 1),
        gate("layer_error", max((row["error"] for row in layers), default=None), "<=", 0.04),
        gate("linears_step_vs_exact", slowest, ">=", 1.0),
    ]


def tiny() -> tuple[tuple[Shape, ...], tuple[Case, ...]]:
    """Small layers and a small Wan, to run all of this anywhere."""
    case = CASES[0]

    def arguments() -> dict[str, Any]:
        given = case.arguments()
        cut = {"hidden_states": given["hidden_states"][:, :, :2, :4, :4]}
        return {**given, **cut, "encoder_hidden_states": given["encoder_hidden_states"][:, :8, :16]}

    narrow = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 1, "text_dim": 16}
    return shapes_of("tiny", 40, 64, 128), (replace(case, name="tiny", config=narrow, arguments=arguments),)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the rows and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowp_linears", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Wan 1.3B at 480p only")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a processor too; nothing is written")
    parser.add_argument("--layers_only", action="store_true", help="no whole steps")
    parser.add_argument("-o", "--output", default="lowp_linears", help="name or path of the result file")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.tiny and (reason := why_not_fp8(torch.device(device))):
        print(f"benchmarks.lowp_linears needs a GPU with FP8: {reason}", file=sys.stderr)
        return 2
    shapes, cases = tiny() if options.tiny else (SHAPES, CASES)
    first = cases[0].name
    repeats = 1 if options.tiny else 5
    layers = [layer_row(each, device, repeats) for each in shapes if not options.quick or each.model == first]
    steps = []
    for case in () if options.layers_only else cases[: 1 if options.quick else None]:
        steps.append(step_row(case, device, repeats))
        _free(device)
    if options.tiny:
        return 0
    told = {"repeats": repeats, "flash_attn_4": flash_attention_4()}
    rows = {"layers": layers, "steps": steps}
    print(write_result(options.output, {**told, **rows, "gates": gates(layers, steps, lora_on_fp8(device))}))
    return 0


def _say(row: Mapping[str, Any]) -> None:
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


def _free(device: str) -> None:
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
