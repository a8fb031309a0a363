"""Crest factors of a model's weights and inputs, and where integers and floating point cross on them.

The crest factor of a group is its largest number divided by its root mean square. `postgen.quant.advisor` predicts the
crossover for normally distributed numbers; here the groups of real tensors are sorted by their crest factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from postgen.families.linear import find_linears
from postgen.quant import QuantSpec, format_of, quantize
from postgen.quant.advisor import Advice, Fit, crossover, fits_of
from postgen.quant.calibration import Calibration
from postgen.quant.layers import layers_of
from postgen.quant.observers import InputSample
from postgen.quant.rotation import rotated
from postgen.quant.rounding import grouped

PAIRS = (("mxint8", "mxfp8"), ("mxint6", "mxfp6"), ("mxint4", "mxfp4"), ("nvint4", "nvfp4"))
"""Integers and floating point with the same number of bits."""
FOUR_BITS = ("mxint4", "mxfp4", "nvint4", "nvfp4")
BINS = 40
"""Bins of crest factors with equally many groups."""
ROWS = 64
"""Tokens of each layer and bin of noise levels."""


def turns(format: str) -> tuple[int, int]:
    """Return the rotations of a format: none, and blocks as large as its groups."""
    return (0, 16 if format.startswith("nv") else 32)


@torch.no_grad()
def advice_of(model: nn.Module, calibration: Calibration) -> dict[str, Any]:
    """Return crest factors and noise of every quantised layer, and the crossovers of the pairs.

    Args:
        model: the exact transformer.
        calibration: points on its trajectories.
    """
    spec = QuantSpec(weight="mxint8", act="mxint8")
    linears = {name: linear for name, linear in find_linears(model).items() if name in layers_of(model, spec)}
    sample = InputSample(rows=ROWS)
    calibration.stream(model, sample, layers=[*linears])
    device = next(model.parameters()).device
    weights = {name: linear.weight.detach().float() for name, linear in linears.items()}
    inputs = {name: sample.of(name).float().to(device) for name in linears}
    rows = [_layer(name, weights[name], inputs[name]) for name in linears]
    pairs = []
    for kind, tensors in (("inputs", inputs), ("weights", weights)):
        for pair in PAIRS:
            pairs += [{"of": kind, **_crossing(pair, size, tensors)} for size in turns(pair[0])]
    return {"layers": rows, "pairs": pairs}


def _layer(name: str, weight: Tensor, x: Tensor) -> dict[str, Any]:
    fits = {"weight": _fits(weight), "inputs": _fits(x)}
    advice = Advice(layer=name, weight=tuple(fits["weight"]), inputs={"all": tuple(fits["inputs"])})
    plain = Advice(
        layer=name,
        weight=tuple(each for each in fits["weight"] if not each.rotate),
        inputs={"all": tuple(each for each in fits["inputs"] if not each.rotate)},
    )
    choices = {"choice": advice.best(FOUR_BITS), "choice_without_rotation": plain.best(FOUR_BITS)}
    told = {
        kind: {f"{each.format}.{each.rotate}": [round(each.crest[1], 4), round(each.measured, 3)] for each in found}
        for kind, found in fits.items()
    }
    return {"layer": name, **told, **{key: [*value[:2], round(value[2], 3)] for key, value in choices.items()}}


def _fits(x: Tensor) -> list[Fit]:
    return [fit for pair in PAIRS for fit in fits_of(x, pair, turns(pair[0]))]


def _crossing(pair: tuple[str, str], size: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the noise of a pair of formats over all tensors, and the crest factor at which floating point wins."""
    crests, noises, energies = [], [], []
    for x in tensors.values():
        turned = rotated(x, size)
        format = format_of(pair[0])
        groups = grouped(turned, format).double().flatten(0, -2)
        energy = groups.square().sum(-1)
        errors = [grouped(turned - quantize(turned, format_of(name)).numbers(), format) for name in pair]
        found = torch.stack([each.double().flatten(0, -2).square().sum(-1) for each in errors])
        kept = energy > 0
        crests.append((groups.abs().amax(-1) / groups.square().mean(-1).sqrt())[kept].cpu())
        noises.append((found / energy)[:, kept].cpu())
        energies.append(energy[kept].cpu())
    crest, noise, energy = torch.cat(crests), torch.cat(noises, 1), torch.cat(energies)
    integers, floating = (-10 * ((noise * energy).sum(1) / energy.sum()).log10()).tolist()
    quartiles = crest.sort().values[[len(crest) // 4, len(crest) // 2, len(crest) * 3 // 4]].tolist()
    return {
        "pair": list(pair),
        "rotate": size,
        "predicted": crossover(format_of(pair[0]), format_of(pair[1])),
        "measured": crossing(crest, noise),
        "crest_quartiles": quartiles,
        "integers_db": integers,
        "floating_db": floating,
        "integers_win": float((noise[0] < noise[1]).double().mean()),
        "layers_where_integers_win": _wins(pair, size, tensors),
    }


def _wins(pair: tuple[str, str], size: int, tensors: Mapping[str, Tensor]) -> float:
    won = []
    for x in tensors.values():
        integers, floating = fits_of(x, pair, (size,))
        won.append(integers.measured > floating.measured)
    return sum(won) / len(won)


def crossing(crest: Tensor, noise: Tensor) -> float | str:
    """Return the crest factor above which floating point has less noise than integers.

    Args:
        crest: (groups,) crest factors.
        noise: (2, groups) relative noise of integers and of floating point.

    Returns:
        The crest factor; or "integers" or "floating point", if one is better at all measured crest factors.
    """
    order = crest.argsort()
    gaps, places = [], []
    for part in order.tensor_split(min(BINS, len(order))):
        integers, floating = noise[:, part].mean(1).clamp_min(1e-30).log().tolist()
        gaps.append(integers - floating)
        places.append(float(crest[part].log().mean()))
    for number in range(1, len(gaps)):
        before, after = gaps[number - 1], gaps[number]
        if before < 0 <= after:
            share = before / (before - after)
            return float(torch.tensor(places[number - 1] + share * (places[number] - places[number - 1])).exp())
    return "integers" if sum(gaps) < 0 else "floating point"
