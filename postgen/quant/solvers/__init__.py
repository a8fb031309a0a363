"""Solvers: from a weight, a number format and perhaps a Hessian to codes and scales.

    solve(linear.weight, format_of("int3:g64"), "gptq", hessian, order="groups")

- "rtn": round to nearest, with the range of the weights or a searched one.
- "ls": least squares, codes and scales in turn; no data (DVD-Quant).
- "gptq": the errors of rounded columns are compensated by later ones (arXiv:2210.17323).
- "bpdq": the same with bit planes, whose numbers are not evenly spaced (arXiv:2602.04163).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, did_you_mean, shown
from postgen.quant.formats import Format
from postgen.quant.hessian import Hessian
from postgen.quant.rounding import Quantized
from postgen.quant.solvers.bpdq import BpdqOptions, bpdq
from postgen.quant.solvers.gptq import GptqOptions, gptq
from postgen.quant.solvers.ls import LsOptions, ls
from postgen.quant.solvers.rtn import RtnOptions, rtn
from postgen.settings import Part

__all__ = ["SOLVERS", "Solver", "check_solver", "solve"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """A row of `SOLVERS`."""

    run: Callable[..., Quantized]
    """Function of weight, format, Hessian and options."""
    options: type[Part]
    """Dataclass of the options."""
    needs_hessian: bool = False
    planes_only: bool = False


SOLVERS: Mapping[str, Solver] = {
    "rtn": Solver(run=rtn, options=RtnOptions),
    "ls": Solver(run=ls, options=LsOptions),
    "gptq": Solver(run=gptq, options=GptqOptions, needs_hessian=True),
    "bpdq": Solver(run=bpdq, options=BpdqOptions, needs_hessian=True, planes_only=True),
}
"""Name -> solver."""


def solve(weight: Tensor, format: Format, solver: str, hessian: Hessian | None = None, **options: Any) -> Quantized:
    """Quantise the weight of a linear layer.

    Args:
        weight: (N, K) of any floating-point dtype, on any device; finite.
        format: the number format.
        solver: a name in `SOLVERS`.
        hessian: of the layer's inputs. "gptq" and "bpdq" need it; a search of "rtn", and "ls", weigh errors with its
            diagonal where it is given.
        **options: options of the solver, the fields of `SOLVERS[solver].options`.

    Returns:
        Codes and float32 scales on the device of the weight. Coefficients of bit planes are rounded to bfloat16, in
        which they are stored.

    Raises:
        UserError: the solver or an option is unknown or does not suit the format, the Hessian is missing or of
            another size, the group does not divide K, or the weight is not finite.

    >>> import torch
    >>> from postgen.quant import format_of
    >>> solve(torch.eye(2, 16), format_of("int4:g16"), "ls").numbers()[0, 0].item()
    1.0
    """
    said = check_solver(solver, format, options, hessian=hessian is not None)
    if weight.dim() != 2:
        raise UserError(f"a weight must be a matrix (N, K), got {tuple(weight.shape)}")
    if not weight.isfinite().all():
        raise UserError("the weight has values that are not finite: it cannot be quantised")
    if hessian is not None:
        if hessian.channels != weight.shape[1]:
            raise UserError(f"the Hessian has {hessian.channels} channels, but the layer has {weight.shape[1]}")
        hessian = hessian.to(weight.device)
    format.group(weight.shape[1])
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        found: Quantized = SOLVERS[solver].run(weight.detach(), format, hessian, said)
    return found


def check_solver(solver: str, format: Format, options: Mapping[str, Any], *, hessian: bool) -> Part:
    """Check the choice of a solver before anything is computed, and return its options.

    Args:
        solver: the name.
        format: format of the weight.
        options: options by name.
        hessian: whether there will be a Hessian.

    Raises:
        UserError: as in `solve`.
    """
    row = SOLVERS.get(solver) if isinstance(solver, str) else None
    if row is None:
        known = ", ".join(SOLVERS)
        raise UserError(f"the solver {shown(solver)} is unknown.{did_you_mean(str(solver), SOLVERS)} Solvers: {known}")
    known_options = [each.name for each in fields(row.options)]
    for name in options:
        if name not in known_options:
            raise UserError(
                f"the solver {solver} has no option {shown(name)}.{did_you_mean(str(name), known_options)} Options:"
                f" {', '.join(known_options)}"
            )
    if row.planes_only and not format.planes:
        raise UserError(f"the solver {solver} is for bit planes such as bp2:g64, not for {format.text}: use gptq")
    if row.needs_hessian and not hessian:
        raise UserError(f"the solver {solver} needs calibration; without it use the solver ls or rtn")
    said = row.options(**options)
    if format.planes and "clip" in options and (solver == "ls" or options["clip"] != "minmax"):
        raise UserError(f"{format.text} has no range to clip: leave the option clip out, or use bpdq")
    return said
