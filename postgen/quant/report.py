"""What quantisation did to a model: formats, noise of the weights, and bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from postgen.quant.rounding import qsnr

if TYPE_CHECKING:
    from torch import nn

    from postgen.quant.linear import QLinear


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """What quantisation did to one linear layer."""

    weight: str | None
    """Format of the weight; None: it is exact."""
    act: str | None
    """Format of the input; None: it is exact."""
    rotate: int
    """Channels that are rotated together; 0: none."""
    rank: int
    """Rank of the low-rank branch; 0: none."""
    shape: tuple[int, int]
    """Output and input channels."""
    bits: float
    """Stored bits per weight, with scales and branch."""
    qsnr: float
    """Signal-to-noise ratio of the weight in dB; infinite for an exact weight."""
    bytes_before: int
    bytes_after: int

    @classmethod
    def of(cls, linear: nn.Linear, new: QLinear) -> Self:
        """Compare a quantised layer with the linear layer that it replaces."""
        before, after = tensor_bytes(linear), tensor_bytes(new)
        bias = 0 if new.bias is None else new.bias.nbytes
        spec = new.spec
        return cls(
            weight=None if spec.weight is None else spec.weight.text,
            act=None if spec.act is None else spec.act.text,
            rotate=spec.rotate,
            rank=spec.rank,
            shape=(new.out_features, new.in_features),
            bits=8 * (after - bias) / (new.out_features * new.in_features),
            qsnr=qsnr(linear.weight.detach(), new.effective_weight()),
            bytes_before=before,
            bytes_after=after,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantReport:
    """What quantisation did to a model."""

    layers: Mapping[str, LayerReport]
    """The quantised layers, by name."""
    bytes_before: int
    """Bytes of all tensors of the model before."""
    bytes_after: int
    """Bytes of all tensors of the model afterwards."""

    @property
    def bits(self) -> float:
        """Mean stored bits per weight of the quantised layers."""
        sizes = [rows * channels for rows, channels in (each.shape for each in self.layers.values())]
        return sum(each.bits * size for each, size in zip(self.layers.values(), sizes, strict=True)) / sum(sizes)

    @property
    def qsnr(self) -> float:
        """Least signal-to-noise ratio of a quantised weight, in dB."""
        return min(each.qsnr for each in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; an infinite ratio is None."""
        layers = {name: asdict(each) for name, each in self.layers.items()}
        for each in layers.values():
            each["qsnr"] = None if each["qsnr"] == float("inf") else each["qsnr"]
        found = {"layers": layers, "bits": self.bits}
        found |= {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    def __str__(self) -> str:
        sizes = f"the model has {self.bytes_after / 1e6:.1f} MB, before {self.bytes_before / 1e6:.1f} MB"
        worst = min(self.layers, key=lambda name: self.layers[name].qsnr)
        ratio = self.layers[worst].qsnr
        if ratio == float("inf"):
            return f"the inputs of {len(self.layers)} linear layers are quantised; their weights are exact; {sizes}"
        return (
            f"{len(self.layers)} linear layers quantised to {self.bits:.2f} bits per weight; {sizes}; the noisiest"
            f" weight is {worst} with a relative error of {100 * 10 ** (-ratio / 20):.1f} % (QSNR {ratio:.1f} dB)"
        )


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and saved buffers of a module."""
    return sum(each.nbytes for each in module.state_dict(keep_vars=True).values())
