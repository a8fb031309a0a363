"""Round to nearest: each weight by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from postgen.quant.formats import Format
from postgen.quant.hessian import Hessian
from postgen.quant.rounding import Quantized, grouped, quantize_tensor
from postgen.quant.solvers.ranges import Clip, importance_of, range_scales
from postgen.settings import Part


@dataclass(kw_only=True)
class RtnOptions(Part):
    """Options of the solver "rtn"."""

    clip: Clip = "minmax"
    """How the range of each group is chosen, see `postgen.quant.solvers.ranges.Clip`."""


def rtn(weight: Tensor, format: Format, hessian: Hessian | None, options: RtnOptions) -> Quantized:
    """Round a weight to nearest. A Hessian weighs the errors of a search of the clip ratio."""
    if options.clip == "minmax":
        return quantize_tensor(weight, format)
    scales = range_scales(grouped(weight, format), format, options.clip, importance_of(weight, format, hessian))
    return quantize_tensor(weight, format, scales)
