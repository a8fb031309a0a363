"""Low-rank changes of weights: the LoRA of one layer, fusing and splitting of layers, and the settings of peft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, cut


@dataclass(frozen=True, slots=True)
class Layer:
    """A low-rank change of one weight: scale * up @ down."""

    down: Tensor
    """(r, in, ...)"""
    up: Tensor
    """(out, r, ...)"""
    scale: float = 1.0
    bias: Tensor | None = None
    """(out,), the change of the layer's bias; `scale` does not apply to it."""
    magnitude: Tensor | None = None
    """(out,), DoRA: the norms of the rows of the changed weight, as peft defines them."""

    @property
    def rank(self) -> int:
        """The rank r, the number of rows of `down`."""
        return len(self.down)


def fuse(parts: Sequence[Layer | None], shares: Sequence[int]) -> Layer:
    """Return one layer whose outputs are the concatenated outputs of the parts.

    Args:
        parts: the parts, without biases and magnitudes, at least one of which is not None. A part that is None changes
            nothing.
        shares: number of outputs of each part, relative to the other parts.
    """
    known = [(part, share) for part, share in zip(parts, shares, strict=True) if part is not None]
    unit = len(known[0][0].up) // known[0][1]
    # A common scale stays the scale of the layer: multiplying it into the weights would round them.
    scale = known[0][0].scale if len({part.scale for part, _ in known}) == 1 else 1.0
    up = known[0][0].up.new_zeros(unit * sum(shares), sum(part.rank for part, _ in known))
    row = column = 0
    for part, share in zip(parts, shares, strict=True):
        if part is not None:
            gain = 1.0 if scale == part.scale else part.scale
            up[row : row + unit * share, column : column + part.rank] = part.up * gain
            column += part.rank
        row += unit * share
    return Layer(torch.cat([part.down for part, _ in known]), up, scale)


def split(layer: Layer, rows: Sequence[int]) -> list[Layer | None]:
    """Split a fused layer into its parts, whether `fuse` made the layer or it was trained as one layer.

    Args:
        layer: the layer, whose outputs are the concatenated outputs of the parts.
        rows: number of outputs of each part.

    Returns:
        The parts; None for a part that changes nothing.

    Raises:
        ValueError: the layer has another number of outputs.
    """
    if sum(rows) != len(layer.up):
        raise ValueError(f"the LoRA has {len(layer.up)} outputs and not {' + '.join(map(str, rows))}")
    parts: list[Layer | None] = []
    start = 0
    for count in rows:
        end = start + count
        up = layer.up[start:end]
        used = up.flatten(2).any(-1).any(0) if up.ndim > 2 else up.any(0)
        bias, magnitude = (None if x is None else x[start:end] for x in (layer.bias, layer.magnitude))
        if bias is not None and not bias.any():
            bias = None
        if bias is not None or magnitude is not None:
            used[0] |= not used.any()
        # In a layer that `fuse` made, the columns of the other parts are zero in these rows. They are removed.
        whole = replace(layer, down=layer.down[used], up=up[:, used], bias=bias, magnitude=magnitude)
        parts.append(whole if used.any() else None)
        start = end
    return parts


def full_rank(change: Tensor) -> Layer:
    """Return the change of a whole weight, (out, in, ...), as a layer in which one matrix is the identity."""
    outs, ins = change.shape[:2]
    if change.ndim == 2 and ins < outs:
        return Layer(torch.eye(ins, dtype=change.dtype), change)
    return Layer(change, torch.eye(outs, dtype=change.dtype).reshape(outs, outs, *(1,) * (change.ndim - 2)))


def added(one: Layer, other: Layer) -> Layer:
    """Return the sum of two changes of a weight, both without magnitudes."""
    pairs = [(each, 1.0 if one.scale == other.scale else each.scale) for each in (one, other)]
    scale = one.scale if one.scale == other.scale else 1.0
    biases = [each.bias for each in (one, other) if each.bias is not None]
    up = torch.cat([each.up * gain for each, gain in pairs], dim=1)
    down = torch.cat([each.down for each in (one, other)])
    return Layer(down, up, scale, sum(biases[1:], biases[0]) if biases else None)


def folded(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return down and up with the scale multiplied into up.

    If the scale is a power of two, the result is exact in every dtype. With other scales, matrices in half precision
    become float32, which is exact or nearly so, and matrices in float32 are rounded.
    """
    if layer.scale == 1.0:
        return layer.down, layer.up
    up = layer.up * layer.scale
    if up.dtype in (torch.float16, torch.bfloat16):
        whole = layer.up.float() * layer.scale
        if not torch.equal(up.float(), whole):
            return layer.down.float(), whole
    return layer.down, up


def adapter_state(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Return the state dict of a peft adapter with these layers."""
    state: dict[str, Tensor] = {}
    biases = any(layer.bias is not None for layer in layers.values())
    for name, layer in layers.items():
        state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        if layer.magnitude is not None:
            dims = layer.down.ndim
            whole = layer.magnitude if dims == 2 else layer.magnitude.reshape(1, -1, *(1,) * (dims - 2))
            state[f"{name}.lora_magnitude_vector"] = whole
        if biases:
            # peft scales the bias too, and requires a bias in every layer or in none.
            bias = layer.up.new_zeros(len(layer.up)) if layer.bias is None else layer.bias / layer.scale
            state[f"{name}.lora_B.bias"] = bias
    return state


def adapter_settings(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig` for these layers.

    `r` and `lora_alpha` are the most common values; `rank_pattern` and `alpha_pattern` list the other layers.

    Raises:
        UserError: some layers have DoRA magnitudes and some have none.
    """
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _whole(layer.scale * layer.rank) for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    plain = [name for name, layer in layers.items() if layer.magnitude is None]
    if 0 < len(plain) < len(layers):
        raise UserError(
            f"{len(plain)} of its {len(layers)} layers have no DoRA magnitude, while the others have one:"
            f" {shortened(plain)}"
        )
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(layers),
        "use_dora": not plain,
        "lora_bias": any(layer.bias is not None for layer in layers.values()),
    }


def shortened(names: Sequence[str], few: int = 3) -> str:
    """Join the first names and the number of the others, for messages.

    >>> shortened(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - few
    return ", ".join(cut(name, 160) for name in names[:few]) + (f" and {more} more" if more > 0 else "")


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
