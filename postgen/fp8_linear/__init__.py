"""Linear layers of stock diffusers transformers in FP8 (E4M3), with one scale per output channel and per token.

The plug-in needs no calibration and no other checkpoint. The weights are quantised when the plug-in is applied, and
the tokens in every forward pass. On a GPU with FP8 (compute capability 8.9 or later) the matrix products run in FP8.
The rounding costs a relative error of about .0375 per layer. Removing the plug-in restores the model bit by bit.
"""

from postgen.fp8_linear.apply import FP8LinearsHandle, apply_fp8_linears, fp8_linears_for_call, remove_fp8_linears
from postgen.fp8_linear.config import FP8LinearConfig
from postgen.fp8_linear.layer import FP8Linear
from postgen.fp8_linear.policy import check_known

__all__ = [
    "FP8Linear",
    "FP8LinearConfig",
    "FP8LinearsHandle",
    "apply_fp8_linears",
    "check_known",
    "fp8_linears_for_call",
    "remove_fp8_linears",
]
