"""The ways of quantising a linear layer that `benchmarks.quant_speed` compares: ours, and those of other libraries.

A method makes a module that takes the place of a linear layer in bfloat16. Other libraries are optional. They quantise
the same layers as we do, and are used as their documentation says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from postgen.kernels.fp8_rows import ops
from postgen.quant import QuantSpec
from postgen.quant.model import quantized_layer

Make = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of quantising a linear layer; the input of its module has the dtype of the linear layer."""

    name: str
    make: Make
    package: str | None = None
    """The Python package that it needs; None: none."""
    compiles: bool = False
    """Whether its documentation says that it needs torch.compile to be fast."""
    fast_accumulation: bool = False
    """Whether FP8 products of ours accumulate in the tensor cores, see `fp8_rows.ops.FAST_ACCUMULATION`."""

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        if self.package is None:
            return False
        try:
            return importlib.util.find_spec(self.package) is None
        except ModuleNotFoundError:  # a parent package is missing
            return True

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Set the accumulation of FP8 products for the calls inside a `with` block."""
        usual = ops.FAST_ACCUMULATION
        ops.FAST_ACCUMULATION = self.fast_accumulation
        try:
            yield
        finally:
            ops.FAST_ACCUMULATION = usual


def ours(weight: str, act: str | None, **more: Any) -> Make:
    """Return what makes our layer with these formats."""
    spec = QuantSpec(weight=weight, act=act, **more).layer("")
    return lambda linear: quantized_layer("", linear, spec)


def torchao(config: Callable[[Any], Any]) -> Make:
    """Return what makes torchao's layer; `config` gets the module `torchao.quantization`."""

    def make(linear: nn.Linear) -> nn.Module:
        quantization: Any = importlib.import_module("torchao.quantization")
        new = copied(linear)  # the library changes a layer in place
        quantization.quantize_(new, config(quantization))
        return new

    return make


def copied(linear: nn.Linear) -> nn.Linear:
    """Return a copy of a layer."""
    new = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    new.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    new.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return new


def bitsandbytes(linear: nn.Linear) -> nn.Module:
    """Make a layer with weights in NF4."""
    modules: Any = importlib.import_module("bitsandbytes").nn
    terms: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    new: nn.Module = modules.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype, **terms
    )
    device = linear.weight.device
    # The library quantises when the weight moves to the device.
    new.weight = modules.Params4bit(linear.weight.detach().cpu(), requires_grad=False, **terms)
    new.bias = linear.bias
    return new.to(device)


def quanto(linear: nn.Linear) -> nn.Module:
    """Make a layer with int8 weights."""
    library: Any = importlib.import_module("optimum.quanto")
    new: nn.Module = library.QLinear.from_module(linear, weights=library.qint8)
    new.freeze()  # type: ignore[operator]
    return new


def gguf(kind: str) -> Make:
    """Return what makes diffusers' layer with weights in a GGUF format, Q4_0 or Q8_0."""

    def make(linear: nn.Linear) -> nn.Module:
        types: Any = importlib.import_module("gguf").GGMLQuantizationType
        layers: Any = importlib.import_module("diffusers.quantizers.gguf.utils")
        packed = q4_0(linear.weight.detach()) if kind == "Q4_0" else q8_0(linear.weight.detach())
        new: nn.Module = layers.GGUFLinear(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype
        )
        new.weight = layers.GGUFParameter(packed, quant_type=getattr(types, kind))
        new.bias = linear.bias
        return new

    return make


def q8_0(weight: Tensor) -> Tensor:
    """Pack a weight (N, K) in GGUF's Q8_0: for each 32 numbers a float16 scale and int8 codes, bytes (N, K / 32 * 34).

    The package gguf does the same on the CPU, in minutes for a large model.
    """
    groups = weight.float().unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale == 0, 0, groups / scale).round().to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), codes.view(torch.uint8)], -1).flatten(1)


def q4_0(weight: Tensor) -> Tensor:
    """Pack a weight (N, K) in GGUF's Q4_0: a float16 scale and 16 bytes for each 32 numbers, bytes (N, K / 32 * 18).

    The code 0 means the number that is largest in size, -8 times the scale. The low halves of the bytes hold the first
    16 numbers.
    """
    groups = weight.float().unflatten(1, (-1, 32))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = (torch.where(scale == 0, 0, groups / scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    halves = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat([scale.half().view(torch.uint8), halves], -1).flatten(1)


BF16 = Method(name="bf16", make=lambda linear: linear)
OURS = (
    Method(name="fp8", make=ours("fp8", "fp8:token")),
    Method(name="fp8, fast accumulation", make=ours("fp8", "fp8:token"), fast_accumulation=True),
    Method(name="fp8 blocks", make=ours("fp8:block", "fp8:block")),
    Method(name="int8", make=ours("int8", "int8:token")),
    Method(name="int8, rotated", make=ours("int8", "int8:token", rotate=128)),
    Method(name="int4 in fp8", make=ours("int4:g64", "fp8:token")),
    Method(name="int4", make=ours("int4:g64", None)),
    Method(name="2 bit planes", make=ours("bp2:g64", None)),
)
_AO = "torchao"
PEERS = (
    Method(
        name="torchao fp8 row",
        make=torchao(lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())),
        package=_AO,
        compiles=True,
    ),
    Method(
        name="torchao int8",
        make=torchao(lambda ao: ao.Int8DynamicActivationInt8WeightConfig()),
        package=_AO,
        compiles=True,
    ),
    Method(
        name="torchao int8 weights",
        make=torchao(lambda ao: ao.Int8WeightOnlyConfig()),
        package=_AO,
        compiles=True,
    ),
    Method(
        name="torchao int4 weights",
        make=torchao(lambda ao: ao.Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d")),
        package=_AO,
    ),
    Method(name="bitsandbytes NF4", make=bitsandbytes, package="bitsandbytes"),
    Method(name="quanto int8 weights", make=quanto, package="optimum.quanto"),
    Method(name="GGUF Q8_0", make=gguf("Q8_0"), package="gguf"),
    Method(name="GGUF Q4_0", make=gguf("Q4_0"), package="gguf"),
)
METHODS = (BF16, *OURS, *PEERS)
