"""FP8 linear layers at the shapes of real models: times, quantisation included, and errors.

`python -m benchmarks.lowp_linears` needs a GPU with FP8 and writes `results/lowp_linears.json`. `--quick` measures Wan
1.3B only. `--tiny` runs the code once on a CPU with tiny layers and writes nothing (its times have no meaning). Shapes
are the published ones, and weights are random, because time does not depend on them. All forms run in one process on
the same inputs; times are medians. Errors are relative to float64, for Gaussian inputs and weights.
`benchmarks.lowp_steps` measures whole denoising steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import postgen
from benchmarks.fused_step import milliseconds
from benchmarks.gates import gate, write_result
from postgen.kernels.fp8_rows import naive, ops
from postgen.kernels.fp8_rows.ops import quantize_rows, rows_matmul, why_not_fp8

QUIET = postgen.FP8LinearConfig(simulate=True)
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One or more linear layers that read the same tokens."""

    model: str
    layers: str
    tokens: int
    inputs: int
    outputs: int
    count: int = 1
    """The number of layers that run one after the other and share one quantisation."""


def shapes_of(model: str, tokens: int, width: int, wide: int) -> tuple[Shape, ...]:
    """Return the layers of a block: projections with `width` channels, a feed-forward layer with `wide` channels."""
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
TINY = shapes_of("tiny", 40, 64, 128)


@torch.no_grad()
def layer_row(shape: Shape, device: str, repeats: int = REPEATS) -> dict[str, Any]:
    """Time layers in bfloat16 and in FP8: the product alone, and with the quantisation done in three ways."""
    torch.manual_seed(0)
    torch.compiler.reset()  # compile each shape separately
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
    row["fast_product_ms"], row["fast_coherent_error"] = fast(lambda: products(given), weight, device, repeats)
    row["coherent_error"] = coherent_error(weight)
    rows = x[0, :256]
    found: Tensor = rows_matmul(*quantize_rows(rows), *rounded, None, torch.bfloat16)
    row["error"] = _error(found, functional.linear(rows.double(), weight.double()))
    _say(row)
    return row


def fast(product: Callable[[], Any], weight: Tensor, device: str, repeats: int) -> tuple[float, float]:
    """Return the time of a product with fast accumulation in the tensor cores, and its `coherent_error`."""
    usual = ops.FAST_ACCUMULATION
    ops.FAST_ACCUMULATION = True
    try:
        product()
        return milliseconds(product, device, repeats), coherent_error(weight)
    finally:
        ops.FAST_ACCUMULATION = usual


def coherent_error(weight: Tensor) -> float:
    """Return the relative error of the product of rows of the weights with themselves, whose terms do not cancel."""
    codes, scale = quantize_rows(weight[:256])
    found: Tensor = rows_matmul(codes, scale, codes, scale, None, torch.bfloat16)
    exact = (codes.double() @ codes.double().mT) * scale.double() * scale.double().view(-1)
    return _error(found.diagonal(), exact.diagonal())


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@torch.no_grad()
def lora_on_fp8(device: str, model: Any | None = None) -> int:
    """Return 1 if LoRA on FP8 layers adds exactly its branch and removal restores the outputs bit by bit, else 0.

    Args:
        device: the device of the embedded model.
        model: another Wan transformer instead of that of the embedded model.
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


def gates(layers: Sequence[Mapping[str, Any]], lora: int) -> list[dict[str, Any]]:
    """Return the gates of this file: LoRA on FP8 layers, and the largest error of a layer."""
    return [
        gate("lora_on_fp8", lora, "==", 1),
        gate("layer_error", max((row["error"] for row in layers), default=None), "<=", 0.04),
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure all layers, print the rows and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowp_linears", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="measure Wan 1.3B at 480p only")
    parser.add_argument("--tiny", action="store_true", help="use tiny layers on any device and write nothing")
    parser.add_argument("-o", "--output", default="lowp_linears", help="name or path of the result file")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.tiny and (reason := why_not_fp8(torch.device(device))):
        print(f"benchmarks.lowp_linears needs a GPU with FP8: {reason}. Use --tiny on other devices", file=sys.stderr)
        return 2
    shapes = (
        TINY if options.tiny else tuple(each for each in SHAPES if not options.quick or each.model == SHAPES[0].model)
    )
    layers = [layer_row(each, device, 1 if options.tiny else REPEATS) for each in shapes]
    if not options.tiny:
        found = gates(layers, lora_on_fp8(device))
        print(write_result(options.output, {"repeats": REPEATS, "layers": layers, "gates": found}))
    return 0


def _say(row: Mapping[str, Any]) -> None:
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
