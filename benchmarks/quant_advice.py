"""Crest factors of a model's weights and inputs, and where integers and floating point cross on them.

The crest factor of a group is its largest number divided by its root mean square. `postgen.quant.advisor` predicts the
crossover for normally distributed numbers; here the groups of real tensors are sorted by their crest factors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postgen.families.linear import find_linears
from postgen.quant import QuantSpec, format_of
from postgen.quant.advisor import Advice, Fit, crest_factor, crossover, fits_of, measured_crossover
from postgen.quant.calibration import Calibration
from postgen.quant.layers import layers_of
from postgen.quant.observers import InputSample
from postgen.quant.rotation import rotated
from postgen.quant.rounding import grouped

PAIRS = (("mxint8", "mxfp8"), ("mxint6", "mxfp6"), ("mxint4", "mxfp4"), ("nvint4", "nvfp4"))
"""Integers and floating point with the same number of bits."""
FOUR_BITS = ("mxint4", "mxfp4", "nvint4", "nvfp4")
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
    for kind, tensors in (("inputs", inputs), ("weight", weights)):
        for pair in PAIRS:
            for size in turns(pair[0]):
                pairs.append(
                    {"of": kind, **_totals(pair, size, kind, rows), **_crossing(pair, size, [*tensors.values()])}
                )
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


def _totals(pair: tuple[str, str], size: int, kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean QSNR of both formats over the layers, and the share of layers where integers have less noise."""
    integers, floating = ([row[kind][f"{name}.{size}"][1] for row in rows] for name in pair)
    return {
        "pair": list(pair),
        "rotate": size,
        "integers_db": sum(integers) / len(rows),
        "floating_db": sum(floating) / len(rows),
        "layers_where_integers_win": sum(map(operator.gt, integers, floating)) / len(rows),
    }


def _crossing(pair: tuple[str, str], size: int, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Return the predicted and the measured crossover, and quartiles of the crest factors of all groups."""
    integers, floating = map(format_of, pair)
    # Groups of all layers, each layer in its own unit, because the groups of NV formats also share a scale.
    turned = [rotated(x, size) for x in tensors]
    groups = torch.cat([grouped(x / x.abs().amax(), integers).flatten(0, -2) for x in turned])
    quartiles = crest_factor(groups, integers).sort().values
    found = measured_crossover(groups, integers, floating)
    return {
        "predicted": crossover(integers, floating),
        "measured": "integers" if found == math.inf else "floating point" if found == 0 else found,
        "crest_quartiles": [float(quartiles[len(quartiles) * part // 4]) for part in (1, 2, 3)],
    }
