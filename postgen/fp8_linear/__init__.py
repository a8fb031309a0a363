"""Linear layers of stock diffusers transformers in FP8: rows of weights and tokens in E4M3, each with a scale.

No calibration and no other checkpoint: weights are rounded when it is put on, tokens in every call. On a GPU with FP8
(compute capability 8.9 and more) the matrix products are those of FP8; the rounding costs a relative error of about
.0375 a layer. Taking it off gives the model back bit by bit.
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
