"""Low-rank changes of weights: what a LoRA file says of one layer, layers fused and split, and peft's settings."""

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
    """(out,), what the layer's bias is changed by; not scaled."""
    magnitude: Tensor | None = None
    """(out,), of DoRA: the lengths of the changed weight's rows, as peft computes with them."""

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return len(self.down)


def fuse(parts: Sequence[Layer | None], shares: Sequence[int]) -> Layer:
    """Return one layer whose outputs are those of the parts one after another; a part that is None changes nothing.

    Args:
        parts: at least one is there; no biases, no magnitudes.
        shares: outputs of each, relative to one another.
    """
    known = [(part, share) for part, share in zip(parts, shares, strict=True) if part is not None]
    unit = len(known[0][0].up) // known[0][1]
    # One scale for all stays one, and is not rounded into the weights.
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
    """Return the parts of a layer that `fuse` made, or that was trained as one; None for a part that changes nothing.

    Args:
        layer: whose outputs are those of the parts one after another.
        rows: outputs of each part.

    Raises:
        ValueError: it has another number of outputs.
    """
    if sum(rows) != len(layer.up):
        raise ValueError(f"{len(layer.up)} outputs are not {' + '.join(map(str, rows))}")
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
        # The columns of other parts are zeros here: without them this is the part as it was.
        whole = replace(layer, down=layer.down[used], up=up[:, used], bias=bias, magnitude=magnitude)
        parts.append(whole if used.any() else None)
        start = end
    return parts


def full_rank(change: Tensor) -> Layer:
    """Return the change of a whole weight, (out, in, ...), as a layer: one of its two matrices is the identity."""
    outs, ins = change.shape[:2]
    if change.ndim == 2 and ins < outs:
        return Layer(torch.eye(ins, dtype=change.dtype), change)
    return Layer(change, torch.eye(outs, dtype=change.dtype).reshape(outs, outs, *(1,) * (change.ndim - 2)))


def added(one: Layer, other: Layer) -> Layer:
    """Return the sum of two changes of a weight; no magnitudes."""
    pairs = [(each, 1.0 if one.scale == other.scale else each.scale) for each in (one, other)]
    scale = one.scale if one.scale == other.scale else 1.0
    biases = [each.bias for each in (one, other) if each.bias is not None]
    up = torch.cat([each.up * gain for each, gain in pairs], dim=1)
    down = torch.cat([each.down for each in (one, other)])
    return Layer(down, up, scale, sum(biases[1:], biases[0]) if biases else None)


def folded(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return down and up with the scale in the latter.

    A power of two is exact in any number type. Other scales of half precision are kept in float32, where that is
    exact or nearly so; of float32 they round.
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
    """Return layers as the tensors of a peft adapter."""
    state: dict[str, Tensor] = {}
    biases = any(layer.bias is not None for layer in layers.values())
    for name, layer in layers.items():
        state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        if layer.magnitude is not None:
            dims = layer.down.ndim
            whole = layer.magnitude if dims == 2 else layer.magnitude.reshape(1, -1, *(1,) * (dims - 2))
            state[f"{name}.lora_magnitude_vector"] = whole
        if biases:
            # peft scales the bias as well, and wants one in every layer or in none.
            bias = layer.up.new_zeros(len(layer.up)) if layer.bias is None else layer.bias / layer.scale
            state[f"{name}.lora_B.bias"] = bias
    return state


def adapter_settings(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig` for layers; exceptions to the usual rank and alpha by name.

    Raises:
        UserError: some have magnitudes and some have none.
    """
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _whole(layer.scale * layer.rank) for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    plain = [name for name, layer in layers.items() if layer.magnitude is None]
    if 0 < len(plain) < len(layers):
        raise UserError(
            f"{len(plain)} of its {len(layers)} layers have no magnitude of DoRA, the others have: {shortened(plain)}"
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
    """Return the first names and how many more there are.

    >>> shortened(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - few
    return ", ".join(cut(name, 160) for name in names[:few]) + (f" and {more} more" if more > 0 else "")


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
